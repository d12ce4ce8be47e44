"""How the prefill kernel cuts a product: every tile once, what is compiled for a weight, and which cut the model takes."""

import math

import pytest
from cuda_host.order import pieces
from lq_kernels.cuda.prefill_cuts import (
    BETWEEN,
    ROWS,
    TALL,
    TOKENS,
    PrefillConfig,
    candidates,
    cost,
    forms,
    prefill_config,
    ring,
    ring_of,
)

SIZES = sorted((*TOKENS, *BETWEEN))


def test_shared_memory_fits_and_the_ring_is_deep_enough():
    for tokens in (16, 32, 64, 96, 128):
        for rows, split in ((ROWS, False), (ROWS, True), (TALL, False), (TALL, True)):
            stages, shared = ring(tokens, 8, 0, split and tokens > 16, rows, wide=True)
            assert stages >= 3
            assert shared <= 232448
    for tokens in SIZES:
        for bits, scale_bytes in ((4, 0), (4, 32), (4, 64), (4, 256), (4, 512), (8, 0)):
            stages, shared = ring(tokens, bits, scale_bytes)
            assert shared <= 232448
            # One that is multiplied, one that is read ahead, one in flight; the largest tile is not used with wide scales.
            assert stages >= (2 if tokens == 256 and scale_bytes > 64 else 3), (tokens, bits, scale_bytes)


def test_rings_are_shorter_where_weights_come_from_l2():
    for tokens, m, expected in (
        (32, 32, 5),
        (32, 1000, 5),
        (64, 64, 5),
        (64, 65, 4),
        (96, 97, 4),
        (256, 256, 5),
        (256, 300, 4),
    ):
        config = PrefillConfig(tokens, 1, 1, 0, 0, multicast=True)
        stages, shared = ring_of(config, 8, 0, m)
        assert stages == expected
        assert shared == ring(tokens, 8, 0, most=expected)[1]
    assert ring_of(PrefillConfig(256, 1, 1, 0, 0), 4, 32, 300)[0] == 3, "as many as there is room for"


