"""The Hopper kernels' batch-invariant cuts, without a GPU: K is cut alike for every tile, whatever the number of tokens."""

import itertools
import math

import pytest
import torch
from lq_formats import QuantSpec, ShapeError
from lq_kernels import Arch, Problem
from lq_kernels.cuda import invariant, linear_a8, prefill_a16

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
    if not config.workers:
        assert config.shared_tiles == 0
        return {((0, steps),)}
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
@pytest.mark.parametrize("bits", [4, 8])
def test_every_tile_of_16_bit_tokens_is_cut_alike_at_every_number_of_tokens(n, k, bits):
    steps = -(-k * bits // 512)
    parts = invariant.prefill_parts(n, k, bits, 32, 132)
    most = invariant.tokens_at_once(n, steps, parts)
    found, sizes = set(), set()
    for m in (*MS, most):
        if m > most:
            continue
        config = invariant.prefill_config(m, n, k, bits, 32, 132)
        sizes.add(config.tokens)
        found |= runs(config, math.prod(config.tiles(m, n)), steps, parts)
        partials = 2 * config.workers * config.sharers * config.tokens * prefill_a16.ROWS
        assert partials <= invariant.MAX_PARTIALS or m <= 128
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
    """No tall tiles, and int8 in the steps that every size of tile can have; what is compiled is what is asked for."""
    sizes = (n, k, bits, scale_bytes, 132)
    asked = [invariant.prefill_config(m, *sizes) for m in MS]
    assert {(cut.rows, cut.wide, cut.split) for cut in asked} == {(prefill_a16.ROWS, False, False)}
    usual = prefill_a16.forms(*sizes)
    assert {cut.defines for cut in asked} <= {cut.defines for cut in invariant.forms(usual)}
    assert any(cut.split for cut in usual)
    assert any(cut.wide for cut in usual) == (bits == 8)
    assert any(cut.rows != prefill_a16.ROWS for cut in usual) == (n % 384 == 0)


def test_the_usual_cuts_are_not_alike():
    """What is asked of the cuts above is not so of those that the kernel takes by itself."""
    usual = [prefill_a16.prefill_config(m, 4096, 14336, 4, 32, 132) for m in (64, 4096)]
    assert len({config.workers / max(config.shared_tiles, 1) for config in usual}) == 2


def test_parts_follow_the_weight():
    assert invariant.prefill_parts(14336, 4096, 4, 32, 132) == 1, "112 tiles fill 132 multiprocessors"
    assert invariant.prefill_parts(4096, 14336, 4, 32, 132) > 1, "32 do not, and K is long"
    assert invariant.prefill_parts(128, 65536, 4, 32, 132) <= invariant.MAX_PARTS


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
        invariant.prefill_config(1 << 22, 4096, 14336, 4, 32, 132)


def test_plans_show_the_cut_and_count_launches():
    spec = QuantSpec(4, "group", 128, True, torch.bfloat16)
    plans = {
        m: invariant.plan_prefill(Problem("int4", m, 4096, 14336, spec, torch.bfloat16, H200)) for m in (1, 2048, 65536)
    }
    assert 0 < plans[1].us < plans[2048].us < plans[65536].us / 8
    assert "PrefillConfig" in plans[1].cut
    a8 = invariant.plan_a8(Problem("int4_dynamic", 1, 4096, 4096, spec, torch.bfloat16, H200, "fp8"))
    assert "A8Config" in a8.cut
    assert a8.us > 0
