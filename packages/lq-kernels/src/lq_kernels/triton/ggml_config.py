"""Launch configurations of the ggml kernels: pure functions of the problem's sizes, with no tuning. Imports no Triton.

A step of K is a chunk of the weight (256 weights, 128 for Q8_0 and Q6_K), whose fields have a scale each. The number of tokens
enters only through its tile, so a new batch size compiles nothing once its tile is known.
"""

from dataclasses import dataclass

MAX_SPLIT = 16


@dataclass(frozen=True)
class DotConfig:
    """How the tensor-core kernel is launched: tokens and out features per program, shares of K, warps, pipeline depth."""

    block_m: int
    block_n: int
    split_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GemvConfig:
    """How the GEMV kernel is launched: out features per program, chunks per step, warps."""

    block_n: int
    block_chunks: int
    num_warps: int


def dot_config(m: int, n: int, chunks: int, itemsize: int, sm_count: int) -> DotConfig:
    """Return the configuration of the split-K kernel.

    Args:
        m: Tokens.
        n: Out features.
        chunks: Chunks in a row of the weight.
        itemsize: Bytes of an activation; float32 multiplies without tensor cores and takes small tiles.
        sm_count: Multiprocessors of the GPU.
    """
    if itemsize == 4:
        block_m, block_n, warps, stages = 16, 32, 8, 2
    else:
        block_m, warps = next((tile for tile in (16, 32) if m <= tile), 64), 4
        block_n, stages = 64, 3 if block_m <= 32 else 2
    split_k = 1
    programs = -(-m // block_m) * -(-n // block_n)
    # Few tokens leave registers for more programs, and little for the workspace.
    wanted = 3 * sm_count if block_m == 16 else 3 * sm_count // 2
    while split_k < MAX_SPLIT and programs * split_k < wanted and chunks // (split_k * 2) >= 2:
        split_k *= 2
    return DotConfig(block_m, block_n, split_k, warps, stages)


def gemv_config(n: int, chunks: int, sm_count: int) -> GemvConfig:
    """Return the configuration of the GEMV kernel: few rows a program, so that every multiprocessor has work."""
    return GemvConfig(4 if n <= 16 * sm_count else 8, 4 if chunks >= 4 else 1, 4)
