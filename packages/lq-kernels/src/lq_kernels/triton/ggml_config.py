"""Launch configurations of the ggml kernels: pure functions of the problem's sizes, with no tuning. Imports no Triton.

A step of K is a chunk of the weight (256 weights, 128 for Q8_0 and Q6_K), whose fields have a scale each. The number of tokens
enters only through its tile, so a new batch size compiles nothing once its tile is known.

Of 10 000 timed on an H200 they are within 10% of the best, most within 3% (``benchmarks/results/h200/ggml-sweep.jsonl``).
"""

from dataclasses import dataclass

from lq_formats.layouts import GGMLPlanesLayout

SPLITS = (1, 2, 4, 8, 16)
"""Shares of K: powers of two, since few numbers are few kernels that add them up."""
_TILES = (8, 16, 32, 64)
_TWO_PRODUCTS = ("q4_1", "q5_1", "q5_k")
"""Types that multiply twice, by codes and for minima, and run out of registers, or copy no x ahead, in programs of 32 rows."""
_PROGRAMS = 32  # that a multiprocessor runs at once


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


def tile_m(m: int) -> int:
    """Return the tokens per program for 16-bit activations: the smallest tile that holds ``m``, 64 at most."""
    return next((tile for tile in _TILES if m <= tile), _TILES[-1])


def dot_config(m: int, n: int, k: int, layout: GGMLPlanesLayout, itemsize: int, sm_count: int) -> DotConfig:
    """Return the configuration of the split-K kernel.

    Args:
        m: Tokens.
        n: Out features.
        k: In features.
        layout: The weight's layout.
        itemsize: Bytes of an activation; float32 multiplies without tensor cores and takes small tiles.
        sm_count: Multiprocessors of the GPU.
    """
    if itemsize == 4:
        block_m, block_n, warps, stages = 16, 32, 8, 2
    elif m <= 16 and layout.name not in _TWO_PRODUCTS:
        # Few tokens: small programs that wait for nobody are faster than wgmma, which takes 64 rows and four warps. With one
        # warp the scales of Q4_K and Q6_K are decoded once a row, with two by every thread that multiplies by them; the other
        # K-quants have 16 fields in a word, or two products, and too few registers for that.
        block_m, block_n, stages = tile_m(m), 32, 3
        warps = 1 if block_m == 8 and layout.form.block_size == 256 and layout.low.bits == 4 else 2
    else:
        # 64 tokens and chunks of 256 weights fill shared memory: with a third stage it holds a single program (Q5_0).
        block_m, block_n, warps = tile_m(m), 64, 4
        stages = 2 if block_m == 64 and layout.chunk == 256 else 3
    tiles, chunks = -(-m // block_m) * -(-n // block_n), -(-k // layout.chunk)
    return DotConfig(block_m, block_n, _split_k(tiles, block_m, block_n, chunks, sm_count), warps, stages)


def _split_k(tiles: int, block_m: int, block_n: int, chunks: int, sm_count: int) -> int:
    """Return the shares of K that keep the busiest multiprocessor busy for the shortest time.

    A program takes its chunks and about one more to begin, and as long again as a chunk to store 64 tokens; a multiprocessor
    with few rows in flight waits for memory.
    """

    def time(split: int) -> float:
        programs = -(-tiles * split // max(sm_count, 1))
        chunk_times = -(-chunks // split) + 1 + block_m / 64
        return programs * chunk_times * (1 + (40 / (programs * block_n)) ** 2)

    return min((split for split in SPLITS if split == 1 or split * 2 <= chunks), key=time)


def gemv_config(n: int, k: int, layout: GGMLPlanesLayout, sm_count: int) -> GemvConfig:
    """Return the configuration of the GEMV kernel: a warp a row, and few rows a program while all programs run at once."""
    chunks = -(-k // layout.chunk)
    block_n = 4 if n > _PROGRAMS * sm_count else 1 if layout.upper is None else 2
    return GemvConfig(block_n, next((step for step in (1, 2, 4) if chunks <= step), 8), block_n)
