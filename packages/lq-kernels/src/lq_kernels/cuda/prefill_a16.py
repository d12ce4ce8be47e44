"""Launch ``src/prefill_a16.cu``: many tokens times an int4 or int8 weight in fragment order, on Hopper."""

import functools
from typing import NamedTuple

import torch
from lq_formats import ShapeError
from lq_formats.layouts.fragment import BLOCK_ROWS
from torch import Tensor

from lq_kernels.cuda.prefill_cuts import CLOCKS_A_US, SAME, PrefillConfig, candidates, cost, prefill_config, ring_of
from lq_kernels.cuda.variant import EPILOGUES, Variant
from lq_kernels.cuda.work import divisor, in_measured_order, work
from lq_kernels.jit.launcher import Launch
from lq_kernels.jit.tensor_map import tensor_map
from lq_kernels.jit.workspace import workspace
from lq_kernels.problem import Arch, Problem
from lq_kernels.tuned.lookup import Choice, choose, measurements
from lq_kernels.tuned.table import Q8_1, Weight

_SECTIONS = 16
"""Of a tile of more than 128 tokens that is shared, at most, each with a counter of the parts that have come."""


@functools.lru_cache(maxsize=4096)
def choice(
    m: int,
    n: int,
    k: int,
    bits: int,
    groups: int,
    zero: bool,
    scale_bytes: int,
    sm_count: int,
    device: str,
    *,
    behind: bool = False,
) -> Choice[PrefillConfig]:
    """Return the cut that was measured to be fastest on ``device``, or is by the model.

    Args:
        m: Tokens.
        n: Out features.
        k: In features.
        bits: As the other fields of :class:`Variant` that follow.
        groups: Groups in 128 in features.
        zero: Whether there are zero points.
        scale_bytes: Bytes of scales and zeros beside the codes of a block and K step.
        sm_count: Multiprocessors.
        device: Name of the GPU, for the tables; empty for the model.
        behind: Whether the product stands right behind a launch that x comes from: what was measured so comes first.

    Raises:
        ShapeError: If there are too many tiles to count.
    """
    cuts = candidates(m, n, k, bits, scale_bytes, sm_count)
    rows = -(-n // BLOCK_ROWS) * BLOCK_ROWS
    found = [
        each
        for activation in ((Q8_1, "") if behind else ("",))
        for each in measurements(
            "prefill_a16", m, Weight(bits, groups, zero, scale_bytes, activation, rows, k), device, sm_count
        )
    ]
    chosen = choose(cuts, lambda config: cost(config, m, n, k, bits, sm_count), SAME, found)
    assert chosen is not None, "tiles of 16 tokens fit any size"
    return in_measured_order(chosen, chosen.config.tiles(m, n)[0])


def choice_of(problem: Problem) -> Choice[PrefillConfig]:
    """Return the cut of a problem."""
    spec = problem.spec
    variant = Variant.of(problem.dtype, spec.scale_dtype, spec.bits, problem.group_size, problem.k, not spec.symmetric)
    return _choice(problem.m, problem.n, problem.k, variant, problem.arch, behind=problem.activation == Q8_1)


def _choice(m: int, n: int, k: int, variant: Variant, arch: Arch, *, behind: bool = False) -> Choice[PrefillConfig]:
    scales = (variant.groups, variant.zero, variant.scale_bytes)
    return choice(m, n, k, variant.bits, *scales, max(arch.sm_count, 1), arch.name, behind=behind)


def predict_us(problem: Problem) -> float:
    """Return the microseconds that the model gives the cut it would choose, on an H200's clock."""
    spec, sm_count = problem.spec, max(problem.arch.sm_count, 1)
    variant = Variant.of(problem.dtype, spec.scale_dtype, spec.bits, problem.group_size, problem.k, not spec.symmetric)
    sizes = (problem.m, problem.n, problem.k, spec.bits)
    return cost(prefill_config(*sizes, variant.scale_bytes, sm_count), *sizes, sm_count) / CLOCKS_A_US


def linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    bits: int,
    config: PrefillConfig | None = None,
    transposed: bool = False,
    residual: Tensor | None = None,
    gated: bool = False,
    minimum: bool = False,
) -> Tensor:
    """Return ``x (M, K) @ w.T + bias``, ``(M, out_features)`` in x's dtype; bitwise reproducible.

    A group's scale and zero are rounded to x's dtype; one scale a row is not, nor that of groups whose sums are scaled
    (:meth:`PrefillConfig.scales_sums`).

    Args:
        x: ``(M, K)`` bf16 or fp16, K a multiple of 8.
        packed: The weight in fragment order (:class:`lq_formats.layouts.FragmentLayout`).
        scale: Arranged alike (``scale_shape`` of the layout).
        zero: As ``scale``, in its dtype; None for symmetric weights. 4 bits only.
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
        ShapeError: If there are too many tiles for one launch, or ``config`` cuts a K of too few steps.
    """
    m, k = x.shape
    epilogue = "transposed" if transposed else "silu_mul" if gated else "residual" if residual is not None else "none"
    if x.stride(1) != 1 or x.stride(0) < k or x.stride(0) % 8 or x.data_ptr() % 16:  # what a tensor map takes
        x = x.clone(memory_format=torch.contiguous_format)
    plan = _prepare(
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
    partials = arrivals = 0
    if plan.counters:
        space = workspace(x.device, plan.partials, plan.counters)
        partials, arrivals = space.partials.data_ptr(), space.counters.data_ptr()
    x_map = tensor_map(x, min(plan.share, m), 64)
    maps = (x_map,) * len(plan.boxes)  # of nothing, where the kernel does not look at them
    if maps and out_features % 8 == 0 and (residual is None or residual.data_ptr() % 16 == 0):
        leaving = (y,) if residual is None else (y, residual.as_strided(y.shape, y.stride()))
        maps = tuple(tensor_map(matrix, box, 64) for matrix, box in zip(leaving, plan.boxes, strict=True))
    plan.launch(
        x_map,
        tensor_map(x, plan.tail, 64) if plan.tail < plan.share < m else x_map,
        packed.data_ptr(),
        scale.data_ptr(),
        0 if zero is None else zero.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        y.data_ptr(),
        partials,
        arrivals,
        *maps,
    )
    return y


class _Plan(NamedTuple):
    """A launch, the tokens that a CTA loads of a tile and of the last, the workspace, and tokens of maps of results."""

    launch: Launch
    share: int
    tail: int
    partials: int
    counters: int
    boxes: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def _prepare(
    index: int,
    m: int,
    n: int,
    k: int,
    blocks: int,
    group_size: int,
    variant: Variant,
    config: PrefillConfig | None,
    epilogue: str,
) -> _Plan:
    rows = 2 * n if epilogue == "silu_mul" else n
    behind = epilogue == "transposed"  # tokens come from a quantizer of theirs
    config = config or _choice(m, rows, k, variant, Arch.of(torch.device("cuda", index)), behind=behind).config
    if config.split and not config.halved and config.steps(k, variant.bits) < 2 * config.parts:
        step = 128 if config.wide else 512 // variant.bits
        raise ShapeError(f"K={k}: a pair shares two steps of {step} or more; pass another config")
    steps, halves = config.steps(k, variant.bits), 2 * config.parts  # of K, a CTA each
    if config.halved and (config.workers != halves * config.shared_tiles or steps % halves):
        raise ShapeError(
            f"K={k}: halved tiles have an even number of workers each, and as many steps or a multiple of that; these are "
            f"{config.workers} workers of {config.shared_tiles} tiles and {steps} steps; pass another config"
        )
    if config.runs > steps:
        raise ShapeError(f"K={k}: {config.runs} runs are more than there are steps; pass another config")
    stages, shared = ring_of(config, variant.bits, variant.scale_bytes, m)
    # As the source has it, by a macro.
    aside = config.aside(variant.bits) and epilogue != "transposed" and not (config.runs > 1 and epilogue == "residual")
    boxes = ((min(config.out_tokens, m),) + (min(config.tokens, m),) * (epilogue == "residual")) if aside else ()
    maps = len(boxes)
    tiles = config.tiles(m, BLOCK_ROWS * blocks)
    shares = work(*tiles, steps, config.raster, config.shared_tiles, config.workers)
    steps_of_group = max(1, group_size // (512 // variant.bits))
    launch = Launch(
        index,
        "prefill_a16",
        "prefill_a16",
        (config.ctas * config.pair, 1, 1),
        config.threads,
        shared,
        10 + maps,
        (m, n, k, blocks, divisor(steps_of_group), stages, *shares, steps_of_group),
        cluster=config.pair if config.pair > 1 else 0,
        dependent=True,
        defines=(*config.macros(variant), *EPILOGUES[epilogue]),
    )
    share = config.tokens // config.sharers
    partials = 2 * config.workers * config.sharers * config.tokens * config.rows
    counters = (
        config.shared_tiles * config.pair * (2 if config.halved else 1) * (_SECTIONS if config.tokens > 128 else 1)
    )
    if config.halved and config.parts == 1:  # nothing is left in the workspace
        partials = counters = 0
    return _Plan(launch, share, (m - 1) % share + 1, partials, counters, boxes)
