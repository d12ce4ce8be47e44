"""Launch configurations: pure functions of the problem's sizes, with no tuning. Imports no Triton.

Block sizes are chosen so that the grid fills the GPU before blocks grow, and a K block never straddles two groups where
the group allows it. The number of tokens enters only through its tile (16, 32, 64 or 128), so a new batch size compiles
nothing once its tile is known.
"""

from dataclasses import dataclass

MAX_SPLIT = 16
INVARIANT_TOKENS = 64
"""Tokens for which the batch-invariant mode configures a kernel, whatever their number."""
INVARIANT_CHUNK = 2048
"""Tokens that it multiplies at once at most, which bounds the workspace of split K."""


@dataclass(frozen=True)
class DotConfig:
    """How a tensor-core kernel is launched.

    Attributes:
        block_m: Tokens per program.
        block_n: Out features per program.
        block_k: In features per step, a multiple of 16.
        split_k: Programs that share a row of the weight.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline.
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GemvConfig:
    """How the GEMV kernel is launched: out features per program, in features per step, warps."""

    block_n: int
    block_k: int
    num_warps: int


def shares_scale(group_size: int, k: int) -> bool:
    """Whether a K block can lie inside one group, so that partial sums rather than weights are scaled."""
    return group_size == k or group_size % 32 == 0


def block_k(group_size: int, k: int) -> int:
    """Return the in features per step at most: the largest power of two up to 128 that stays within a group."""
    if group_size == k:
        return 128 if k > 64 else 64
    if not shares_scale(group_size, k):
        return 64
    return min(128, group_size & -group_size)


def tile_m(m: int) -> int:
    """Return the tokens per program: the smallest tile that holds ``m``, 128 at most."""
    for tile in (16, 32, 64):
        if m <= tile:
            return tile
    return 128


def dot_config(m: int, n: int, k: int, step: int, itemsize: int, sm_count: int, split: bool) -> DotConfig:
    """Return the configuration of the split-K (``split=True``) or GEMM kernel.

    Args:
        m: Tokens.
        n: Out features.
        k: In features.
        step: In features per step that the format allows (:func:`block_k`).
        itemsize: Bytes of an activation; float32 multiplies without tensor cores and takes small tiles.
        sm_count: Multiprocessors of the GPU.
        split: Share K among programs until each multiprocessor has two.
    """
    if itemsize == 4:
        block_m, block_n, step, warps, stages = (16 if m <= 16 else 32), 64, min(step, 32), 4, 2
    else:
        block_m = tile_m(m) if split else max(32, tile_m(m))
        block_n = 64 if block_m <= 64 else 128
        # 128 x 128 x 128 spills on sm_80 and needs more shared memory than sm_89 has.
        step = min(step, 64) if block_m == 128 else step
        warps = 4 if block_m <= 64 else 8
        stages = 4 if block_m <= 32 else 3
    split_k = 1
    if split:
        programs = -(-m // block_m) * -(-n // block_n)
        steps = -(-k // step)
        while split_k < MAX_SPLIT and programs * split_k < 2 * sm_count and steps // (split_k * 2) >= 4:
            split_k *= 2
    return DotConfig(block_m, block_n, step, split_k, warps, stages)


def gemv_config(n: int, k: int, sm_count: int) -> GemvConfig:
    """Return the configuration of the GEMV kernel: few rows a program, so that every multiprocessor has work."""
    block_n = 4 if n <= 16 * sm_count else 8
    return GemvConfig(block_n, 512 if k >= 512 else 128, 4)
