"""Launch ``src/decode_a16.cu``: a few tokens times an int4 or int8 weight in fragment order, on Hopper.

Tokens are bf16 or fp16; or they are quantized like ggml's Q8_1 blocks, by the kernel itself or in a launch before it.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from lq_formats import DTypeError, ShapeError
from lq_formats.layouts.fragment import BLOCK_ROWS
from torch import Tensor

from lq_kernels.cuda.decode_cuts import (
    FEW,
    MAX_STAGES,
    SAME,
    SHARED,
    DecodeConfig,
    Form,
    alone,
    beside_next,
    candidates,
    cost,
)
from lq_kernels.cuda.quantize_q8_1 import fragment_q8_1
from lq_kernels.cuda.variant import EPILOGUES, TYPES, Scales, Variant
from lq_kernels.jit.launcher import Launch
from lq_kernels.problem import Arch, Problem
from lq_kernels.tuned.lookup import Choice, alike, choose, measurements
from lq_kernels.tuned.table import Q8_1, Weight

THREADS = 320
_Q8_1_BLOCK = 32
_QUANTIZED_HERE = 28672
"""Numbers of tokens that CTAs quantize themselves, at most, where nothing was measured: more are faster in a launch of theirs.

On an H200, a launch and two, 1, 2 and 4 tokens, fastest cuts: 4096x14336 9.6 / 9.9 / 10.9 us and 10.0 / 10.3 / 10.5; 8192x8192
10.3 / 10.8 / 11.9 and 11.1 / 11.1 / 11.4; 14336x4096 9.4 / 9.6 / 9.9 and 9.8 / 10.1 / 10.4; 4096x4096 3.7 / 3.8 / 4.2 and
4.7 / 4.9 / 5.0.
"""


@functools.lru_cache(maxsize=4096)
def choice(
    m: int,
    blocks: int,
    k: int,
    bits: int,
    scales: Scales,
    sm_count: int,
    device: str,
    *,
    q8_1: bool = False,
    quantizes: bool = True,
) -> Choice[DecodeConfig] | None:
    """Return the cut that was measured to be fastest on ``device``, or is by the model; None if none fits.

    Args:
        m: Tokens.
        blocks: Blocks of 16 rows.
        k: In features.
        bits: 4 or 8.
        scales: Of the variant.
        sm_count: Multiprocessors.
        device: Name of the GPU, for the tables; empty for the model.
        q8_1: Whether x is quantized like Q8_1 blocks: what was measured so, or else what is fastest by itself, with a
            multiprocessor for each CTA (:func:`lq_kernels.cuda.decode_cuts.alone`) behind the launch that quantizes.
        quantizes: Whether that may be this launch, as of tokens that do not come as blocks.
    """
    sizes = (m, blocks, k, bits, scales, sm_count)
    weight = Weight(bits, scales.groups, scales.zero, scales.bytes, Q8_1 if q8_1 else "", blocks * BLOCK_ROWS, k)
    found = tuple(measurements("decode_a16", m, weight, device, sm_count))
    if q8_1 and not found:
        chosen = choice(*sizes, device)
        return chosen and replace(chosen, config=_for_q8_1(chosen.config, sizes, quantizes=quantizes))

    def time(config: DecodeConfig) -> float:
        return cost(config, m, blocks, k, bits, sm_count)

    def able(configs: Iterable[DecodeConfig]) -> list[DecodeConfig]:
        return [config for config in configs if quantizes or not config.quantizes]

    measured = able(config for each in found for config in candidates(*sizes, dict(each.point.cut), q8_1=q8_1))
    kept = () if measured else _kept([dict(each.point.cut) for each in found], sizes, q8_1=q8_1)
    chosen = Choice(min(kept, key=time), found[0]) if kept else None
    chosen = chosen or choose(measured or able(candidates(*sizes, q8_1=q8_1)), time, SAME, found)
    if chosen is None:
        return None
    config = chosen.config
    if chosen.measured is not None:
        # As much room as when it was measured: where fewer tokens let another CTA fit, the scheduler gives some multiprocessors
        # three and others one, which takes up to 30% longer.
        shared = min(dict(chosen.measured.point.cut).get("shared", 0), SHARED[1])
        config = replace(config, shared=max(config.shared, shared))
    return replace(chosen, config=beside_next(config, m, sm_count))


_Sizes = tuple[int, int, int, int, Scales, int]


def _kept(cuts: Iterable[Mapping[str, int]], sizes: _Sizes, *, q8_1: bool = False) -> list[DecodeConfig]:
    """Return the cuts that are like the first measured one that has any, with fewer stages if need be, and keep x as it is."""
    most = ((cut, min(cut.get("stages", 0), MAX_STAGES)) for cut in cuts)  # a file may hold any number
    twins = (
        {**cut, "streamed": 0, "quantizes": 0, "stages": each} for cut, stages in most for each in range(stages, 0, -1)
    )
    return next(filter(None, (list(candidates(*sizes, twin, q8_1=q8_1)) for twin in twins)), [])


def _for_q8_1(config: DecodeConfig, sizes: _Sizes, *, quantizes: bool) -> DecodeConfig:
    """Return what the cut of a product with 16 bits becomes where x is quantized like Q8_1 blocks."""
    m, blocks, k, bits, _, sm_count = sizes
    fields = {name: int(getattr(config, name)) for name in SAME}
    if quantizes and m <= FEW and m * k <= _QUANTIZED_HERE:
        able = [each for each in candidates(*sizes, q8_1=True) if each.quantizes]
        wanted = {**fields, "streamed": 0, "quantizes": 1}
        twin = alike(tuple(wanted.items()), able, SAME)
        twin = twin or min(able, key=lambda each: cost(each, m, blocks, k, bits, sm_count), default=config)
        return beside_next(twin, m, sm_count)
    return alone(next(candidates(*sizes, fields, q8_1=True), config), m, sm_count)


def choice_of(problem: Problem) -> Choice[DecodeConfig] | None:
    """Return the cut of a problem, or None if the tokens do not fit shared memory or the grid."""
    bits, symmetric = problem.spec.bits, problem.spec.symmetric
    variant = Variant.of(problem.dtype, problem.spec.scale_dtype, bits, problem.group_size, problem.k, not symmetric)
    q8_1 = problem.activation == Q8_1 and variant.groups > 0
    return _choice(problem.m, -(-problem.n // BLOCK_ROWS), problem.k, variant, problem.arch, q8_1=q8_1)


def _choice(
    m: int, blocks: int, k: int, variant: Variant, arch: Arch, *, q8_1: bool = False, quantizes: bool = True
) -> Choice[DecodeConfig] | None:
    sizes = (m, blocks, k, variant.bits, variant.scales, arch.sm_count, arch.name)
    return choice(*sizes, q8_1=q8_1, quantizes=quantizes)


def linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    bits: int,
    config: DecodeConfig | None = None,
    transposed: bool = False,
    residual: Tensor | None = None,
    gated: bool = False,
    minimum: bool = False,
) -> Tensor:
    """Return ``x (M, K) @ w.T + bias``, ``(M, out_features)`` in x's dtype; bitwise reproducible.

    Sums are fp32, and scales multiply them as they are. Codes less zeros of x's dtype are rounded to it, which changes nothing
    where zeros are integers; other zeros, and minima, multiply fp32 sums of x.

    Args:
        x: ``(M, K)`` bf16 or fp16, K a multiple of 8.
        packed: The weight in fragment order (:class:`lq_formats.layouts.FragmentLayout`).
        scale: Arranged alike (``scale_shape`` of the layout).
        zero: As ``scale``, in its dtype; None for symmetric weights.
        bias: ``(out_features,)`` in x's dtype, or None; of a gated product that of the gates, then that of the ups.
        out_features: Rows of the weight; of a gated product half as many.
        group_size: In features per scale; K for one scale a row.
        bits: 4 or 8.
        config: How to cut, for tuning; by default :func:`choice`.
        transposed: Whether the result is ``(out_features, M) float32`` instead.
        residual: ``(M, out_features)`` in x's dtype, contiguous, added before the result is rounded; or None.
        gated: Whether the rows are those of a gate and an up projection (:mod:`lq_kernels.gated`), and the result is
            ``silu(gate) * up``, rounded once. One of these three at most.
        minimum: Whether ``zero`` holds minima, and weights are ``u * scale + zero``; 4 bits in groups.

    Raises:
        ShapeError: If the tokens do not fit shared memory or the grid.
    """
    m, k = x.shape
    epilogue = "transposed" if transposed else "silu_mul" if gated else "residual" if residual is not None else "none"
    if x.stride() != (k, 1) or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    launch = _prepare(
        x.get_device(),
        m,
        out_features,
        k,
        packed.shape[1],
        group_size,
        Variant.of(x.dtype, scale.dtype, bits, group_size, k, zero is not None, minimum),
        config,
        epilogue,
    )
    y = x.new_empty((out_features, m), dtype=torch.float32) if transposed else x.new_empty((m, out_features))
    launch(
        x.data_ptr(),
        packed.data_ptr(),
        scale.data_ptr(),
        0 if zero is None else zero.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        y.data_ptr(),
    )
    return y


def linear_q8_1(
    x: Tensor, packed: Tensor, scale: Tensor, out_features: int, config: DecodeConfig | None = None
) -> Tensor:
    """Return ``w @ x.T``, ``(out_features, M) float32``, of an int4 weight in groups of 32 and tokens as their Q8_1 blocks are.

    Products are of integers and exact; a group's sum is multiplied by both scales and added up in fp32.

    Args:
        x: ``(M, K)`` bf16, fp16 or fp32, K a multiple of 32; or blocks ``(M, K // 32, 36) uint8``. Not empty.
        packed: As for :func:`linear`, and so are the others.
        scale: Arranged alike, fp16 or bf16, of groups of 32; K is more than 32.
        out_features: Rows of the weight.
        config: How to cut, for tuning; by default :func:`choice`. One that ``quantizes`` takes one launch, of floats only;
            otherwise x becomes int8 in a launch before.

    Raises:
        ShapeError: If the tokens do not fit shared memory or the grid.
        DTypeError: If x is blocks, and ``config`` is one that quantizes.
    """
    blocks = x.dtype == torch.uint8
    m, k = x.shape[0], x.shape[1] * (_Q8_1_BLOCK if blocks else 1)
    sizes = (x.get_device(), m, out_features, k, packed.shape[1])
    launch, quantizes = _prepare_q8_1(*sizes, x.dtype, scale.dtype, config)
    if not quantizes:
        x = fragment_q8_1(x)
    elif x.stride() != (k, 1) or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    y = x.new_empty((out_features, m), dtype=torch.float32)
    launch(x.data_ptr(), packed.data_ptr(), scale.data_ptr(), 0, 0, 0, y.data_ptr())
    return y


@functools.lru_cache(maxsize=4096)
def _prepare_q8_1(
    index: int,
    m: int,
    n: int,
    k: int,
    blocks: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    config: DecodeConfig | None,
) -> tuple[Launch, bool]:
    variant = Variant.of(torch.bfloat16, scale_dtype, 4, _Q8_1_BLOCK, k, False)
    if config is None:
        chosen = _choice(m, blocks, k, variant, _arch(index), q8_1=True, quantizes=dtype != torch.uint8)
        config = None if chosen is None else chosen.config
    if config is None:
        raise _too_large(m, k)
    if config.quantizes and dtype not in TYPES:
        raise DTypeError(f"x is {dtype}, Q8_1 blocks, which nobody quantizes; pass a config that does not, or floats")
    tokens = q8_1_defines(config.form, m, dtype)
    return _prepare(index, m, n, k, blocks, _Q8_1_BLOCK, variant, config, "transposed", tokens), config.quantizes


def q8_1_defines(form: Form, m: int, dtype: torch.dtype) -> tuple[str, ...]:
    """Return the macros with which ``m`` tokens of a dtype are multiplied as their Q8_1 blocks are."""
    few = ("LQ_FEW=1",) if m <= FEW and form.token_tiles == 1 else ()
    return (f"LQ_QUANTIZED={TYPES[dtype]}" if form.quantizes else "LQ_TOKENS_INT8=1", *few)


@functools.lru_cache(maxsize=4096)
def _prepare(
    index: int,
    m: int,
    n: int,
    k: int,
    blocks: int,
    group_size: int,
    variant: Variant,
    config: DecodeConfig | None,
    epilogue: str,
    tokens: tuple[str, ...] = (),
) -> Launch:
    if config is None and not tokens:
        arch = _arch(index)
        chosen = _choice(m, blocks, k, variant, arch)
        if chosen is not None:
            # Q8_1's tokens in 16 bits come from a launch of theirs.
            config = alone(chosen.config, m, arch.sm_count) if epilogue == "transposed" else chosen.config
    if config is None:
        raise _too_large(m, k)
    return Launch(
        index,
        "decode_a16",
        "decode_a16",
        (config.cluster * config.clusters, -(-m // (8 * config.token_tiles)), 1),
        THREADS,
        config.shared,
        7,
        (
            m,
            n,
            k,
            blocks,
            *config.shares(blocks),
            group_size,
            config.slots,
            config.stages,
            config.boxes,
            config.pitch,
        ),
        cluster=config.cluster,
        dependent=True,
        defines=(*variant.defines, *config.defines, *EPILOGUES[epilogue], *tokens),
    )


def _too_large(m: int, k: int) -> ShapeError:
    return ShapeError(f"M={m} tokens with K={k} do not fit decode_a16; let lq choose the kernel")


def _arch(index: int) -> Arch:
    return Arch.of(torch.device("cuda", index))
