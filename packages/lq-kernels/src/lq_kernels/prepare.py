"""Compile ahead: everything that a product may ask for, whatever its number of tokens, in parallel."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace

import torch
from lq_formats import SpecError

from lq_kernels import q4_0
from lq_kernels.cuda import constraints
from lq_kernels.cuda.sources import SOURCES
from lq_kernels.cuda.variant import EPILOGUES, Variant
from lq_kernels.plans import MODEL
from lq_kernels.problem import Arch, Problem
from lq_kernels.registry import select
from lq_kernels.triton import config, ggml_config

_PROBES = tuple(sorted({m for power in range(14) for m in (1 << power, (1 << power) + 1, 3 << power) if m <= 8192}))
_AHEAD = ("dequant-blas", "cuda-prefill", "cuda-decode", "reference")
"""Kernels of weights in fragment order that run what :func:`units` names, and nothing else; the cheapest to plan first."""
_ONE_OF_EACH = (1, 64)
"""Tokens for which a Hopper GPU decodes and for which it does not."""

_SECONDS = {"gemm_q4_0_q8_1": 1.3, "decode_a16": 0.35, "prefill_a16": 0.2, "linear_a8": 0.2}
_SECONDS_A_TOKEN = 0.002


@dataclass(frozen=True)
class Unit:
    """One compilation.

    Attributes:
        source: File under ``cuda/src``, without its suffix.
        defines: ``NAME=VALUE`` of its macros.
        kernels: The kernels in it; empty for one with the source's name.
    """

    source: str
    defines: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()


def units(problem: Problem, *, lowest: bool = True) -> tuple[Unit, ...]:
    """Return every CUDA compilation that a weight's products may ask for, at any number of tokens.

    Which of them are asked for depends on tokens and tables (the layers of a LLaMA-3-8B ask for all, or all but one);
    together they take little longer than the longest where there are as many processors. Triton's kernels are not among them.

    Args:
        problem: One of the products; its ``m`` is not looked at.
        lowest: Of an int4 weight for 8-bit tokens, whether the code -8 occurs.
    """
    if problem.arch.kind != "cuda" or constraints.why_not_compile() is not None:
        return ()
    if problem.op == "q4_0":
        found = tuple(_a16(replace(problem, op="int4", spec=q4_0.spec(problem.k))))
        return found or _blocks(problem)
    if problem.op == "q4_0_q8_1":
        return (*_of_q8_1(problem), *_blocks(problem))
    if problem.op in ("int8_dynamic", "int4_dynamic"):
        return tuple(_a8(problem, lowest))
    return tuple(_a16(problem))


def _blocks(problem: Problem) -> tuple[Unit, ...]:
    able = constraints.why_not_q4_0(problem) is None
    return tuple(Unit(source, (), kernels) for source, kernels in SOURCES.items()) if able else ()


def _of_q8_1(problem: Problem) -> Iterator[Unit]:
    from lq_kernels.cuda import decode_a16, decode_cuts, quantize_q8_1

    tokens = replace(problem, op="int4", spec=q4_0.spec(problem.k), dtype=torch.bfloat16)
    if constraints.why_not_fragment(tokens) is not None:
        return
    grouped = tokens.group_size != problem.k  # and decode multiplies int8
    for unit in _a16(tokens):
        if unit.source != "dequantize_fragment" and not (grouped and unit.source == "decode_a16"):
            yield Unit(unit.source, (*unit.defines, *EPILOGUES["transposed"]))
    if grouped:
        variant = Variant.of(tokens.dtype, tokens.spec.scale_dtype, 4, q4_0.BLOCK, problem.k, False)
        for form in reversed(decode_cuts.forms(variant.scales, q8_1=True)):
            defines = (*variant.defines, *form.defines, *EPILOGUES["transposed"])
            tails = {
                decode_a16.q8_1_defines(form, m, dtype)
                for m in ((1,) if form.quantizes else _ONE_OF_EACH)
                for dtype in (torch.bfloat16, torch.float16, torch.float32)
            }
            for tail in sorted(tails):
                yield Unit("decode_a16", (*defines, *tail))
        yield Unit("fragment_q8_1", (), tuple(quantize_q8_1.FRAGMENT_KERNELS.values()))
    yield Unit("dequantize_q8_1")


def _a16(problem: Problem) -> Iterator[Unit]:
    from lq_kernels.cuda import decode_cuts, invariant, prefill_cuts

    spec = problem.spec
    variant = Variant.of(
        problem.dtype,
        spec.scale_dtype,
        spec.bits,
        problem.group_size,
        problem.k,
        not spec.symmetric,
        problem.op == "preshuffled_minima",
    )
    epilogue = EPILOGUES["silu_mul" if problem.op == "preshuffled_gated" else "none"]
    if constraints.why_not_fragment(problem) is None:
        for form in reversed(decode_cuts.forms(variant.scales)):
            yield Unit("decode_a16", (*variant.defines, *form.defines, *epilogue))
    if constraints.why_not_prefill(problem) is None:
        sizes = (problem.n, problem.k, spec.bits, variant.scale_bytes, _sms(problem))
        for cut in (invariant if problem.batch_invariant else prefill_cuts).forms(*sizes):
            yield Unit("prefill_a16", (*cut.macros(variant), *epilogue))
    if problem.op.startswith("preshuffled") or constraints.why_not_fragment(problem) is None:
        yield Unit("dequantize_fragment", tuple(each.replace("LQ_X=", "LQ_OUT=") for each in variant.defines))


def _a8(problem: Problem, lowest: bool) -> Iterator[Unit]:
    from lq_kernels.cuda import linear_a8, quantize_tokens
    from lq_kernels.dynamic_kernels import why_not_cuda

    if why_not_cuda(problem) is not None:
        return
    bits, activation, grouped = problem.spec.bits, problem.activation, problem.group_size != problem.k
    promote = linear_a8.promotes(activation, grouped)
    lowest = lowest and bits == 4 and activation == "fp8"
    scale = problem.spec.scale_dtype
    variant = linear_a8.A8Variant(bits, activation, problem.dtype, scale, grouped, lowest, promote)
    cuts = linear_a8.candidates(linear_a8.TOKENS[-1], problem.n, problem.k, bits, promote, _sms(problem))
    for _, macros in sorted({(cut.tokens, cut.defines) for cut in cuts}, reverse=True):
        yield Unit("linear_a8", (*variant.defines, *macros))
    _, vectors = quantize_tokens.cut(problem.k)
    yield Unit("quantize_tokens", quantize_tokens.defines(problem.dtype, activation, vectors))


def _sms(problem: Problem) -> int:
    return max(problem.arch.sm_count, 1)


def representatives(problem: Problem) -> tuple[int, ...]:
    """Return a number of tokens for each kernel, and each tile of a Triton kernel, that the registry selects up to 8192.

    A product with each of them, once, leaves nothing to be compiled or unpacked at another number. Selecting takes most of a
    millisecond on a Hopper GPU, so where nothing but what :func:`units` names can be selected it is not asked.
    """
    tile_m = ggml_config.tile_m if problem.op == "ggml" else config.tile_m
    known = _is_ahead(problem)
    found: dict[tuple[str, int], int] = {}
    for m in _PROBES:
        at = replace(problem, m=m)
        if known and m not in _ONE_OF_EACH and not _may_compile(at):
            continue
        name = select(at).name
        found.setdefault((name, tile_m(m) if name.startswith("triton-") else 0), m)
    return tuple(found.values())


def _is_ahead(problem: Problem) -> bool:
    """Return whether the kernels of ``_AHEAD`` run what :func:`units` names."""
    ours = problem.op in ("int4", "int8", "q4_0") or problem.op.startswith("preshuffled")
    return (
        ours
        and not problem.batch_invariant
        and constraints.why_not_fragment(problem) is None
        and constraints.why_not_prefill(problem) is None
    )


def _may_compile(problem: Problem) -> bool:
    """Return whether the registry may select a kernel that is not in ``_AHEAD``, without planning all of them.

    It does so by models, where nothing is measured, and never where unpacking is faster.
    """
    from lq_kernels.catalog import KERNELS

    kernels = {kernel.name: kernel for kernel in KERNELS if kernel.op == problem.op}
    unpack = kernels["dequant-blas"]
    limit = unpack.predict_us(problem)
    others = (kernel for name, kernel in kernels.items() if name not in _AHEAD)
    if not any(kernel.why_not(problem) is None and kernel.predict_us(problem) <= limit for kernel in others):
        return False
    plans = (kernels[name].plan for name in _AHEAD[:2])
    return all(plan is None or plan(problem).source == MODEL for plan in plans)


def compile_units(
    wanted: Iterable[Unit],
    compiler: Callable[[Unit], object],
    *,
    threads: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> int:
    """Compile in threads, the longest first.

    Args:
        wanted: What to compile; what is there twice is compiled once.
        compiler: Compiles one, for example :func:`into_cache` or :func:`onto_gpu`; called by several threads at once.
        threads: How many; 0 for as many as there are processors that this process may use, at most 32.
        progress: Called after each with how many are done, how many there are, and which it was.

    Returns:
        How many there were.

    Raises:
        CompileError: If one does not compile; the others are finished first.
        SpecError: If ``threads`` is no number of threads.
    """
    with compiling(wanted, compiler, threads=threads) as wait:
        return wait(progress)


@contextlib.contextmanager
def compiling(
    wanted: Iterable[Unit], compiler: Callable[[Unit], object], *, threads: int = 0
) -> Iterator[Callable[[Callable[[int, int, str], None] | None], int]]:
    """Compile in threads while the body runs; a first launch in it waits for its own kernel only.

    Args:
        wanted: As for :func:`compile_units`, and so are the others.
        compiler: Compiles one.
        threads: How many.

    Yields:
        A function that waits for all, takes what :func:`compile_units` takes as ``progress``, and returns and raises what it
        does. All are finished at the end of the body.
    """
    from lq_kernels.jit import processes

    if type(threads) is not int or threads < 0:
        raise SpecError(f"threads={threads!r}: expected a positive integer, or 0 for as many as there are processors")
    distinct = sorted(dict.fromkeys(wanted), key=_seconds, reverse=True)
    threads = threads or max(1, min(32, _processors()))
    with processes.helped(threads), ThreadPoolExecutor(threads) as pool:
        running = {pool.submit(compiler, unit): unit for unit in distinct}

        def wait(progress: Callable[[int, int, str], None] | None) -> int:
            for done, future in enumerate(as_completed(running), 1):
                if progress is not None:
                    progress(done, len(distinct), running[future].source)
            for future in running:
                future.result()
            return len(distinct)

        yield wait


def _processors() -> int:
    """Return how many processors this process may use: in a container fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _seconds(unit: Unit) -> float:
    """Return about how long a unit compiles on a server's core: large tiles have long code, pairs that share K half of it."""
    values = dict(define.removeprefix("LQ_").split("=", 1) for define in unit.defines)
    half = "SPLIT" in values and "MULTICAST" not in values
    tokens = int(values.get("TOKENS", 0)) / (2 if half else 1)
    return _SECONDS.get(unit.source, 0.1) + _SECONDS_A_TOKEN * tokens


def into_cache(arch: Arch) -> Callable[[Unit], object]:
    """Return a compiler for GPUs like ``arch``, which may be elsewhere: results are kept in the disk cache."""
    from lq_kernels.jit.compiler import architecture
    from lq_kernels.jit.launcher import cubin

    _read_once()
    return lambda unit: cubin(unit.source, architecture(arch.capability), unit.defines)


def onto_gpu(device: torch.device) -> Callable[[Unit], object]:
    """Return a compiler for a GPU that loads what it compiles, so that a first launch does neither."""
    from lq_kernels.jit.launcher import load

    _read_once()
    index = torch.cuda.current_device() if device.index is None else device.index
    return lambda unit: [load(index, unit.source, kernel, 0, unit.defines) for kernel in unit.kernels or (unit.source,)]


def _read_once() -> None:
    """Read what every cache key holds before there are threads, each of which would read it."""
    from lq_kernels.jit.compiler import compiler_version, headers
    from lq_kernels.jit.launcher import release

    headers(), compiler_version(), release()
