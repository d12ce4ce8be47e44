"""What persistent CTAs share: quotients without divisions are exact, and too much work is refused."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from lq_formats import ShapeError
from lq_kernels.cuda.decode_cuts import DecodeConfig
from lq_kernels.cuda.work import divisor, work

MOST = (1 << 31) - 1


@given(
    value=st.one_of(st.integers(1, 512), st.integers(1, MOST + 1), st.sampled_from([1 << i for i in range(32)])),
    quotient=st.integers(0, MOST),
    less=st.integers(0, 1),
)
@example(value=1, quotient=MOST, less=0)
@example(value=MOST, quotient=1, less=0)
@example(value=MOST + 1, quotient=1, less=1)
def test_a_product_and_a_shift_are_the_quotient(value, quotient, less):
    packed = divisor(value)
    factor, shift = packed & 0xFFFFFFFF, packed >> 32
    assert 0 < packed < 1 << 63
    assert 31 <= shift <= 62
    # Next to a multiple, where a quotient changes.
    for dividend in {0, MOST, min(MOST, max(0, quotient * value - less)), quotient}:
        assert dividend * factor < 1 << 64
        assert dividend * factor >> shift == dividend // value


def test_what_is_divided_by_is_that_of_the_arguments():
    rows, tokens, steps, raster, shared, workers = 22, 3, 32, 5, 66, 132
    result = work(rows, tokens, steps, raster, shared, workers)
    assert result[:6] == (rows, tokens, steps, raster, shared, workers)
    last = rows % raster
    assert result[6:] == tuple(map(divisor, (steps, raster * tokens, raster, last, shared * steps, workers)))
    assert work(rows, tokens, steps, raster, 0, 0)[-2:] == (divisor(1), divisor(1))


@pytest.mark.parametrize(
    "sizes", [(1 << 16, 1 << 15, 1, 1, 0, 0), (1, 1, 1 << 24, 1, 1, 128), (1, 1, 1 << 24, 1, 0, 128)]
)
def test_more_than_31_bits_count_is_refused(sizes):
    with pytest.raises(ShapeError, match="more than one launch"):
        work(*sizes)


@given(
    blocks=st.integers(1, 5000),
    clusters=st.integers(1, 264),
    log_slots=st.integers(0, 3),
    warp_blocks=st.sampled_from([1, 2]),
)
def test_clusters_share_all_blocks_and_their_last_passes_hold_the_rest(blocks, clusters, log_slots, warp_blocks):
    slots = warp_blocks << log_slots
    config = DecodeConfig(1, warp_blocks, 1, slots, 1, min(clusters, blocks), 2, 1, 1, 1)
    few, more, last = config.shares(blocks)
    assert config.clusters * few + more == blocks
    assert more < config.clusters
    for rows, log in ((few, last & 0xFF), (few + 1, last >> 8)):
        rest = (rows - 1) % slots + 1
        assert rest <= 1 << log <= slots
        assert log == 0 or 1 << log == warp_blocks or rest > 1 << (log - 1)  # no smaller power of two
