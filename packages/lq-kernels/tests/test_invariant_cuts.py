"""The Hopper kernels' batch-invariant cuts, without a GPU: K is cut alike for every tile, whatever the number of tokens."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from lq_formats import QuantSpec, ShapeError
from lq_kernels import Arch, Problem, prepare
from lq_kernels.cuda import invariant, linear_a8, prefill_cuts

H200 = Arch("cuda", (9, 0), "NVIDIA H200", 132)
MS = (*range(1, 70), 96, 128, 129, 200, 256, 300, 512, 1000, 1024)
WEIGHTS = [(8, 8), (16, 136), (2048, 2048), (4096, 4096), (14336, 4096), (4096, 14336), (4100, 1000), (128256, 2048)]


def start(worker, units, workers):
    """Return the first unit of a worker, as ``Work::start`` of the sources computes it: in 32 bits."""
    assert worker * units < 1 << 32, "overflows u32"
    return worker * units // workers


def owner(unit, units, workers):
    """Return the worker that has a unit, as ``Work::owner`` computes it: in int, the stricter of the two sources."""
    assert (unit + 1) * workers - 1 < 1 << 31, "overflows int"
    return ((unit + 1) * workers - 1) // units


def runs(config, tiles, steps, parts):
    """Return the runs of K of every tile in the order in which their sums are added, and check that they are as expected.

    Tiles in the middle of a large grid are left out: all are cut by the same formula.
    """
    if not config.shared_tiles:
        bounds = [start(run, steps, max(config.workers, 1)) for run in range(max(config.workers, 1) + 1)]
        pieces = tuple(itertools.pairwise(bounds))
        assert all(begin < end for begin, end in pieces), "a run without a step"
        return {pieces}
    assert config.shared_tiles == tiles
    assert config.workers == config.ctas == parts * tiles
    units, found = tiles * steps, set()
    for tile in sorted({*range(min(tiles, 40)), *range(max(0, tiles - 40), tiles)}):
        first, last = owner(tile * steps, units, config.workers), owner(tile * steps + steps - 1, units, config.workers)
        assert first == parts * tile, "the first worker has a tile before this one"
        assert last == first + parts - 1
        bounds = [start(worker, units, config.workers) - tile * steps for worker in range(first, last + 2)]
        assert bounds[0] == 0
        assert bounds[-1] == steps
        pieces = tuple(itertools.pairwise(bounds))
        assert all(begin < end for begin, end in pieces), "a part without a step"
        found.add(pieces)
    return found


@pytest.mark.parametrize(("n", "k"), WEIGHTS)
@pytest.mark.parametrize(("bits", "scale_bytes"), [(4, 32), (8, 32), (8, 0)])
def test_every_tile_of_16_bit_tokens_is_cut_alike_at_every_number_of_tokens(n, k, bits, scale_bytes):
    parts = invariant.prefill_parts(n, k, bits, scale_bytes, 132)
    steps = -(-k // (64 if bits == 8 and scale_bytes else 128))
    most = invariant.tokens_at_once(n, steps, 1)
    found, sizes = set(), set()
    for m in (*MS, most):
        if m > most:
            continue
        config = invariant.prefill_config(m, n, k, bits, scale_bytes, 132)
        sizes.add(config.tokens)
        assert parts == 1 or config.steps(k, bits) == steps, "K is cut in steps of one size"
        found |= runs(config, math.prod(config.tiles(m, n)), steps, parts)
        partials = 2 * config.workers * config.sharers * config.tokens * prefill_cuts.ROWS
        assert partials <= invariant.MAX_PARTIALS or m <= 128 or not config.shared_tiles
    assert len(found) == 1
    assert len(found.pop()) == parts
    assert len(sizes) > 1, "the tile of tokens follows their number"


@pytest.mark.parametrize(("n", "k"), [(n, k) for n, k in WEIGHTS if k % 16 == 0])
@pytest.mark.parametrize(
    ("bits", "promote", "scale_bytes"), [(8, False, 0), (8, True, 0), (4, True, 32), (4, False, 0)]
)
def test_every_tile_of_8_bit_tokens_is_cut_alike_at_every_number_of_tokens(n, k, bits, promote, scale_bytes):
    steps = -(-k // linear_a8.STEP)
    parts = invariant.a8_parts(n, k, bits, promote, scale_bytes, 132)
    most = invariant.tokens_at_once(n, steps, parts)
    found = set()
    for m in (*MS, most):
        if m > most:
            continue
        config = invariant.a8_config(m, n, k, bits, promote, scale_bytes, 132)
        row_tiles, token_tiles = config.tiles(m, n)
        found |= runs(config, row_tiles * token_tiles, steps, parts)
    assert len(found) == 1
    assert len(found.pop()) == parts


@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (6144, 4096), (3072, 2048)])
@pytest.mark.parametrize(("bits", "scale_bytes"), [(4, 32), (8, 0)])
def test_all_tiles_have_as_many_rows_and_all_steps_are_of_one_size(n, k, bits, scale_bytes):
    """No tall tiles, and int8 in the steps of tiles whose K can be cut; what is compiled is what is asked for."""
    sizes = (n, k, bits, scale_bytes, 132)
    asked = [invariant.prefill_config(m, *sizes) for m in MS]
    assert {(cut.rows, cut.wide, cut.split) for cut in asked} == {(prefill_cuts.ROWS, bits == 8, False)}
    usual, known = prefill_cuts.forms(*sizes), [cut.defines for cut in invariant.forms(*sizes)]
    assert {cut.defines for cut in asked} <= set(known)
    assert len(known) == len(set(known)) == 8, "five sizes of tile that CTAs share, and three in runs"
    assert any(cut.split for cut in usual)
    assert any(cut.wide for cut in usual) == (bits == 8)
    assert any(cut.rows != prefill_cuts.ROWS for cut in usual) == (n % 384 == 0)


def test_the_usual_cuts_are_not_alike():
    """What is asked of the cuts above is not so of those that the kernel takes by itself."""
    usual = [prefill_cuts.prefill_config(m, 4096, 14336, 4, 32, 132) for m in (64, 4096)]
    assert len({config.workers / max(config.shared_tiles, 1) for config in usual}) == 2


@pytest.mark.parametrize(
    ("n", "k", "parts"),
    [
        (14336, 4096, 1),  # 112 tiles fill 132 multiprocessors
        (8192, 8192, 2),
        (6144, 4096, 2),
        (4096, 4096, 4),
        (4096, 14336, 4),
        (2048, 2048, 4),
        (2048, 8192, 4),
        (1024, 4096, 4),
    ],
)
def test_parts_follow_the_weight(n, k, parts):
    """Of those that were timed on an H200, the parts with the best times of few tokens that 256 do not pay for."""
    assert invariant.prefill_parts(n, k, 4, 32, 132) == parts
    few = invariant.prefill_config(1, n, k, 4, 32, 132)
    assert few.workers * few.sharers <= 132, "one wave"
    assert invariant.prefill_parts(n, k, 8, 0, 132) == parts


def test_parts_are_bounded():
    assert invariant.prefill_parts(128, 65536, 4, 32, 132) == invariant.MAX_PARTS
    assert invariant.prefill_parts(8, 136, 4, 32, 132) <= 2, "steps"


@pytest.mark.exhaustive(where=lambda n, k, scale_bytes: scale_bytes == 64 and n != 1024 and k != 14336)
@pytest.mark.parametrize(
    ("n", "k"), [(4096, 4096), (4096, 14336), (2048, 2048), (6144, 4096), (2048, 8192), (1024, 4096)]
)
@pytest.mark.parametrize(("bits", "scale_bytes"), [(4, 32), (4, 64), (8, 0), (8, 64)])
def test_few_tokens_share_tiles_and_many_do_not(n, k, bits, scale_bytes):
    sizes = (n, k, bits, scale_bytes, 132)
    parts = invariant.prefill_parts(*sizes)
    cuts = {m: invariant.prefill_config(m, *sizes) for m in (*range(1, 1025), 2048, 4096, 65536)}
    whole = [m for m, cut in cuts.items() if not cut.shared_tiles]
    assert 32 < whole[0] <= 1024
    assert {65536, 4096, 1024} <= set(whole)
    assert all(cuts[m].runs == parts and cuts[m].tokens in prefill_cuts.RUNS_TOKENS for m in whole)
    # Tokens and the number of multiprocessors fit by turns, but no more than once or twice.
    turns = sum(bool(cuts[m].shared_tiles) and not cuts[m - 1].shared_tiles for m in range(2, 1025))
    assert turns <= 2
    # More tokens take as long at least: but for 2%, by which tiles fit better.
    times = [invariant._prefill_clocks(cut, m, n, k, bits, 132) for m, cut in cuts.items()]
    assert all(time <= 1.02 * more for time, more in itertools.pairwise(times))
    # Sums that stay in registers are cheap.
    for m in (1024, 4096):
        usual = prefill_cuts.cost(prefill_cuts.prefill_config(m, *sizes), m, n, k, bits, 132)
        assert usual < invariant._prefill_clocks(cuts[m], m, n, k, bits, 132) < 1.3 * usual


@pytest.mark.parametrize(("n", "k"), [(128, 1 << 20), (4096, 4096), (8448, 131072), (1 << 20, 4096)])
@pytest.mark.parametrize("parts", [1, 2, 4, 16])
def test_a_launch_of_so_many_tokens_fits_32_bits_and_the_workspace(n, k, parts):
    steps, rows = -(-k // 128), -(-n // 128)
    tokens = invariant.tokens_at_once(n, steps, parts)
    assert tokens > 0
    assert tokens % 128 == 0
    if parts > 1 and tokens > 128:
        tiles = rows * tokens // 128
        assert parts * tiles * tiles * steps < invariant.MAX_UNITS
        assert 2 * parts * tiles * 128 * 128 <= invariant.MAX_PARTIALS


def test_too_many_tokens_for_a_launch_are_an_error():
    with pytest.raises(ShapeError, match="split the tokens"):
        invariant.prefill_config(1 << 31, 4096, 14336, 4, 32, 132)
    with pytest.raises(ShapeError, match="split the tokens"):
        invariant.a8_config(1 << 22, 4096, 14336, 4, False, 0, 132)


def test_warming_up_compiles_runs_where_k_is_cut():
    for n, compiled in ((4096, 3), (14336, 0)):
        spec = QuantSpec(4, "group", 128, True, torch.bfloat16)
        problem = Problem("preshuffled", 1, n, 4096, spec, torch.bfloat16, H200, batch_invariant=True)
        found = [unit.defines for unit in prepare.units(problem) if unit.source == "prefill_a16"]
        assert sum("LQ_RUNS=1" in defines for defines in found) == compiled
        usual = prepare.units(replace(problem, batch_invariant=False))
        assert not any("LQ_RUNS=1" in unit.defines for unit in usual)


def test_plans_show_the_cut_and_count_launches():
    spec = QuantSpec(4, "group", 128, True, torch.bfloat16)
    plans = {
        m: invariant.plan_prefill(Problem("int4", m, 4096, 14336, spec, torch.bfloat16, H200)) for m in (1, 2048, 65536)
    }
    assert 0 < plans[1].us < plans[2048].us < plans[65536].us / 8
    assert "PrefillConfig(tokens=16, ctas=128, raster=4, shared_tiles=32, workers=128" in plans[1].cut
    assert "shared_tiles=0, workers=4" in plans[2048].cut
    a8 = invariant.plan_a8(Problem("int4_dynamic", 1, 4096, 4096, spec, torch.bfloat16, H200, "fp8"))
    assert "A8Config" in a8.cut
    assert a8.us > 0
