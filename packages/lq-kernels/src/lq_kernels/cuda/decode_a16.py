"""Launch ``src/decode_a16.cu``: a few tokens times an int4 or int8 weight in fragment order, on Hopper.

Tokens are bf16 or fp16, or Q8_1 blocks, which the kernel makes bf16 of itself.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from lq_formats import ShapeError
from lq_formats.layouts import FRAGMENT_INT4
from lq_formats.layouts.fragment import BLOCK_BYTES, BLOCK_ROWS
from torch import Tensor

from lq_kernels.cuda.variant import EPILOGUES, Scales, Variant
from lq_kernels.jit.launcher import Launch
from lq_kernels.problem import Arch, Problem
from lq_kernels.tuned.lookup import Choice, choose, measurements
from lq_kernels.tuned.table import Weight

THREADS = 320
_WARPS = 8
_HEADER = 512
_MAX_STAGES = 16
_SHARED = {1: 232448, 2: 115712, 3: 76800}
"""Bytes of shared memory that each of so many CTAs of an SM can have."""
_MAX_GRID_Y = 65535
_PLACE = 0.7
"""Part of the time of a block and K step that a slot without a block takes as well (:func:`_slots`)."""
_PASS = 18.0
"""Time of a pass beside that. Slots follow from a cut's other fields: with other values measured times would not hold."""
Q8_1_DEFINES = ("LQ_TOKENS_Q8_1=1",)
"""``NAME=VALUE`` of the macro with which tokens are Q8_1 blocks."""
_Q8_1_BLOCK = 32
_SAME = ("token_tiles", "warp_blocks", "ctas", "cluster", "clusters", "stages")
"""Fields of a cut from which the others follow."""


class Form(NamedTuple):
    """What a cut compiles, beside the weight's variant.

    Attributes:
        token_tiles: Tiles of 8 tokens in a CTA: 1, 2 or 4.
        warp_blocks: Blocks of 16 rows that a warp multiplies with what it reads of the tokens: 1 or 2.
        ctas: CTAs of an SM that registers must do for.
    """

    token_tiles: int
    warp_blocks: int
    ctas: int

    @property
    def defines(self) -> tuple[str, ...]:
        """``NAME=VALUE`` of the macros."""
        return (f"LQ_TILES={self.token_tiles}", f"LQ_WARP_BLOCKS={self.warp_blocks}", f"LQ_CTAS={self.ctas}")


@dataclass(frozen=True)
class DecodeConfig:
    """How a product is cut.

    Attributes:
        token_tiles: As :class:`Form` has it, and so are the next two.
        warp_blocks: Blocks of a warp.
        ctas: CTAs of an SM.
        slots: Blocks of 16 rows in a pass: a power of two, from 1 or 2 to 8 or 16.
        cluster: CTAs that share K.
        clusters: Clusters in the grid.
        stages: Stages of 16 KB in the ring.
        boxes: Buffers for sums that travel between CTAs: 1 where every cluster has one pass, else 2.
        pitch: Bytes from token to token in shared memory.
        shared: Bytes of shared memory.
    """

    token_tiles: int
    warp_blocks: int
    ctas: int
    slots: int
    cluster: int
    clusters: int
    stages: int
    boxes: int
    pitch: int
    shared: int

    @property
    def defines(self) -> tuple[str, ...]:
        """``NAME=VALUE`` of the macros that the cut sets."""
        return Form(self.token_tiles, self.warp_blocks, self.ctas).defines


