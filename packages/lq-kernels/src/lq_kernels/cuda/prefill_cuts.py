"""How the prefill kernel cuts a product: every cut that makes sense, and a model of the time it takes.

What a cut means to the kernel, the header of ``src/prefill_a16.cu`` says.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from lq_formats import ShapeError
from lq_formats.layouts.fragment import BLOCK_BYTES, BLOCK_ROWS

from lq_kernels.cuda.variant import Variant
from lq_kernels.cuda.work import reordered

TOKENS = (16, 32, 64, 96, 128, 192, 256)
"""Tokens of a tile, usually."""
BETWEEN = (112, 176)
"""Tokens of tiles with which all multiprocessors have as many tiles, for some weights: compiled for these alone."""
ROWS = 128
"""Out features of a tile, usually."""
TALL = 192
"""Out features of a tile of three warpgroups, for weights whose rows fill pairs of them."""
MULTICAST_FROM = 64
"""Tokens of a tile from which pairs of CTAs load them for each other, where a weight has rows for two."""
_ASIDE_FROM = {4: 96, 8: 112}
"""Tokens of a tile, by a weight's bits, from which its results may leave beside the next one's products."""
SPLIT_TOKENS = (32, 64, 96, 128)
"""Tokens of a tile whose K a pair of CTAs may share: smaller tiles have too little to add up, larger ones leave no room."""
HALVED_TOKENS = (128, 192, 256)
"""Tokens of a tile that may be halved where it is left over: those that a pair of CTAs shares with others like it."""
RUNS_TOKENS = (64, 96, 128)
"""Tokens of a tile whose K a CTA may multiply in runs: sums are twice in registers, and few tokens share K."""
TEAM_TOKENS = (16, 32)
"""Tokens of a tile whose K steps two teams of warpgroups may take by turns."""
_TEAM_K = 4096
"""In features from which they do. With 2048 what one team hands to the other takes as long as it saves."""
_SHARED = 232448
_BARRIERS = 3 * 16 * 8
_STAGES, _LATER_STAGES = 5, 4
"""Of a ring, at most; the latter where weights are read for more than one tile of 64 tokens or more, so come from L2 mostly.
With more, all multiprocessors ask for so many weights at once that x waits behind them: int4, 16 and 32 tokens, 5.5 and 4% on
average, and up to 10%, that all of shared memory took longer; 64 and 96 tokens 1 to 3% with five stages instead of four, where
K is 2048 or 4096. Weights that come from memory, int8 of 14336x4096 with 64 tokens, took 7% longer with four."""
_TEAM_STAGES = 12
"""... of two teams, which keep twice as many: int4 14336x4096 with 16 tokens took 51% longer than one team with four stages,
1% with six, 5% less with eight, 7% with twelve, 6% with sixteen."""
_MAX_TILES = 1 << 30
_WIDE_TOKENS = 128  # at most, of tiles with steps of 128 in features for int8: more leave room for two stages
_NARROW_K = 2048
"""In features up to which pairs that share K, and tall tiles, take int8 in steps of 64 with 128 tokens. The first products
begin 250 to 1,000 clocks earlier, of 15,000 to 20,000, than with steps twice as large, of which three or four stages have
room: 1 to 4% less for K of 2048, as often more for 4096."""
SAME = ("tokens", "ctas", "shared_tiles", "workers", "multicast", "split", "rows", "wide", "teams")
"""Fields of a cut that a table's must have; the rest is order."""
_TALL_TOKENS = (64, 96, 128)
"""Tokens of tiles of ``TALL`` rows, which fill the last multiprocessors for some weights and are compiled for these alone."""
_TALL_WAVES = 3
"""Tiles a CTA, up to which they make sense."""
_PAYING_TOKENS = 2048
"""Up to which tall tiles, and those between, make sense."""
_TALL_GAIN, _TALL_WHOLE_GAIN, _BETWEEN_GAIN, _HALVED_GAIN, _TEAMS_GAIN = 0.95, 0.98, 0.96, 1.0, 0.986
"""How much of the other tiles' time they may take by the model. Tall tiles whose K no pair shares take less: of int4 3072x2048
with 1024 tokens 7% (21.6 -> 20.0 us), where the model expects 3."""
_TALL_NEAR = 1.03
"""... and of the time of the fastest tall tiles: the model is not sure which of those that are near is faster."""
_BATCHES = (256, 384, 512, 768, 1024, 1536, 2048)
"""Tokens with which tiles between have to pay; with others some would for almost every weight."""
_PRODUCTS = {16: 108, 32: 101, 64: 87, 96: 110, 112: 123, 128: 137, 176: 187, 192: 203, 256: 268}
"""Clocks for 16 in features of 128 rows, by tokens. Fitted, as is the rest of the model, to 2600 cuts (H200), when
rings were larger; 96, 112 and 176 are between what was measured."""
_NARROW, _WIDE = 1.19, 1.04
"""... of int8 with up to 128 tokens to these, in steps of 64 and of 128 in features."""
_SPLIT_PRODUCTS = {32: 1.0, 64: 1.05, 96: 1.07, 128: 1.09, 192: 1.09, 256: 1.09}
"""... of pairs that share K, to these, as each CTA loads its own tokens."""
_TEAM_PRODUCTS, _HAND_OVER, _HAND_OVER_PARTS = 0.9, 900.0, 700.0
"""... of two teams to these, and clocks for what one hands to the other of a tile, and where tiles are shared."""
_L2_BYTES = 4300.0
"""A clock, to all multiprocessors: 128 CTAs that share K take 87 ns for 16 in features of int4 and 102 of int8 (128 tokens)."""
CLOCKS_A_US = 1750.0