def split_pieces(config, m, n, k, bits):
    """Return (row tile, token tile, first K step, last) of every CTA in its order, of pairs that share K of both halves."""
    result = []
    for row, token, begin, end in pieces(config, -(-n // config.rows), -(-m // config.tokens), config.steps(k, bits)):
        middle = (begin + end + 1) // 2
        halves = ((begin, middle), (middle, end)) if config.split else ((begin, end),)
        result += [(row, token, *half) for half in halves]
    return result


SHAPES = [
    (m, n, k)
    for m in (1, 17, 64, 65, 128, 1000, 4096)
    for n, k in ((8, 8), (4096, 4096), (14336, 4096), (4096, 14336), (4100, 1000))
    if m < 4096 or n < 14336
] + [(m, n, 4096) for m in (96, 200, 256, 384, 512, 2048) for n in (5120, 6144)]


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize(("bits", "scale_bytes"), [(4, 32), (8, 0)])
def test_every_cut_covers_every_step_of_every_tile_once(m, n, k, bits, scale_bytes):
    sizes = (m, n, k, bits, scale_bytes, 132)
    for config in candidates(*sizes):
        assert config.tokens in SIZES
        narrow = (
            k <= 2048 and config.tokens == 128 and (config.rows == TALL or (config.pair == 2 and not config.multicast))
        )
        assert config.wide == (bits == 8 and scale_bytes == 0 and config.tokens <= 128 and not narrow)
        steps = -(-k // 64) if bits == 8 and not config.wide else -(-k // 128)
        assert 1 <= config.workers <= config.ctas <= 132 or config.workers == 0 < config.ctas <= 132
        seen = {}
        for row, token, begin, end in split_pieces(config, m, n, k, bits):
            assert 0 <= begin < end <= steps, "a piece without a step"
            seen.setdefault((row, token), []).append((begin, end))
        assert len(seen) == -(-n // config.rows) * -(-m // config.tokens)
        for parts in seen.values():
            parts.sort()
            assert [begin for begin, _ in parts] == [0] + [end for _, end in parts[:-1]]
            assert parts[-1][1] == steps
    assert prefill_config(*sizes) in set(candidates(*sizes))


def test_cuts_follow_the_size():
    few = prefill_config(64, 4096, 4096, 4, 32, 132)
    assert few.split, "32 tiles do not fill 132 multiprocessors"
    fewer = prefill_config(64, 4096, 14336, 4, 32, 132)
    assert (fewer.split, fewer.parts) == (True, 2), "long ones are worth more than two parts, of a pair each"
    large = prefill_config(4096, 4096, 4096, 4, 32, 132)
    assert large.tokens == 256, "the largest tile reads least"
    assert large.ctas * large.sharers == 132
    assert not prefill_config(64, 128, 4096, 4, 32, 132).multicast, "one tile of rows has no neighbour"


@pytest.mark.parametrize(("bits", "scale_bytes"), [(4, 32), (8, 0)])
@pytest.mark.parametrize(("n", "k"), [(2048, 2048), (3072, 2048), (4096, 4096), (6144, 4096), (5120, 8192), (64, 4096)])
def test_tall_tiles_are_compiled_where_they_pay(n, k, bits, scale_bytes):
    sizes = (n, k, bits, scale_bytes, 132)
    known = {cut.defines for cut in forms(*sizes)}
    tall = {cut.defines for cut in forms(*sizes) if cut.rows == TALL}
    between = {cut.defines for cut in forms(*sizes) if cut.tokens in BETWEEN}
    halved = {cut.defines for cut in forms(*sizes) if cut.halved}
    assert len(halved) <= (2 if bits == 4 else 3)
    teams = {cut.defines for cut in forms(*sizes) if cut.teams > 1}
    assert len(teams) <= (2 if bits == 4 else 0)
    assert len(known - tall - between - halved - teams) <= 11
    assert bool(tall) == (n % 384 == 0)
    asked = {cut.defines for m in (*range(1, 2100, 13), 4096, 8192) for cut in candidates(m, *sizes)}
    assert asked <= known
    # Each is nearly the fastest by the model for some number of tokens.
    nearly = set()
    for m in range(16, 2049, 16):
        clocks = {cut: cost(cut, m, *sizes[:3], 132) for cut in candidates(m, *sizes)}
        nearly |= {cut.defines for cut in clocks if clocks[cut] < 1.04 * min(clocks.values())}
    assert tall <= nearly
    # For some number of tokens it gains 5%, or 2 where no pair shares K: nothing is compiled for less. Many tokens fill the
    # machine with any tile.
    gains = dict.fromkeys(tall, 1.0)
    for m in {m for step in (64, 96) for m in range(step, 2049, step)}:
        times = {}
        for cut in candidates(m, *sizes):
            times[cut.defines] = min(times.get(cut.defines, math.inf), cost(cut, m, n, k, bits, 132))
        usual = min(us for form, us in times.items() if form not in tall | between | halved)
        gains |= {form: min(gains[form], times[form] / usual) for form in tall & times.keys()}
    assert all(gain < (0.95 if "LQ_SPLIT=1" in form else 0.98) for form, gain in gains.items())
    assert not {cut.defines for cut in candidates(2049, *sizes)} & tall


@pytest.mark.parametrize(
    ("m", "n", "k", "tokens", "rows"),
    [
        (384, 4096, 4096, 96, ROWS),
        (384, 6144, 4096, 96, TALL),
        (512, 6144, 4096, 128, TALL),
        (512, 3072, 2048, 64, TALL),
        (512, 5120, 8192, 176, ROWS),
    ],
)
def test_tiles_fill_the_multiprocessors(m, n, k, tokens, rows):
    cut = prefill_config(m, n, k, 4, 32, 132)
    assert (cut.tokens, cut.rows, cut.shared_tiles) == (tokens, rows, 0)
    assert cut.ctas * cut.pair == (120 if tokens in BETWEEN else 128)


@pytest.mark.parametrize(("bits", "scale_bytes"), [(4, 32), (8, 0)])
@pytest.mark.parametrize(
    ("n", "k", "tokens"), [(5120, 8192, 176), (10240, 5120, 176), (4096, 4096, 0), (3072, 2048, 0), (14336, 4096, 0)]
)
def test_tiles_between_are_compiled_where_they_pay(n, k, tokens, bits, scale_bytes):
    sizes = (n, k, bits, scale_bytes, 132)
    between = {cut.defines for cut in forms(*sizes) if cut.tokens in BETWEEN}
    assert {f"LQ_TOKENS={tokens}"} <= {defines[0] for defines in between} if tokens else not between
    gains = dict.fromkeys(between, 1.0)
    for m in (256, 384, 512, 768, 1024, 1536, 2048):
        times = {}
        for cut in candidates(m, *sizes):
            times[cut.defines] = min(times.get(cut.defines, math.inf), cost(cut, m, n, k, bits, 132))
        others = [form for form in times if "LQ_ROWS=192" in form or {"LQ_MULTICAST=1", "LQ_SPLIT=1"} <= set(form)]
        usual = min(us for form, us in times.items() if form not in between and form not in others)
        gains |= {form: min(gains[form], times[form] / usual) for form in between & times.keys()}
    assert all(gain < 0.96 for gain in gains.values())
    assert not {cut.defines for cut in candidates(2049, *sizes)} & between
