"""lq's kernels against the vendor's dense product, over batch sizes and the layers of LLaMA models.

A measured point is one product ``y (M, N) = x (M, K) @ w (N, K).T``. ``dense`` is ``F.linear`` with a weight of x's dtype
(cuBLAS on an NVIDIA GPU). Weights are random bits: kernels take the same time for any. For Q4_0 the time includes the
quantization of the activations.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from lq_formats import LQError, NoKernelError, QuantSpec, SpecError
from lq_kernels import Arch, Problem, explain, kernel_names, select
from torch import Tensor

from lq_eval.bench.operands import Operand, int4_operand, int8_operand, q4_0_operand
from lq_eval.bench.peers import PEERS, peer_calls
from lq_eval.bench.shapes import Shape
from lq_eval.bench.timing import COLD_BYTES, Call, copies, time_us

OPS = {"int4": "int4", "int8": "int8", "q4_0": "q4_0_q8_1"}
AUTO, ALL, DENSE = "auto", "all", "dense"


@dataclass(frozen=True)
class GemmOptions:
    """What to measure.

    Attributes:
        shapes: Weights.
        ms: Numbers of tokens.
        dtypes: dtypes of x.
        ops: ``int4``, ``int8``, ``q4_0``.
        kernels: Kernel names; ``auto`` is the registry's choice, ``all`` every kernel that can
            run but the reference.
        peers: Other libraries, see :mod:`lq_eval.bench.peers`.
        group_size: Group size of int4; -1 for one scale a row.
        symmetric: Whether int4 is symmetric.
        device: Where to run.
        seconds: Stop starting new points after this time.
        cold_bytes: Bytes of weights in a round, see :mod:`lq_eval.bench.timing`.
    """

    shapes: tuple[Shape, ...]
    ms: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    ops: tuple[str, ...] = ("int4", "int8", "q4_0")
    kernels: tuple[str, ...] = (AUTO,)
    peers: tuple[str, ...] = ()
    group_size: int = 128
    symmetric: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seconds: float = math.inf
    cold_bytes: int = COLD_BYTES

    def __post_init__(self) -> None:
        for name, values, known in (("op", self.ops, tuple(OPS)), ("peer", self.peers, tuple(PEERS))):
            for value in values:
                if value not in known:
                    raise SpecError(f"unknown {name} {value!r}: expected one of {', '.join(known)}")
        known_kernels = {name for op in self.ops for name in kernel_names(OPS[op])}  # type: ignore[arg-type]
        for kernel in self.kernels:
            if kernel not in known_kernels | {AUTO, ALL}:
                raise SpecError(f"unknown kernel {kernel!r}: expected auto, all, {', '.join(sorted(known_kernels))}")
        for m in self.ms:
            if m < 1:
                raise SpecError(f"M={m}: expected at least one token")
        for shape in self.shapes:
            if "q4_0" in self.ops and shape.k % 32:
                raise SpecError(
                    f"{shape.label}: K={shape.k} is no multiple of 32, which q4_0 needs; leave it out of --ops"
                )
            if "int4" in self.ops and self.group_size != -1 and (self.group_size < 8 or shape.k % self.group_size):
                raise SpecError(f"{shape.label}: K={shape.k} is not divisible by the group size {self.group_size}")


@dataclass(frozen=True)
class GemmRow:
    """One measured point.

    Attributes:
        op: ``int4``, ``int8`` or ``q4_0``.
        shape: Label of the weight.
        n: Out features.
        k: In features.
        m: Tokens.
        dtype: dtype of x.
        group_size: In features per scale; 0 for per row int8.
        kernel: What was asked for: ``auto``, a kernel or a peer.
        ran: The kernel that ran.
        us: Median microseconds; None if it could not run.
        dense_us: Median microseconds of the dense product.
        gb_per_s: Bytes of packed weight read per second, in 1e9.
        note: Why it could not run.
    """

    op: str
    shape: str
    n: int
    k: int
    m: int
    dtype: str
    group_size: int
    kernel: str
    ran: str
    us: float | None
    dense_us: float
    gb_per_s: float | None
    note: str = ""

    @property
    def speedup(self) -> float | None:
        """Time of the dense product over this time."""
        return self.dense_us / self.us if self.us else None

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON values, with its speedup."""
        return {**asdict(self), "speedup": self.speedup}


def points(options: GemmOptions) -> int:
    """Return how many rows :func:`run_gemm` yields at most."""
    per_op = sum(len(_kernels(op, options)) + (len(options.peers) if op == "int4" else 0) for op in options.ops)
    return len(options.shapes) * len(options.dtypes) * len(options.ms) * per_op


def run_gemm(options: GemmOptions) -> Iterator[GemmRow]:
    """Measure every point, one at a time, until all are done or the time is up.

    A kernel that was asked for by name and cannot run a point yields a row that says why.
    """
    deadline = time.monotonic() + options.seconds
    arch = Arch.of(options.device)
    for shape in options.shapes:
        for dtype in options.dtypes:
            dense = _dense_times(shape, dtype, options, deadline)
            for op in options.ops:
                operand = _operand(op, shape, dtype, options)
                for m, dense_us in dense.items():
                    x = torch.randn(m, shape.k, device=options.device, dtype=dtype)
                    problem = Problem(OPS[op], m, shape.n, shape.k, _spec(op, dtype, options), _seen(op, dtype), arch)  # type: ignore[arg-type]
                    for kernel in _kernels(op, options):
                        if kernel not in options.kernels and _cannot(problem, kernel):
                            continue  # it was not asked for by name, only by "all"
                        if time.monotonic() > deadline:
                            return
                        yield _measure(op, shape, dtype, x, kernel, problem, operand, dense_us, options)
                del operand
                if op == "int4":
                    yield from _peer_rows(shape, dtype, dense, options, deadline)
                _release(options.device)


