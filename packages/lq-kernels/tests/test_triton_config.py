"""Launch configurations: valid for every size, bounded in number, and splitting K without losing a step."""

import pytest
from lq_kernels.triton import config
from lq_kernels.triton.constraints import MIN_GROUP_SIZE

TOKENS = (1, 2, 7, 15, 16, 17, 32, 33, 64, 65, 127, 128, 129, 1000, 8192)
SIZES = ((1, 13), (33, 96), (512, 512), (4096, 4096), (4096, 14336), (128256, 16384), (7, 100_000))
MULTIPROCESSORS = (0, 1, 58, 108, 132, 304)


def power_of_two(number):
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("split", [True, False], ids=["splitk", "gemm"])
@pytest.mark.parametrize("itemsize", [2, 4], ids=["16bit", "fp32"])
@pytest.mark.parametrize("sm_count", MULTIPROCESSORS)
def test_dot_configurations_are_valid(split, itemsize, sm_count):
    for m in TOKENS:
        for n, k in SIZES:
            for step in (16, 32, 64, 128):
                found = config.dot_config(m, n, k, step, itemsize, sm_count, split)
                for size in (found.block_m, found.block_n, found.block_k, found.split_k, found.num_warps):
                    assert power_of_two(size)
                assert found.block_m >= 16, "tl.dot takes no less"
                assert found.block_n >= 16
                assert 16 <= found.block_k <= step, "a block may not straddle a group"
                assert 1 <= found.split_k <= config.MAX_SPLIT
                assert found.num_stages >= 1
                assert split or found.split_k == 1
                # The shares cover every step, and no share is empty of work by more than rounding.
                steps = -(-k // found.block_k)
                share = -(-steps // found.split_k)
                assert share * found.split_k >= steps


def test_new_batch_sizes_compile_nothing_new():
    """Only the tile of the batch, not the batch, reaches a compile-time constant of the GEMM."""
    found = {config.dot_config(m, 4096, 4096, 128, 2, 132, False) for m in range(1, 4097)}
    assert len(found) <= 4
    split = {config.dot_config(m, 4096, 4096, 128, 2, 132, True) for m in range(1, 4097)}
    assert len(split) <= 16


def test_k_is_split_only_while_multiprocessors_are_idle():
    assert config.dot_config(1, 4096, 4096, 128, 2, 132, True).split_k > 1
    assert config.dot_config(1, 128256, 4096, 128, 2, 132, True).split_k == 1
    assert config.dot_config(1, 64, 128, 128, 2, 132, True).split_k == 1


@pytest.mark.parametrize("group", [MIN_GROUP_SIZE, 24, 32, 48, 64, 96, 100, 128, 256, 1024])
def test_a_k_block_that_shares_a_scale_lies_in_one_group(group):
    k = group * 12
    step = config.block_k(group, k)
    assert power_of_two(step)
    assert 16 <= step <= 128
    if config.shares_scale(group, k):
        assert group % step == 0


@pytest.mark.parametrize("k", [1, 13, 64, 65, 100, 4096])
def test_a_row_is_one_group(k):
    assert config.shares_scale(k, k)
    assert power_of_two(config.block_k(k, k))


def test_tiles_hold_their_tokens():
    assert [config.tile_m(m) for m in (1, 16, 17, 32, 33, 64, 65, 5000)] == [16, 16, 32, 32, 64, 64, 128, 128]


@pytest.mark.parametrize("sm_count", MULTIPROCESSORS)
def test_gemv_configurations_are_valid(sm_count):
    for n, k in SIZES:
        found = config.gemv_config(n, k, sm_count)
        assert power_of_two(found.block_n)
        assert power_of_two(found.block_k)
        assert found.block_k % 8 == 0, "a step is whole words"
        assert power_of_two(found.num_warps)