def forms(scales: Scales) -> tuple[Form, ...]:
    """Return what is compiled for a weight.

    Nothing in a form spills. Two blocks of a warp are compiled for one CTA of an SM, which may have more registers, and for
    two.

    Args:
        scales: Of the variant.
    """
    groups, zero, sums, scale_bytes = scales
    few = groups <= 1 and not sums and scale_bytes <= (4 if zero else 2) * BLOCK_ROWS  # registers for a group's scales
    many = groups == 4 and sums
    found = [Form(1, 1, 3 if few else 2), Form(1, 2, 1), Form(2, 1, 1 if many else 2)]
    if scale_bytes <= 16 * BLOCK_ROWS:
        found.append(Form(1, 2, 2))
    if not many:
        found.append(Form(2, 2, 1))
    if groups < 4:
        found.append(Form(4, 1, 1))
    return tuple(found)


def cut(
    m: int,
    blocks: int,
    k: int,
    bits: int,
    scale_bytes: int,
    form: Form,
    cluster: int,
    clusters: int,
    shared: int,
    sum_bytes: int = 0,
    most_stages: int = _MAX_STAGES,
) -> DecodeConfig | None:
    """Return the configuration of these choices, or None if it does not fit ``shared`` bytes."""
    token_tiles, warp_blocks, ctas = form
    step = 512 // bits
    steps = -(-k // step)
    if cluster > steps or clusters > blocks:
        return None
    share, rows = -(-steps // cluster), -(-blocks // clusters)
    most = 8 * warp_blocks
    slots = _slots(rows, share, warp_blocks)
    passes, _ = _passes(rows, slots, warp_blocks)
    pitch = share * step * 2 + 16
    boxes = min(passes, 2)
    buffers = boxes * (1 if token_tiles * warp_blocks <= 2 else 2)
    row = 8 * token_tiles + (4 if token_tiles == 2 and warp_blocks == 1 else 2)
    fixed = _HEADER + buffers * 16 * most * row * 4 + min(m, 8 * token_tiles) * pitch
    fixed += share * sum_bytes * 8 * token_tiles
    wanted = _stage_count(rows, share, slots, warp_blocks)
    stage = _stage_bytes(scale_bytes)
    stages = min(most_stages, wanted, (shared - fixed) // stage)
    if stages < min(wanted, 2):
        return None
    size = fixed + stages * stage
    return DecodeConfig(token_tiles, warp_blocks, ctas, slots, cluster, clusters, stages, boxes, pitch, size)


def _passes(rows: int, slots: int, warp_blocks: int) -> tuple[int, int]:
    """Return how many passes there are and the slots of all: the last has no more than the next power of two."""
    full = (rows - 1) // slots
    return full + 1, full * slots + _last_slots(rows - full * slots, warp_blocks)


def _last_slots(rows: int, warp_blocks: int) -> int:
    return max(warp_blocks, 1 << (rows - 1).bit_length())


def _slots(rows: int, share: int, warp_blocks: int) -> int:
    """Return the slots of a pass with which a CTA is done first, by the model: few stay empty, and passes are few."""

    def time(slots: int) -> float:
        passes, places = _passes(rows, slots, warp_blocks)
        return _PLACE * places * share + _PASS * passes

    return min((warp_blocks * slots for slots in (1, 2, 4, 8)), key=time)


def _stage_count(rows: int, share: int, slots: int, warp_blocks: int) -> int:
    """Return how many stages a CTA fills in all."""
    full = (rows - 1) // slots
    last = _last_slots(rows - full * slots, warp_blocks)
    return sum(count * -(-share * each // (2 * _WARPS)) for count, each in ((full, slots), (1, last)))


def _stage_bytes(scale_bytes: int) -> int:
    return 2 * _WARPS * (BLOCK_BYTES + scale_bytes)


def candidates(
    m: int,
    blocks: int,
    k: int,
    bits: int,
    scales: Scales,
    sm_count: int,
    alike: Mapping[str, int] | None = None,
) -> Iterator[DecodeConfig]:
    """Yield every cut that makes sense; none, if the tokens do not fit shared memory or the grid.

    Of a cut that leaves room for more CTAs on a multiprocessor than it has, there is another that takes this room: those of the
    next kernel would come early, and some multiprocessors would have two of them and others none.

    Args:
        m: Tokens.
        blocks: Blocks of 16 rows.
        k: In features.
        bits: 4 or 8.
        scales: Of the variant.
        sm_count: Multiprocessors.
        alike: Fields by name; only cuts that have those of ``_SAME`` are yielded, and none that takes more room than it
            needs. None for all.
    """
    sums, stage = sum_bytes(scales), _stage_bytes(scales.bytes)
    only = None if alike is None else tuple(alike.get(name, -1) for name in _SAME)
    most_tiles = next((tiles for tiles in (1, 2, 4) if m <= 8 * tiles), 4)
    for form in forms(scales):
        token_tiles, warp_blocks, ctas = form
        if token_tiles > most_tiles or -(-m // (8 * token_tiles)) > _MAX_GRID_Y or (only and form != only[:3]):
            continue
        most_stages = _stages(token_tiles, bits) + 1  # the next kernel fills its own ring in what this one leaves
        for per_sm in (2, 1) if warp_blocks == 1 else (ctas,):
            for cluster in (1, 2, 4, 8):
                once = _clusters(sm_count, cluster)
                if once < 1 or per_sm > ctas or (per_sm == 2 and blocks <= once):
                    continue  # too few multiprocessors for the cluster; a CTA for each of them at most
                for clusters in _grids(blocks, once * per_sm):
                    if only and (cluster, clusters) != only[3:5]:
                        continue
                    sizes = (m, blocks, k, bits, scales.bytes, form, cluster, clusters)
                    largest = cut(*sizes, _SHARED[per_sm], sums, most_stages)
                    if largest is None:
                        continue
                    for stages in (largest.stages, *range(largest.stages - 1, 1, -1)):
                        size = largest.shared - (largest.stages - stages) * stage
                        found = replace(largest, stages=stages, shared=size)
                        if not only:
                            yield from dict.fromkeys((found, _filling(found, per_sm)))
                        elif stages == only[5]:
                            yield found


def _filling(config: DecodeConfig, per_sm: int) -> DecodeConfig:
    """Return the cut with so much shared memory that no more than ``per_sm`` of its CTAs fit a multiprocessor."""
    return replace(config, shared=max(config.shared, _SHARED[per_sm + 1] + 1024))


def _grids(blocks: int, at_once: int) -> tuple[int, ...]:
    """Return numbers of clusters: all that run at once, and as few of them as take as long and leave no slot empty."""
    most = min(blocks, at_once)
    rows = -(-blocks // most)
    full = next((slots for slots in (1, 2, 4) if rows <= slots), -(-rows // 8) * 8)
    fewer = -(-blocks // full)
    return (most, fewer) if most > fewer >= 0.8 * at_once else (most,)


def _clusters(sm_count: int, cluster: int) -> int:
    """Return how many clusters run at once with a CTA a multiprocessor: 66, 30 and 15 of 2, 4 and 8 on an H200."""
    return sm_count // cluster if cluster <= 2 else (sm_count - 12) // cluster


def _stages(token_tiles: int, bits: int) -> int:
    """Return how many stages are enough, for a CTA that shares its multiprocessor with another one."""
    return 3 if token_tiles > 1 else 4 if bits == 4 else 5


def cost(config: DecodeConfig, m: int, blocks: int, k: int, bits: int, sm_count: int) -> float:
    """Return a time in microseconds (H200), less what every cut of a product takes.

    Fitted to 5364 cuts of 29 products (21 of int4 in groups of 128, 8 of int8) with 1 to 32 tokens, weights not in a cache,
    launch behind launch. Its first choice takes 2.2% longer than the fastest timed, on average of the 232, and 18% at
    worst, on products that were left out of the fit as well; the best of its first 8 0.1%, 4% at worst. Scales' bytes are
    not in it: int4 in other groups, and with zeros, was not timed.

    What takes time, in the order of the sum:

    - Blocks and K steps of the multiprocessor with most CTAs: 5.2 ns, and 2.9 ns a tile of tokens for 128 in features. Where
      more CTAs fit than run, those of the next kernel come early and take places unevenly: as if there were 0.53 CTAs more for
      each, or 1.5 where the grid leaves multiprocessors free. So a cut that takes more shared memory may be faster.
    - Stages of a CTA, which a warp goes through one by one even if slots are empty: 180 ns for steps of 128 in features.
    - Stages that wait for room in the ring: 570 ns for each time around.
    - Passes: 430 ns for each CTA of a multiprocessor and 230 ns for 8 tokens whose sums are sent, 310 ns more where warps have
      two blocks.
    - x from L2: 26 ns a KB for each CTA of a multiprocessor, less in larger tiles.
    - Stages that the next kernel cannot fill meanwhile, because its CTAs do not fit beside: 240 ns.
    - A tile of tokens: 270 ns. Clusters of 8 that share multiprocessors, which may not spread evenly: 400 ns.
    """
    tokens = -(-m // (8 * config.token_tiles))
    steps = -(-k // (512 // bits))
    share = -(-steps // config.cluster)
    rows = -(-blocks // config.clusters)
    passes, _ = _passes(rows, config.slots, config.warp_blocks)
    needed = _stage_count(rows, share, config.slots, config.warp_blocks)
    here = min(m, 8 * config.token_tiles)
    tiles = here / 8
    features = 4 / bits  # of a step, in 128

    per_sm = -(-config.clusters * tokens // max(1, _clusters(sm_count, config.cluster)))
    load = config.cluster * config.clusters * tokens / sm_count  # the average, of which per_sm is the most
    # Of what is compiled for one CTA of a multiprocessor registers do for two.
    room = min(next((ctas for ctas in (3, 2) if config.shared <= _SHARED[ctas]), 1), max(2, config.ctas))
    at_once = min(per_sm, config.ctas, room)
    more = 0.0 if room <= per_sm else 1.5 if load < per_sm else 0.53 * per_sm
    beside = min(1.0, (room - at_once) / at_once)  # part of the next kernel's CTAs that find room
    rounds = -(-per_sm // min(config.ctas, room))

    return (
        (per_sm + more) * rows * share * (0.0052 + 0.0029 * config.token_tiles * features)
        + rounds * (0.18 * needed * features + 0.57 * max(0, needed - config.stages) / config.stages)
        + passes * (0.43 * load + (0.23 + 0.31 * (config.warp_blocks - 1)) * tiles)
        + 0.026 * here * share * features / 4 * load / math.sqrt(config.token_tiles)
        + 0.24 * (1 - beside) * min(needed, config.stages) * min(load, config.ctas, room)
        + 0.27 * config.token_tiles
        + (0.4 if config.cluster == 8 and per_sm > 1 else 0.0)
    )


@functools.lru_cache(maxsize=4096)
def choice(
    m: int, blocks: int, k: int, bits: int, scales: Scales, sm_count: int, device: str
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
    """
    sizes = (m, blocks, k, bits, scales, sm_count)
    weight = Weight(bits, scales.groups, scales.zero, scales.bytes, "", blocks * BLOCK_ROWS, k)
    found = tuple(measurements("decode_a16", m, weight, device, sm_count))
    measured = [config for each in found for config in candidates(*sizes, dict(each.point.cut))]
    chosen = choose(
        measured or candidates(*sizes), lambda config: cost(config, m, blocks, k, bits, sm_count), _SAME, found
    )
    if chosen is None or chosen.measured is None:
        return chosen
    # As much room as when it was measured: where fewer tokens let another CTA fit, the scheduler gives some multiprocessors
    # three and others one, which takes up to 30% longer.
    shared = min(dict(chosen.measured.point.cut).get("shared", 0), _SHARED[1])
    return replace(chosen, config=replace(chosen.config, shared=max(chosen.config.shared, shared)))


def sum_bytes(scales: Scales) -> int:
    """Return the bytes of the sums that zeros multiply, of a token and K step; the kernel keeps them beside x."""
    return 4 * max(scales.groups, 1) if scales.sums else 0


def choice_of(problem: Problem) -> Choice[DecodeConfig] | None:
    """Return the cut of a problem, or None if the tokens do not fit shared memory or the grid."""
    bits, symmetric = problem.spec.bits, problem.spec.symmetric
    variant = Variant.of(problem.dtype, problem.spec.scale_dtype, bits, problem.group_size, problem.k, not symmetric)
    return _choice(problem.m, -(-problem.n // BLOCK_ROWS), problem.k, variant, problem.arch)


def _choice(m: int, blocks: int, k: int, variant: Variant, arch: Arch) -> Choice[DecodeConfig] | None:
    return choice(m, blocks, k, variant.bits, variant.scales, arch.sm_count, arch.name)


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

    Args:
        x: ``(M, K)`` bf16 or fp16, K a multiple of 8.
        packed: The weight in fragment order (:class:`lq_formats.layouts.FragmentLayout`).
        scale: ``(groups, rows)``, arranged alike.
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
        scale: ``(groups, rows)``.
        out_features: Rows of the weight.
        config: How to cut, for tuning; by default :func:`choice`.

    Raises:
        ShapeError: If K is none that it takes, or the tokens do not fit shared memory or the grid.
    """
    m, k = blocks.shape[0], blocks.shape[1] * _Q8_1_BLOCK
    if (reason := why_not_q8_1(k)) is not None:
        raise ShapeError(f"{reason}; make bf16 of them first (dequantize_q8_1)")
    if blocks.data_ptr() % 16:
        blocks = blocks.clone()
    variant = Variant.of(torch.bfloat16, scale.dtype, 4, _Q8_1_BLOCK, k, False)
    launch = _prepare(
        blocks.get_device(), m, out_features, k, packed.shape[1], _Q8_1_BLOCK, variant, config, "transposed", True
    )
    y = blocks.new_empty((out_features, m), dtype=torch.float32)
    launch(blocks.data_ptr(), packed.data_ptr(), scale.data_ptr(), 0, 0, 0, y.data_ptr())
    return y


def alone(config: DecodeConfig, m: int, sm_count: int) -> DecodeConfig:
    """Return the cut with so much shared memory that no two CTAs share a multiprocessor, where each can have its own.

    For a launch right behind a small kernel, which it starts beside: the scheduler would put two CTAs on some multiprocessors
    and none on others. 2 tokens in Q8_1 times 4096 x 14336 took 16.0 us, 1 token 11.2 us (H200).
    """
    clusters = config.clusters * -(-m // (8 * config.token_tiles))
    if clusters > _clusters(sm_count, config.cluster):
        return config
    return _filling(config, 1)


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
    q8_1: bool = False,
) -> Launch:
    if config is None and (chosen := _choice(m, blocks, k, variant, _arch(index))):
        config = chosen.config
    if config is None:
        raise ShapeError(f"M={m} tokens with K={k} do not fit decode_a16; let lq choose the kernel")
    if epilogue == "transposed":  # tokens come from a quantizer of theirs
        config = alone(config, m, _arch(index).sm_count)
    return Launch(
        index,
        "decode_a16",
        "decode_a16",
        (config.cluster * config.clusters, -(-m // (8 * config.token_tiles)), 1),
        THREADS,
        config.shared,
        7,
        (m, n, k, blocks, group_size, config.slots, config.stages, config.boxes, config.pitch),
        cluster=config.cluster,
        dependent=True,
        defines=(*variant.defines, *config.defines, *EPILOGUES[epilogue], *(Q8_1_DEFINES if q8_1 else ())),
    )


def _arch(index: int) -> Arch:
    return Arch.of(torch.device("cuda", index))
