"""Launch ``src/decode_a16.cu``: a few tokens times an int4 or int8 weight in fragment order, on Hopper.

Tokens are bf16 or fp16, or Q8_1 blocks, which the kernel makes bf16 of itself.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from lq_formats import ShapeError
from lq_formats.layouts import FRAGMENT_INT4
from lq_formats.layouts.fragment import BLOCK_ROWS
from torch import Tensor

from lq_kernels.cuda.decode_cuts import MAX_STAGES, SAME, SHARED, DecodeConfig, alone, candidates, cost
from lq_kernels.cuda.variant import EPILOGUES, Scales, Variant
from lq_kernels.jit.launcher import Launch
from lq_kernels.problem import Arch, Problem
from lq_kernels.tuned.lookup import Choice, choose, measurements
from lq_kernels.tuned.table import Q8_1, Weight

THREADS = 320
Q8_1_DEFINES = ("LQ_TOKENS_Q8_1=1",)
"""``NAME=VALUE`` of the macro with which tokens are Q8_1 blocks."""
ROUNDED_DEFINES = {torch.bfloat16: ("LQ_ROUNDED=Bf16",), torch.float16: ("LQ_ROUNDED=Fp16",)}
"""... with which tokens of a dtype are made what their Q8_1 blocks would stand for."""
_Q8_1_BLOCK = 32


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
    streamed: bool = True,
    behind: bool = False,
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
        streamed: Whether x may be streamed. Where it may not, since tokens become something else in shared memory, or cannot,
            since they are added up, the cut is what comes nearest to the measured one.
        behind: Whether the product stands right behind a launch that x comes from: what was measured so, or else what is
            fastest by itself, with a multiprocessor for each CTA (:func:`lq_kernels.cuda.decode_cuts.alone`).
    """
    sizes = (m, blocks, k, bits, scales, sm_count)
    activation = Q8_1 if behind else ""
    weight = Weight(bits, scales.groups, scales.zero, scales.bytes, activation, blocks * BLOCK_ROWS, k)
    found = tuple(measurements("decode_a16", m, weight, device, sm_count))
    chosen: Choice[DecodeConfig] | None
    if behind and not found:
        chosen = choice(*sizes, device, streamed=streamed)
        return chosen and replace(chosen, config=alone(chosen.config, m, sm_count))

    def able(configs: Iterable[DecodeConfig]) -> list[DecodeConfig]:
        return [config for config in configs if streamed or not config.streamed]

    def time(config: DecodeConfig) -> float:
        return cost(config, m, blocks, k, bits, sm_count)

    measured = able(config for each in found for config in candidates(*sizes, dict(each.point.cut), behind=behind))
    kept = () if measured else _kept([dict(each.point.cut) for each in found], *sizes)
    chosen = Choice(min(kept, key=time), found[0]) if kept else None
    chosen = chosen or choose(measured or able(candidates(*sizes)), time, SAME, found)
    if chosen is None or chosen.measured is None:
        return chosen
    # As much room as when it was measured: where fewer tokens let another CTA fit, the scheduler gives some multiprocessors
    # three and others one, which takes up to 30% longer.
    shared = min(dict(chosen.measured.point.cut).get("shared", 0), SHARED[1])
    return replace(chosen, config=replace(chosen.config, shared=max(chosen.config.shared, shared)))


def _kept(
    cuts: Iterable[Mapping[str, int]], m: int, blocks: int, k: int, bits: int, scales: Scales, sm_count: int
) -> list[DecodeConfig]:
    """Return the cuts that keep x and are otherwise like the first measured one that has any, with fewer stages if need be."""
    sizes = (m, blocks, k, bits, scales, sm_count)
    most = ((cut, min(cut.get("stages", 0), MAX_STAGES)) for cut in cuts)  # a file may hold any number
    twins = ({**cut, "streamed": 0, "stages": each} for cut, stages in most for each in range(stages, 0, -1))
    return next(filter(None, (list(candidates(*sizes, twin)) for twin in twins)), [])


