"""How the decode kernel cuts a product: every cut that makes sense, and a model of the time it takes.

What a cut means to the kernel, the header of ``src/decode_a16.cu`` says.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from lq_formats.layouts.fragment import BLOCK_BYTES, BLOCK_ROWS

from lq_kernels.cuda.variant import Scales

SHARED = {1: 232448, 2: 115712, 3: 76800}
"""Bytes of shared memory that each of so many CTAs of an SM can have."""
SAME = ("token_tiles", "warp_blocks", "ctas", "cluster", "clusters", "stages")
"""Fields of a cut from which the others follow."""
_WARPS = 8
_HEADER = 512
_MAX_STAGES = 16
_MAX_GRID_Y = 65535
_PLACE = 0.7
"""Part of the time of a block and K step that a slot without a block takes as well (:func:`_slots`)."""
_PASS = 18.0
"""Time of a pass beside that. Slots follow from a cut's other fields: with other values measured times would not hold."""


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

    def shares(self, blocks: int) -> tuple[int, int, int]:
        """Return the blocks of a cluster, how many clusters have one more, and what the last pass of both has.

        The last are logarithms of slots, 256 times that of clusters with a block more.
        """
        few, more = divmod(blocks, self.clusters)

        def last_pass(rows: int) -> int:
            return _last_slots((rows - 1) % self.slots + 1, self.warp_blocks).bit_length() - 1 if rows else 0

        return few, more, last_pass(few) | last_pass(few + 1) << 8


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


@functools.lru_cache(maxsize=1024)
def _passes(rows: int, slots: int, warp_blocks: int) -> tuple[int, int]:
    """Return how many passes there are and the slots of all: the last has no more than the next power of two."""
    full = (rows - 1) // slots
    return full + 1, full * slots + _last_slots(rows - full * slots, warp_blocks)


def _last_slots(rows: int, warp_blocks: int) -> int:
    return max(warp_blocks, 1 << (rows - 1).bit_length())


@functools.lru_cache(maxsize=1024)
def _slots(rows: int, share: int, warp_blocks: int) -> int:
    """Return the slots of a pass with which a CTA is done first, by the model: few stay empty, and passes are few."""

    def time(slots: int) -> float:
        passes, places = _passes(rows, slots, warp_blocks)
        return _PLACE * places * share + _PASS * passes

    return min((warp_blocks * slots for slots in (1, 2, 4, 8)), key=time)


@functools.lru_cache(maxsize=1024)
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
        alike: Fields by name; only cuts that have those of ``SAME`` are yielded, and none that takes more room than it
            needs. None for all.
    """
    sums, stage = sum_bytes(scales), _stage_bytes(scales.bytes)
    only = None if alike is None else tuple(alike.get(name, -1) for name in SAME)
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
                    largest = cut(*sizes, SHARED[per_sm], sums, most_stages)
                    if largest is None:
                        continue
                    for stages in (largest.stages, *range(largest.stages - 1, 1, -1)):
                        if only and stages != only[5]:
                            continue
                        size = largest.shared - (largest.stages - stages) * stage
                        found = replace(largest, stages=stages, shared=size)
                        yield found
                        if not only and (filling := _filling(found, per_sm)) is not found:
                            yield filling


def _filling(config: DecodeConfig, per_sm: int) -> DecodeConfig:
    """Return the cut, with so much shared memory that no more than ``per_sm`` of its CTAs fit a multiprocessor."""
    least = SHARED[per_sm + 1] + 1024
    return config if config.shared >= least else replace(config, shared=least)


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
    room = min(next((ctas for ctas in (3, 2) if config.shared <= SHARED[ctas]), 1), max(2, config.ctas))
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


def sum_bytes(scales: Scales) -> int:
    """Return the bytes of the sums that zeros multiply, of a token and K step; the kernel keeps them beside x."""
    return 4 * max(scales.groups, 1) if scales.sums else 0


def alone(config: DecodeConfig, m: int, sm_count: int) -> DecodeConfig:
    """Return the cut with so much shared memory that no two CTAs share a multiprocessor, where each can have its own.

    For a launch right behind a small kernel, which it starts beside: the scheduler would put two CTAs on some multiprocessors
    and none on others. 2 tokens in Q8_1 times 4096 x 14336 took 16.0 us, 1 token 11.2 us (H200).
    """
    clusters = config.clusters * -(-m // (8 * config.token_tiles))
    if clusters > _clusters(sm_count, config.cluster):
        return config
    return _filling(config, 1)