@dataclass(frozen=True)
class PrefillConfig:
    """How a product is cut.

    Attributes:
        tokens: Tokens of a tile.
        ctas: CTAs in the grid.
        raster: Row tiles in a band; a band's tiles are taken for all tokens before the next band's.
        shared_tiles: Tiles whose K steps are shared among CTAs.
        workers: CTAs that share them. Where none is shared, and this is not 0: :attr:`runs`.
        multicast: CTAs come in pairs that have neighbouring row tiles and load their tokens for each other. ``ctas``,
            ``raster``, ``shared_tiles`` and ``workers`` then count pairs. With ``split`` too: :attr:`halved`.
        split: CTAs come in pairs that share the K of a tile, or of a part of one, and add up through distributed shared memory.
            ``ctas`` and ``workers`` then count pairs, tokens are one of ``SPLIT_TOKENS``, shared tiles have equally many parts,
            and a part has two K steps at least.
        rows: Out features of a tile, ``ROWS`` or ``TALL``.
        wide: int8 with one scale a row is taken in K steps of 128 in features, not 64; up to 128 tokens, where pairs that share
            K and tall tiles have fewer or K is more than 2048.
        teams: Teams of warpgroups, which take K steps by turns: two, of int4 with ``TEAM_TOKENS``, or one.
        rounded: Weights are rounded, and no sums of groups scaled (:meth:`scales_sums`): tiles of all sizes have the same bits.
    """

    tokens: int
    ctas: int
    raster: int
    shared_tiles: int
    workers: int
    multicast: bool = False
    split: bool = False
    rows: int = ROWS
    wide: bool = False
    teams: int = 1
    rounded: bool = field(default=False, metadata={"tuned": False})

    @property
    def threads(self) -> int:
        """Threads of a CTA: a warpgroup that loads, and one for 64 rows in each team."""
        return 128 + 2 * self.rows * self.teams

    @property
    def sharers(self) -> int:
        """CTAs that have the same tokens."""
        return 2 if self.multicast else 1

    @property
    def runs(self) -> int:
        """Runs of K that a CTA multiplies one after the other, of whole tiles of ``ROWS`` and ``RUNS_TOKENS``.

        K is cut where as many workers for each tile would cut it, and sums are added up as theirs: the bits are the same.
        """
        return 1 if self.shared_tiles else max(self.workers, 1)

    @property
    def halved(self) -> bool:
        """Whether pairs of CTAs take one row tile of two that are shared, and each CTA a half of its K or of a part.

        Tiles of ``HALVED_TOKENS``; a shared tile has twice as many workers as a row tile has parts, and K steps enough for all.
        """
        return self.multicast and self.split

    @property
    def parts(self) -> int:
        """Parts that a shared tile has, or one of its row tiles if they are halved; rounded up."""
        rows = 2 if self.halved else 1
        return -(-self.workers // (self.shared_tiles * rows)) if self.shared_tiles else 1

    @property
    def pair(self) -> int:
        """CTAs of a cluster."""
        return 2 if self.multicast or self.split else 1

    def aside(self, bits: int) -> bool:
        """Return whether results of a whole tile, if the copy engine takes them, leave beside the next one's products."""
        alone = self.split and not self.halved
        return (self.tokens >= _ASIDE_FROM[bits] or self.runs > 1) and self.rows == ROWS and not alone

    @property
    def out_tokens(self) -> int:
        """Tokens of a tile whose results leave at once."""
        if self.tokens > 64 and self.tokens % 64 == 0:
            return 64
        return 32 if self.tokens % 32 == 0 else self.tokens

    def tiles(self, m: int, n: int) -> tuple[int, int]:
        """Return how many row tiles (or pairs) and token tiles there are."""
        return -(-n // (self.rows * self.sharers)), -(-m // self.tokens)

    def steps(self, k: int, bits: int) -> int:
        """Return how many K steps there are."""
        return -(-k // (128 if self.wide else 512 // bits))

    @property
    def defines(self) -> tuple[str, ...]:
        """``NAME=VALUE`` of the macros that the form of a cut is known by."""
        pair = ("LQ_MULTICAST=1",) * self.multicast + ("LQ_SPLIT=1",) * self.split
        rows = () if self.rows == ROWS else (f"LQ_ROWS={self.rows}",)
        runs = ("LQ_RUNS=1",) if self.runs > 1 else ()
        teams = (f"LQ_TEAMS={self.teams}",) if self.teams > 1 else ()
        return (f"LQ_TOKENS={self.tokens}", *pair, *rows, *(("LQ_STEP=128",) if self.wide else ()), *runs, *teams)

    def scales_sums(self, variant: Variant) -> bool:
        """Return whether few tokens have their sums of a group scaled, and no weight is rounded.

        Where a code takes two operations to become a weight (:attr:`Variant.unfused`) one is left then, and a multiplication of
        each sum, of which a thread has half as many as there are tokens, for 64 codes: up to 32 tokens take 2 to 10% less, in
        groups of 64 with 16, or two teams, 1 to 9%. With 64 tokens zeros take up to 2% less where pairs share tokens, 1 to 5%
        more where they share K, and fp16 about the same; 96 and 128 tokens take 1 to 20% more (H200, ``docs/kernel-notes.md``).
        """
        if self.rounded or self.runs > 1 or self.rows != ROWS or not variant.unfused:
            return False
        if variant.groups == 1:
            return self.tokens <= 32 or (self.tokens == 64 and self.multicast and variant.zero)
        return variant.groups == 2 and (self.tokens == 16 or (self.tokens == 32 and self.teams > 1))

    def macros(self, variant: Variant) -> tuple[str, ...]:
        """Return what the kernel is compiled with for a weight: :attr:`defines`, and whether sums are scaled."""
        return (*variant.defines, *self.defines, *(("LQ_SCALED=1",) if self.scales_sums(variant) else ()))


def ring(
    tokens: int,
    bits: int,
    scale_bytes: int,
    split: bool = False,
    rows: int = ROWS,
    wide: bool = False,
    most: int = _STAGES,
    teams: int = 1,
) -> tuple[int, int]:
    """Return the stages of a CTA's ring and the bytes of its shared memory.

    Args:
        tokens: Tokens of a tile.
        bits: 4 or 8.
        scale_bytes: Bytes of scales and zeros beside the codes of a block and K step.
        split: Whether a pair shares K, and sums of half a tile come in from the other CTA.
        rows: Out features of a tile.
        wide: Whether a K step of int8 is 128 in features.
        most: Stages at most.
        teams: Of warpgroups; each of two has the same stages each time around.
    """
    blocks, step = rows // BLOCK_ROWS, 128 if wide else 512 // bits
    stage = tokens * step * 2 + blocks * (BLOCK_BYTES * step * bits // 512 + scale_bytes)
    # Results pass through the buffer for these, with a barrier a warp and one more; or through staging, with a flag and two
    # barriers.
    fixed = tokens // 2 * rows * 4 + 8 * (blocks + 2) if split else rows // 64 * 32 * 144 + 24
    # What one team hands to the other, and two barriers a warp for it.
    fixed += (teams - 1) * (tokens * rows * 4 + 16 * blocks)
    stages = min(most, (_SHARED - fixed - _BARRIERS) // stage)
    stages -= stages % teams
    return stages, fixed + _BARRIERS + stages * stage


def ring_of(config: PrefillConfig, bits: int, scale_bytes: int, m: int = 1) -> tuple[int, int]:
    """Return :func:`ring` of a cut of ``m`` tokens."""
    most = _TEAM_STAGES if config.teams > 1 else _LATER_STAGES if 64 <= config.tokens < m else _STAGES
    return ring(config.tokens, bits, scale_bytes, config.split, config.rows, config.wide, most, config.teams)


def prefill_config(m: int, n: int, k: int, bits: int, scale_bytes: int, sm_count: int) -> PrefillConfig:
    """Return the fastest cut by a model in clocks.

    Args:
        m: Tokens.
        n: Out features.
        k: In features.
        bits: 4 or 8.
        scale_bytes: Bytes of scales and zeros beside the codes of a block and K step.
        sm_count: Multiprocessors.

    Raises:
        ShapeError: If there are too many tiles to count.
    """
    cuts = candidates(m, n, k, bits, scale_bytes, sm_count)
    return min(cuts, key=lambda config: cost(config, m, n, k, bits, sm_count))


def candidates(m: int, n: int, k: int, bits: int, scale_bytes: int, sm_count: int) -> Iterator[PrefillConfig]:
    """Yield every cut that makes sense; arguments and errors are those of :func:`prefill_config`."""
    if -(-n // ROWS) * -(-m // TOKENS[0]) > _MAX_TILES:
        raise ShapeError(f"M={m}, N={n}: too many results for one launch; split the tokens")
    yield from _usual(m, n, k, bits, scale_bytes, sm_count)
    if m <= _PAYING_TOKENS:
        sizes = (n, k, bits, scale_bytes, sm_count)
        paying = _paying(*sizes)
        yield from (
            cut for each in (_tall, _between, _halved, _teams) for cut in each(m, *sizes) if cut.defines in paying
        )


def forms(n: int, k: int, bits: int, scale_bytes: int, sm_count: int) -> tuple[PrefillConfig, ...]:
    """Return a cut of every form (:attr:`PrefillConfig.defines`) that any number of tokens may ask for, the largest first.

    Arguments are those of :func:`prefill_config`.
    """
    # Every size of tile makes sense for as many tokens as it has, and pairs share K where there are few tiles.
    paying = _paying(n, k, bits, scale_bytes, sm_count)
    cuts = {cut.defines: cut for m in TOKENS for cut in _usual(m, n, k, bits, scale_bytes, sm_count)} | dict(paying)
    return tuple(sorted(cuts.values(), key=lambda cut: (cut.tokens * cut.rows, cut.defines), reverse=True))


def _usual(m: int, n: int, k: int, bits: int, scale_bytes: int, sm_count: int) -> Iterator[PrefillConfig]:
    for tokens in TOKENS:
        yield from _of_tokens(tokens, m, n, k, bits, scale_bytes, sm_count)
        if tokens in SPLIT_TOKENS and _makes_sense(tokens, m, bits, scale_bytes):
            form = PrefillConfig(tokens, 0, 0, 0, 0, split=True, wide=_is_wide_pair(tokens, k, bits, scale_bytes))
            yield from _split(m, n, k, form, bits, scale_bytes, sm_count)


def _between(m: int, n: int, k: int, bits: int, scale_bytes: int, sm_count: int) -> Iterator[PrefillConfig]:
    for tokens in BETWEEN:
        yield from _of_tokens(tokens, m, n, k, bits, scale_bytes, sm_count)


def _halved(m: int, n: int, k: int, bits: int, scale_bytes: int, sm_count: int) -> Iterator[PrefillConfig]:
    pairs = sm_count // 2
    if n <= ROWS or not pairs:
        return
    for tokens in HALVED_TOKENS:
        form = PrefillConfig(tokens, 0, 0, 0, 0, True, True, wide=_is_wide(tokens, bits, scale_bytes))
        if not _makes_sense(tokens, m, bits, scale_bytes) or ring_of(form, bits, scale_bytes)[0] < 3:
            continue
        tiles = math.prod(form.tiles(m, n))
        if tiles <= pairs and tokens in SPLIT_TOKENS:  # then pairs may share the K of every tile
            continue
        left, raster = tiles % pairs, _raster(m, n, tokens, 2 * ROWS, bits, pairs)
        for parts in (1, 2, 4):
            workers = 2 * parts * left
            if 0 < workers <= pairs and form.steps(k, bits) % (2 * parts) == 0:
                ctas = max(workers, min(tiles - left, pairs))
                yield replace(form, ctas=ctas, raster=raster, shared_tiles=left, workers=workers)


def _teams(m: int, n: int, k: int, bits: int, scale_bytes: int, sm_count: int) -> Iterator[PrefillConfig]:
    for tokens in TEAM_TOKENS:
        if bits == 4 and m <= 2 * tokens and k >= _TEAM_K:
            for cut in _of_tokens(tokens, m, n, k, bits, scale_bytes, sm_count):
                yield replace(cut, teams=2)


def _of_tokens(
    tokens: int, m: int, n: int, k: int, bits: int, scale_bytes: int, sm_count: int
) -> Iterator[PrefillConfig]:
    if _makes_sense(tokens, m, bits, scale_bytes):
        yield from _cuts(m, n, k, tokens, bits, sm_count, _is_wide(tokens, bits, scale_bytes))


def _makes_sense(tokens: int, m: int, bits: int, scale_bytes: int) -> bool:
    """Return whether tiles are more than half full and leave room for three stages: with two loads do not overlap products."""
    full = tokens <= 16 or 2 * m > tokens
    return full and ring(tokens, bits, scale_bytes, wide=_is_wide(tokens, bits, scale_bytes))[0] >= 3


def _is_wide(tokens: int, bits: int, scale_bytes: int) -> bool:
    return bits == 8 and scale_bytes == 0 and tokens <= _WIDE_TOKENS


def _is_wide_pair(tokens: int, k: int, bits: int, scale_bytes: int) -> bool:
    """Return the same for pairs that share K, and for tall tiles."""
    return _is_wide(tokens, bits, scale_bytes) and (tokens < _WIDE_TOKENS or k > _NARROW_K)


def _split(
    m: int, n: int, k: int, form: PrefillConfig, bits: int, scale_bytes: int, sm_count: int
) -> Iterator[PrefillConfig]:
    tiles, pairs, steps = math.prod(form.tiles(m, n)), sm_count // 2, form.steps(k, bits)
    if steps > 1 and tiles <= 2 * pairs and ring_of(form, bits, scale_bytes)[0] >= 3:
        whole = replace(form, ctas=min(tiles, pairs), raster=_raster(m, n, form.tokens, form.rows, bits, pairs))
        yield whole
        for parts in (2, 3, 4, 6, 8):
            if parts * tiles <= pairs and 2 * parts <= steps:
                yield replace(whole, ctas=parts * tiles, shared_tiles=tiles, workers=parts * tiles)


def orders(config: PrefillConfig, m: int, n: int) -> Iterator[PrefillConfig]:
    """Yield the cut with its tiles in other orders (:func:`lq_kernels.cuda.work.reordered`): up to 5% on an H200.

    Bands of one or two row tiles are among them: neighbouring CTAs then share weights rather than tokens.
    """
    height = config.raster
    return reordered(config, config.tiles(m, n), (1, 2, height // 2, height * 2 // 3, -(-height * 3 // 2), height * 2))


def _tall(m: int, n: int, k: int, bits: int, scale_bytes: int, sm_count: int) -> Iterator[PrefillConfig]:
    pairs = sm_count // 2
    # For whole pairs of tall tiles; there are no registers for scales and zeros of groups of 32.
    if not pairs or n % (2 * TALL) or scale_bytes > 8 * BLOCK_ROWS:
        return
    for tokens in _TALL_TOKENS:
        if 2 * m <= tokens:
            continue
        wide = _is_wide_pair(tokens, k, bits, scale_bytes)
        form = PrefillConfig(tokens, 0, 0, 0, 0, multicast=True, rows=TALL, wide=wide)
        tiles = math.prod(form.tiles(m, n))
        if tiles <= _TALL_WAVES * pairs and ring_of(form, bits, scale_bytes)[0] >= 3:
            yield replace(form, ctas=min(tiles, pairs), raster=_raster(m, n, tokens, 2 * TALL, bits, pairs))
        if tokens in SPLIT_TOKENS:
            yield from _split(m, n, k, replace(form, multicast=False, split=True), bits, scale_bytes, sm_count)


@functools.lru_cache(maxsize=1024)
def _paying(n: int, k: int, bits: int, scale_bytes: int, sm_count: int) -> Mapping[tuple[str, ...], PrefillConfig]:
    """Return the tall forms that the model would choose where their tiles are full, and others that pay, each with a cut."""
    found: dict[tuple[str, ...], PrefillConfig] = {}
    sizes = (n, k, bits, scale_bytes, sm_count)
    sensible = () if n % (2 * TALL) else _TALL_TOKENS
    full = sorted({m for tokens in sensible for m in range(tokens, _PAYING_TOKENS + 1, tokens)})
    ways = (
        (_tall, full, _TALL_GAIN),
        (_between, _BATCHES, _BETWEEN_GAIN),
        (_halved, _BATCHES, _HALVED_GAIN),
        (_teams, TEAM_TOKENS, _TEAMS_GAIN),
    )
    before: list[Callable[..., Iterator[PrefillConfig]]] = []
    for others, batches, gain in ways:
        for m in batches:
            times = {cut: cost(cut, m, n, k, bits, sm_count) for cut in others(m, *sizes)}
            if times:
                best = min(times, key=times.__getitem__)
                known = [cut for each in before for cut in each(m, *sizes) if cut.defines in found]
                usual = min(cost(cut, m, n, k, bits, sm_count) for cut in (*_usual(m, *sizes), *known))
                near = _TALL_NEAR * times[best] if others is _tall else times[best]
                for cut in sorted(times, key=times.__getitem__):
                    most = _TALL_WHOLE_GAIN if others is _tall and not cut.split else gain
                    if times[cut] < most * usual and times[cut] <= near:
                        found.setdefault(cut.defines, cut)
        before.append(others)
    return found


def _raster(m: int, n: int, tokens: int, rows: int, bits: int, at_once: int) -> int:
    """Return the row tiles of a band, about as many in each; ``at_once`` tiles run at once."""
    row_tiles = -(-n // rows)
    # What runs at once reads `height` strips of weights and the rest of tokens: least where both are equal.
    height = math.sqrt(min(row_tiles * -(-m // tokens), at_once) * tokens * 16 / (rows * bits))
    return -(-row_tiles // max(1, round(row_tiles / height)))


def _cuts(m: int, n: int, k: int, tokens: int, bits: int, sm_count: int, wide: bool) -> Iterator[PrefillConfig]:
    multicast = tokens >= MULTICAST_FROM and n > ROWS and sm_count > 1
    rows, at_once = (2 * ROWS, sm_count // 2) if multicast else (ROWS, sm_count)
    tiles = -(-n // rows) * -(-m // tokens)
    raster = _raster(m, n, tokens, rows, bits, at_once)
    whole = PrefillConfig(tokens, min(tiles, at_once), raster, 0, 0, multicast, wide=wide)
    yield whole
    rest, steps = tiles % at_once, whole.steps(k, bits)
    for shared_tiles in {rest, rest + at_once} if tiles > at_once else {rest}:
        if not 0 < shared_tiles <= tiles:
            continue
        # Equal runs for all, or every tile cut in as many parts.
        for workers in {at_once, *(parts * shared_tiles for parts in (2, 3, 4, 6, 8, 12, 16))}:
            if shared_tiles < workers <= at_once and workers <= shared_tiles * steps:
                ctas = max(workers, min(tiles - shared_tiles, at_once))
                yield replace(whole, ctas=ctas, shared_tiles=shared_tiles, workers=workers)
        if shared_tiles > at_once:
            yield replace(whole, ctas=at_once, shared_tiles=shared_tiles, workers=at_once)


def cost(config: PrefillConfig, m: int, n: int, k: int, bits: int, sm_count: int) -> float:
    """Return the clocks that a cut takes by a model.

    Products go by the tables above: more for int8, in steps of 64 most of all, and where L2 does not give what all CTAs load. A
    launch costs 4,300 clocks, storing a tile 20 a token, or 14.5 in parts of 64 tokens, and 10.5 less where the next tile's
    products run beside it.
    The parts of a tile are written to L2 at 170 bytes a clock and read back, one after the other, at 290; that begins 2,500
    clocks late and 71 for each token, 40 where equal parts of more than 128 tokens are added up in sections, and later where
    runs do not begin with tiles. Pairs that share K exchange sums in 470 clocks and 9 a token, and each CTA has half of a tile
    to store or to leave; so have those that halve tiles. Before there were halved tiles and sections, its first choice took
    1.0% (int4) and 2.7% (int8) longer than the fastest of those that the tuner timed, six and what was fastest nearby, on
    average of 778 products of 96 to 8192 tokens (int8 of 16), and a third at worst; for 504 of them it was the fastest.
    """
    steps = config.steps(k, bits)
    tiles = math.prod(config.tiles(m, n))
    tall, ctas = config.rows / ROWS, min(config.ctas * config.pair, sm_count)
    products = _PRODUCTS[config.tokens] * tall
    if bits == 8 and config.tokens <= 128:
        early = config.tokens == 128 and (config.split or tall > 1)  # what they lose in the loop they gain before it
        products *= _WIDE if config.wide or early else _NARROW
    stored = 20.0 * config.tokens * tall
    if config.split and not config.halved:
        steps, stored = -(-steps // 2), stored / 2 + (470 + 9 * config.tokens) * tall
        products *= _SPLIT_PRODUCTS[config.tokens]
    if config.teams > 1:
        products, stored = products * _TEAM_PRODUCTS, stored + _HAND_OVER
    products = max(products, (2 * bits * config.rows + 32 * config.tokens / config.sharers) * ctas / _L2_BYTES)
    products *= 8 if config.wide else 32 // bits  # of a step
    whole = -(-(tiles - config.shared_tiles) // config.ctas)
    if config.aside(bits):
        stored -= 5.5 * config.tokens if config.tokens > 128 else 0.0
    hidden = 10.5 * config.tokens if config.aside(bits) else 0.0
    clocks = whole * (steps * products + stored) - max(whole - 1, 0) * hidden
    if config.halved:
        own = config.tokens / 2
        clocks += steps / (2 * config.parts) * products * _SPLIT_PRODUCTS[config.tokens] + 10 * config.tokens
        clocks += 470 + 9 * config.tokens
        if config.parts > 1:
            clocks += 2500 + 71 * own + own * config.rows * 4 * (1 / 170 + config.parts / 290)
    elif config.shared_tiles:
        run = -(-config.shared_tiles * steps // config.workers)
        uneven = config.workers % config.shared_tiles != 0
        parts = config.workers / config.shared_tiles + uneven
        own = config.tokens / 2 if config.split else config.tokens
        late = 40 if config.tokens > 128 and not uneven else 71
        clocks += run * products + stored + 2500 + late * own + 6250 * uneven
        clocks += own * config.rows * 4 * (1 / 170 + parts / 290)
        clocks += _HAND_OVER_PARTS if config.teams > 1 else 0.0
    weights = n * k * bits / 8 / (ctas * 14.2)
    return 4300 + max(clocks, weights)