def choice_of(problem: Problem) -> Choice[DecodeConfig] | None:
    """Return the cut of a problem, or None if the tokens do not fit shared memory or the grid."""
    bits, symmetric = problem.spec.bits, problem.spec.symmetric
    variant = Variant.of(problem.dtype, problem.spec.scale_dtype, bits, problem.group_size, problem.k, not symmetric)
    behind = problem.activation == Q8_1
    return _choice(problem.m, -(-problem.n // BLOCK_ROWS), problem.k, variant, problem.arch, behind=behind)


def _choice(
    m: int, blocks: int, k: int, variant: Variant, arch: Arch, *, streamed: bool = True, behind: bool = False
) -> Choice[DecodeConfig] | None:
    sizes = (m, blocks, k, variant.bits, variant.scales, arch.sm_count, arch.name)
    return choice(*sizes, streamed=streamed, behind=behind)


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


def why_not_q8_1(k: int) -> str | None:
    """Return why the kernel cannot read tokens of ``k`` in features as Q8_1 blocks, or None."""
    if k % FRAGMENT_INT4.step:
        return f"bulk copies of Q8_1 blocks start and end at multiples of 16 bytes: needs K divisible by 128, got {k}"
    return None


def linear_q8_1(
    blocks: Tensor, packed: Tensor, scale: Tensor, out_features: int, config: DecodeConfig | None = None
) -> Tensor:
    """Return ``w @ x.T``, ``(out_features, M) float32``, of an int4 weight in groups of 32 and tokens in Q8_1 blocks.

    To the bit what :func:`linear` makes of ``dequantize_q8_1(blocks)`` with the same cut: blocks become bf16 in shared
    memory.

    Args:
        blocks: ``(M, K // 32, 36) uint8``, contiguous, not empty; :func:`why_not_q8_1` says which K.
        packed: As for :func:`linear`, and so are the others.
        scale: Arranged alike.
        out_features: Rows of the weight.
        config: How to cut, for tuning, without ``streamed``; by default :func:`choice`.

    Raises:
        ShapeError: If K is none that it takes, or the tokens do not fit shared memory or the grid.
    """
    m, k = blocks.shape[0], blocks.shape[1] * _Q8_1_BLOCK
    if (reason := why_not_q8_1(k)) is not None:
        raise ShapeError(f"{reason}; make bf16 of them first (dequantize_q8_1)")
    if blocks.data_ptr() % 16:
        blocks = blocks.clone()
    variant = Variant.of(torch.bfloat16, scale.dtype, 4, _Q8_1_BLOCK, k, False)
    sizes = (blocks.get_device(), m, out_features, k, packed.shape[1], _Q8_1_BLOCK)
    launch = _prepare(*sizes, variant, config, "transposed", Q8_1_DEFINES)
    y = blocks.new_empty((out_features, m), dtype=torch.float32)
    launch(blocks.data_ptr(), packed.data_ptr(), scale.data_ptr(), 0, 0, 0, y.data_ptr())
    return y


def linear_rounding(
    x: Tensor, packed: Tensor, scale: Tensor, out_features: int, config: DecodeConfig | None = None
) -> Tensor:
    """Return :func:`linear_q8_1` of what x is in Q8_1 blocks, in one launch; with the same cut to the same bits.

    Args:
        x: ``(M, K)`` bf16 or fp16, not empty, K a multiple of 32.
        packed: As for :func:`linear`, and so are the others.
        scale: Arranged alike.
        out_features: Rows of the weight.
        config: How to cut, for tuning, without ``streamed``; by default :func:`choice`.

    Raises:
        ShapeError: If the tokens do not fit shared memory or the grid.
    """
    m, k = x.shape
    if x.stride() != (k, 1) or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    variant = Variant.of(torch.bfloat16, scale.dtype, 4, _Q8_1_BLOCK, k, False)
    tail = ROUNDED_DEFINES[x.dtype]
    sizes = (x.get_device(), m, out_features, k, packed.shape[1], _Q8_1_BLOCK)
    launch = _prepare(*sizes, variant, config, "transposed", tail, quantized=False)
    y = x.new_empty((out_features, m), dtype=torch.float32)
    launch(x.data_ptr(), packed.data_ptr(), scale.data_ptr(), 0, 0, 0, y.data_ptr())
    return y


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
    quantized: bool = True,
) -> Launch:
    # Tokens come from a quantizer of theirs, if not to this kernel; what becomes something else in it stays where it is.
    behind = epilogue == "transposed" and quantized
    if config is None:
        arch = _arch(index)
        chosen = _choice(m, blocks, k, variant, arch, streamed=not tokens, behind=behind and not tokens)
        if chosen is not None:
            config = alone(chosen.config, m, arch.sm_count) if behind and tokens else chosen.config
    if config is None:
        raise ShapeError(f"M={m} tokens with K={k} do not fit decode_a16; let lq choose the kernel")
    if tokens and config.streamed:
        raise ShapeError(
            f"{tokens[0]}: tokens that become something else stay in shared memory; pass a config that is not streamed"
        )
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


def _arch(index: int) -> Arch:
    return Arch.of(torch.device("cuda", index))