def _measure(
    op: str,
    shape: Shape,
    dtype: torch.dtype,
    x: Tensor,
    kernel: str,
    problem: Problem,
    operand: Operand,
    dense_us: float,
    options: GemmOptions,
) -> GemmRow:
    us, ran, note = None, kernel, ""
    try:
        ran = explain(problem).chosen or "" if kernel == AUTO else select(problem, kernel).name
        us = time_us(operand.calls(x, "" if kernel == AUTO else kernel), options.device, budget_s=_cpu_budget(options))
    except (LQError, RuntimeError, ImportError) as error:
        # One kernel that fails to compile or runs out of memory must not end the benchmark.
        note = _last_line(error)
    group = _group(op, shape, options)
    rate = operand.nbytes / us / 1e3 if us else None
    name = str(dtype).removeprefix("torch.")
    return GemmRow(op, shape.label, shape.n, shape.k, x.shape[0], name, group, kernel, ran, us, dense_us, rate, note)


def _dense_times(shape: Shape, dtype: torch.dtype, options: GemmOptions, deadline: float) -> dict[int, float]:
    count = copies(shape.n * shape.k * dtype.itemsize, options.cold_bytes)
    weights = [torch.randn(shape.n, shape.k, device=options.device, dtype=dtype) for _ in range(count)]
    found: dict[int, float] = {}
    for m in options.ms:
        if time.monotonic() > deadline:
            break
        x = torch.randn(m, shape.k, device=options.device, dtype=dtype)
        calls: list[Call] = [lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in weights]  # type: ignore[misc]
        found[m] = time_us(calls, options.device, budget_s=_cpu_budget(options))
    del weights
    _release(options.device)
    return found


def _peer_rows(
    shape: Shape, dtype: torch.dtype, dense: dict[int, float], options: GemmOptions, deadline: float
) -> Iterator[GemmRow]:
    name = str(dtype).removeprefix("torch.")
    group = _group("int4", shape, options)
    nbytes = shape.n * shape.k // 2
    for peer in options.peers:
        make: Callable[[Tensor], Sequence[Call]] | None = None
        note = ""
        if time.monotonic() > deadline:
            return
        try:
            count = copies(nbytes, options.cold_bytes)
            make = peer_calls(peer, shape, dtype, options.group_size, options.device, count)
        except (LQError, RuntimeError, ImportError) as error:
            note = _last_line(error)
        for m, dense_us in dense.items():
            if time.monotonic() > deadline:
                return
            us = None
            try:
                if make is not None:
                    calls = make(torch.randn(m, shape.k, device=options.device, dtype=dtype))
                    us = time_us(calls, options.device)
            except (LQError, RuntimeError) as error:
                note = _last_line(error)
            rate = nbytes / us / 1e3 if us else None
            yield GemmRow(
                "int4",
                shape.label,
                shape.n,
                shape.k,
                m,
                name,
                group,
                peer,
                peer,
                us,
                dense_us,
                rate,
                "" if us else note,
            )


def _operand(op: str, shape: Shape, dtype: torch.dtype, options: GemmOptions) -> Operand:
    n, k, device, cold = shape.n, shape.k, options.device, options.cold_bytes
    if op == "int4":
        group = _group(op, shape, options)
        return int4_operand(n, k, group, dtype, device, symmetric=options.symmetric, cold_bytes=cold)
    return int8_operand(n, k, device, cold) if op == "int8" else q4_0_operand(n, k, device, cold)


def _spec(op: str, dtype: torch.dtype, options: GemmOptions) -> QuantSpec:
    if op == "int8":
        return QuantSpec(8, "row", None, True, torch.float32)
    if op == "q4_0":
        return QuantSpec(4, "group", 32, True, torch.float16)
    if options.group_size == -1:
        return QuantSpec(4, "row", None, options.symmetric, dtype)
    return QuantSpec(4, "group", options.group_size, options.symmetric, dtype)


def _seen(op: str, dtype: torch.dtype) -> torch.dtype:
    # The Q4_0 product sees quantized activations and returns float32, whatever x was.
    return torch.float32 if op == "q4_0" else dtype


def _group(op: str, shape: Shape, options: GemmOptions) -> int:
    if op == "int8":
        return 0
    if op == "q4_0":
        return 32
    return shape.k if options.group_size == -1 else options.group_size


def _kernels(op: str, options: GemmOptions) -> tuple[str, ...]:
    """Return the kernels to time for an operation; ``all`` leaves out the reference, which is an oracle."""
    every = kernel_names(OPS[op])  # type: ignore[arg-type]
    chosen: list[str] = []
    for kernel in options.kernels:
        if kernel == ALL:
            chosen += [AUTO, *(name for name in every if name != "reference")]
        elif kernel == AUTO or kernel in every:
            chosen.append(kernel)
    return tuple(dict.fromkeys(chosen))


def _cannot(problem: Problem, kernel: str) -> bool:
    if kernel == AUTO:
        return False
    try:
        select(problem, kernel)
    except NoKernelError:
        return True
    return False


def _cpu_budget(options: GemmOptions) -> float:
    return 0.5 if math.isinf(options.seconds) else max(0.05, options.seconds / (8 * max(1, points(options))))


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _last_line(error: BaseException) -> str:
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return lines[-1].strip()[:200]
