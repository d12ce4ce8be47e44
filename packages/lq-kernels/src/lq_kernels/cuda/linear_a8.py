"""Launch ``src/linear_a8.cu``: 8-bit tokens times an 8-bit weight or an int4 weight in fragment order, on Hopper."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from lq_formats import ShapeError
from lq_formats.layouts.fragment import BLOCK_BYTES, BLOCK_ROWS
from torch import Tensor

from lq_kernels.cuda.quantize_tokens import CODES
from lq_kernels.cuda.variant import TYPES
from lq_kernels.cuda.work import in_measured_order, reordered, work
from lq_kernels.jit.launcher import launch
from lq_kernels.jit.tensor_map import TensorMap, tensor_map
from lq_kernels.jit.workspace import workspace
from lq_kernels.problem import Arch, Problem
from lq_kernels.tuned.lookup import Choice, choose, measurements
from lq_kernels.tuned.table import Weight

ROWS = 128
STEP = 128
"""In features of a stage."""
THREADS = 384
TOKENS = (16, 32, 64, 128, 192, 256)
"""Tokens of a tile, for which the source is written; a tile has 128 out features."""
_ASIDE_FROM, _OUT_TOKENS = 128, 64
"""Tokens of a tile from which its results may leave beside the next one's products, and how many of them at once."""
MAX_PROMOTED = {8: 192, 4: 128}
"""Tokens, by the weight's bits, of the largest tile whose sums are promoted: a thread then has two registers for each."""

_SHARED = 232448
_MAX_STAGES = 16
_INT4_STAGES = 8
"""Of a ring of int4 weights, at most: with more, tokens wait behind weights, as in prefill (16 tokens: 4 to 8% longer)."""
_BARRIERS = 2 * _MAX_STAGES * 8 + 16  # and a flag, and the barrier of results
_MAX_TILES = 1 << 30
SAME = ("tokens", "multicast", "ctas", "shared_tiles", "workers")
"""Fields of a cut that a table's must have. The rest is order, which is the table's as well."""

# Estimates for an H200, to be replaced by measurements: 8-bit products of a multiprocessor a clock, and bytes from L2.
_PRODUCTS = 4096
_L2 = 30.0
_DRAM = 17.0
_CLOCKS_A_US = 1750.0


@dataclass(frozen=True)
class A8Variant:
    """One compilation of the source, tile apart.

    Attributes:
        bits: Of the weight, 4 or 8.
        activation: ``"int8"`` or ``"fp8"``: the codes of tokens, and of 8-bit weights.
        out: dtype of y and bias, bf16 or fp16.
        scale: dtype of the weight's scales.
        grouped: Scales for groups of a multiple of 128 in features; otherwise one a row.
        lowest: Whether an int4 code may be -8.
        promote: Whether the sums of 256 in features (of 128, where weights have 4 bits) are added up apart, in fp32.
    """

    bits: int
    activation: str
    out: torch.dtype
    scale: torch.dtype
    grouped: bool
    lowest: bool
    promote: bool

    @functools.cached_property
    def scale_bytes(self) -> int:
        """Bytes of scales beside the codes of a block of 16 rows and 128 in features."""
        return BLOCK_ROWS * self.scale.itemsize if self.grouped else 0

    @functools.cached_property
    def defines(self) -> tuple[str, ...]:
        """``NAME=VALUE`` of the macros."""
        return (
            f"LQ_BITS={self.bits}",
            f"LQ_CODES={CODES[self.activation]}",
            f"LQ_OUT={TYPES[self.out]}",
            f"LQ_SCALE={TYPES[self.scale]}",
            f"LQ_GROUPED={int(self.grouped)}",
            f"LQ_LOWEST={int(self.lowest)}",
            f"LQ_PROMOTE={int(self.promote)}",
        )


@dataclass(frozen=True)
class A8Config:
    """How a product is cut.

    Attributes:
        tokens: Tokens of a tile.
        multicast: CTAs come in pairs that have neighbouring row tiles and load their tokens for each other. Everything below
            then counts pairs.
        ctas: CTAs in the grid.
        raster: Row tiles in a band; a band's tiles are taken for all tokens before the next band's.
        shared_tiles: Tiles whose K steps are shared among CTAs.
        workers: CTAs that share them.
    """

    tokens: int
    multicast: bool
    ctas: int
    raster: int
    shared_tiles: int
    workers: int

    @property
    def sharers(self) -> int:
        """CTAs that have the same tokens."""
        return 2 if self.multicast else 1

    @property
    def defines(self) -> tuple[str, ...]:
        """``NAME=VALUE`` of the macros."""
        return (f"LQ_TOKENS={self.tokens}", f"LQ_MULTICAST={int(self.multicast)}")

    def tiles(self, m: int, n: int) -> tuple[int, int]:
        """Return how many row tiles (or pairs) and token tiles there are."""
        return -(-n // (ROWS * self.sharers)), -(-m // self.tokens)


def promotes(activation: str, grouped: bool) -> bool:
    """Return whether sums are promoted: sums of int8 are exact, those of e4m3 lose bits as they grow."""
    return grouped or activation == "fp8"


def ring(tokens: int, bits: int, scale_bytes: int) -> tuple[int, int]:
    """Return the stages of a CTA's ring and the bytes of its shared memory.

    Args:
        tokens: Tokens of a tile.
        bits: Of the weight.
        scale_bytes: Bytes of scales beside the codes of a block and K step.
    """
    stage = tokens * STEP + _weight_bytes(bits, scale_bytes)
    fixed = ROWS // 64 * min(tokens, 32) * 144 + _BARRIERS
    stages = min(_INT4_STAGES if bits == 4 else _MAX_STAGES, (_SHARED - fixed) // stage)
    return stages, fixed + stages * stage


def a8_config(m: int, n: int, k: int, bits: int, promote: bool, scale_bytes: int, sm_count: int) -> A8Config:
    """Return the fastest cut by a model in clocks.

    Args:
        m: Tokens.
        n: Out features.
        k: In features.
        bits: Of the weight.
        promote: Whether sums are promoted.
        scale_bytes: Bytes of scales beside the codes of a block and K step.
        sm_count: Multiprocessors.

    Raises:
        ShapeError: If there are too many tiles to count.
    """
    cuts = candidates(m, n, k, bits, promote, sm_count)
    return min(cuts, key=lambda config: cost(config, m, n, k, bits, promote, scale_bytes, sm_count))


@functools.lru_cache(maxsize=4096)
def choice(
    m: int,
    n: int,
    k: int,
    bits: int,
    activation: str,
    promote: bool,
    grouped: bool,
    scale_bytes: int,
    sm_count: int,
    device: str,
) -> Choice[A8Config]:
    """Return the cut that was measured to be fastest on ``device``, or is by the model.

    Args:
        m: Tokens.
        n: Out features.
        k: In features.
        bits: Of the weight.
        activation: What tokens are quantized to.
        promote: Whether sums are promoted; tables hold measurements of the default, :func:`promotes`.
        grouped: Whether scales are for groups.
        scale_bytes: Bytes of scales beside the codes of a block and K step.
        sm_count: Multiprocessors.
        device: Name of the GPU, for the tables; empty for the model.

    Raises:
        ShapeError: If there are too many tiles to count.
    """
    weight = Weight(bits, int(grouped), False, scale_bytes, activation, -(-n // BLOCK_ROWS) * BLOCK_ROWS, k)
    chosen = choose(
        candidates(m, n, k, bits, promote, sm_count),
        lambda config: cost(config, m, n, k, bits, promote, scale_bytes, sm_count),
        SAME,
        measurements("linear_a8", m, weight, device, sm_count) if promote == promotes(activation, grouped) else (),
    )
    assert chosen is not None, "tiles of 16 tokens fit any size"
    return in_measured_order(chosen, chosen.config.tiles(m, n)[0])


def orders(config: A8Config, m: int, n: int) -> Iterator[A8Config]:
    """Yield the cut with its tiles in other orders (:func:`lq_kernels.cuda.work.reordered`): up to 4% on an H200."""
    rows, tokens = config.tiles(m, n)
    return reordered(config, (rows, tokens), (rows, *(1 << i for i in range(rows.bit_length()))))


def choice_of(problem: Problem) -> Choice[A8Config]:
    """Return the cut of a problem."""
    grouped = problem.group_size != problem.k
    scale_bytes = BLOCK_ROWS * problem.spec.scale_dtype.itemsize if grouped else 0
    return choice(
        problem.m,
        problem.n,
        problem.k,
        problem.spec.bits,
        problem.activation,
        promotes(problem.activation, grouped),
        grouped,
        scale_bytes,
        max(problem.arch.sm_count, 1),
        problem.arch.name,
    )


def predict_us(problem: Problem) -> float:
    """Return the microseconds that the model gives the cut it would choose, on an H200's clock."""
    grouped, sm_count = problem.group_size != problem.k, max(problem.arch.sm_count, 1)
    promote = promotes(problem.activation, grouped)
    scale_bytes = BLOCK_ROWS * problem.spec.scale_dtype.itemsize if grouped else 0
    sizes = (problem.m, problem.n, problem.k, problem.spec.bits, promote, scale_bytes)
    return cost(a8_config(*sizes, sm_count), *sizes, sm_count) / _CLOCKS_A_US


def quantize_us(problem: Problem) -> float:
    """Return the microseconds of quantizing the tokens: two bytes read and one written of each element, at 3.5 TB/s."""
    return 1.5 + 3e-6 * problem.m * problem.k / 3.5 * 132 / max(problem.arch.sm_count, 1)


def candidates(m: int, n: int, k: int, bits: int, promote: bool, sm_count: int) -> Iterator[A8Config]:
    """Yield every cut that makes sense; arguments and errors are those of :func:`a8_config`."""
    if -(-n // ROWS) * -(-m // TOKENS[0]) > _MAX_TILES:
        raise ShapeError(f"M={m}, N={n}: too many results for one launch; split the tokens")
    steps = -(-k // STEP)
    for tokens in TOKENS:
        if (tokens > 16 and 2 * m <= tokens) or (promote and tokens > MAX_PROMOTED[bits]):
            continue  # half-empty tiles only waste
        for multicast in (True, False) if tokens >= 64 and n > ROWS and sm_count > 1 else (False,):
            rows, slots = (2 * ROWS, sm_count // 2) if multicast else (ROWS, sm_count)
            row_tiles, token_tiles = -(-n // rows), -(-m // tokens)
            tiles = row_tiles * token_tiles
            # What runs at once reads `height` strips of weights and the rest of tokens: least where both are equal.
            height = math.sqrt(min(tiles, slots) * tokens * 8 / (rows * bits))
            raster = -(-row_tiles // max(1, round(row_tiles / height)))
            for ctas, shared_tiles, workers in _shares(tiles, steps, slots):
                yield A8Config(tokens, multicast, ctas, raster, shared_tiles, workers)


def _shares(tiles: int, steps: int, slots: int) -> Iterator[tuple[int, int, int]]:
    """Yield CTAs in the grid, tiles that they share and how many share them, with ``slots`` CTAs at once."""
    yield min(tiles, slots), 0, 0
    rest = tiles % slots
    for shared_tiles in {rest, rest + slots} if tiles > slots else {rest}:
        if not 0 < shared_tiles <= tiles:
            continue
        # Equal runs for all, or every tile cut in as many parts.
        for workers in {slots, *(parts * shared_tiles for parts in (2, 3, 4, 8, 16, 32))}:
            if shared_tiles < workers <= slots and workers <= shared_tiles * steps:
                yield max(workers, min(tiles - shared_tiles, slots)), shared_tiles, workers
        if shared_tiles > slots:
            yield slots, shared_tiles, slots


def cost(config: A8Config, m: int, n: int, k: int, bits: int, promote: bool, scale_bytes: int, sm_count: int) -> float:
    """Return the clocks that a cut takes by a model.

    A K step takes as long as its products (a fifth more where sums are promoted), or as its bytes from L2. A launch costs
    3,500 clocks, storing a tile 600 and 6 a token, of which 5 beside the next tile's products, from 128 tokens on. A part of a
    tile is written to L2 and read back at 40 bytes a clock, after 1,500 clocks of waiting.
    """
    steps = -(-k // STEP)
    row_tiles, token_tiles = config.tiles(m, n)
    products = ROWS * config.tokens * STEP / _PRODUCTS * (1.2 if promote else 1.0) + 40
    loaded = config.tokens * STEP / config.sharers + _weight_bytes(bits, scale_bytes)
    step = max(products, loaded / _L2)
    stored = 600 + 6 * config.tokens
    whole = -(-(row_tiles * token_tiles - config.shared_tiles) // config.ctas)
    hidden = 5.0 * config.tokens * max(whole - 1, 0) if config.tokens >= _ASIDE_FROM else 0.0
    clocks = whole * (steps * step + stored) - hidden
    if config.shared_tiles:
        run = -(-config.shared_tiles * steps // config.workers)
        parts = config.workers / config.shared_tiles + (config.workers % config.shared_tiles != 0)
        part = config.tokens * ROWS * 4 / 40
        clocks += run * step + stored + 1500 + (1.0 + parts) * part
    weights = n * k * bits / 8 / (min(config.ctas * config.sharers, sm_count) * _DRAM)
    return 3500 + max(clocks, weights)


def _weight_bytes(bits: int, scale_bytes: int) -> int:
    codes = ROWS // BLOCK_ROWS * BLOCK_BYTES if bits == 4 else ROWS * STEP
    return codes + ROWS // BLOCK_ROWS * scale_bytes


def linear(
    codes: Tensor,
    token_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    dtype: torch.dtype,
    *,
    lowest: bool = True,
    promote: bool | None = None,
    config: A8Config | None = None,
) -> Tensor:
    """Return ``(codes * token_scale) @ w.T + bias``, ``(M, out_features)`` in ``dtype``; bitwise reproducible.

    Args:
        codes: ``(M, K)`` int8 or float8_e4m3fn, rows starting at multiples of 16 bytes, K at most 131,072.
        token_scale: ``(M,) float32``.
        weight: ``(N, K)`` in codes' dtype, K a multiple of 16; or int32, int4 codes in fragment order
            (:class:`lq_formats.layouts.Fragment8Layout`) for these tokens.
        scale: ``(N,)`` of an 8-bit weight; of int4 arranged as codes are.
        bias: ``(N,)`` in ``dtype``, or None.
        out_features: N.
        group_size: In features per scale, a multiple of 128; K for one scale a row.
        dtype: Of the result, bf16 or fp16.
        lowest: Whether the int4 code -8 may occur.
        promote: Whether to add up sums of 256 in features (4 bits: 128) apart; by default :func:`promotes`, always for groups.
        config: How to cut, for tuning; by default :func:`choice`.

    Raises:
        ShapeError: If there are too many tiles for one launch.
    """
    m, k = codes.shape
    activation = "int8" if codes.dtype == torch.int8 else "fp8"
    bits = 4 if weight.dtype == torch.int32 else 8
    grouped = group_size != k
    lowest = lowest and bits == 4 and activation == "fp8"
    if promote is None:
        promote = promotes(activation, grouped)
    variant = A8Variant(bits, activation, dtype, scale.dtype, grouped, lowest, promote)
    if config is None:
        arch, scale_bytes = Arch.of(codes.device), variant.scale_bytes
        config = choice(
            m, out_features, k, bits, activation, promote, grouped, scale_bytes, arch.sm_count, arch.name
        ).config
    stages, shared = ring(config.tokens, bits, variant.scale_bytes)
    y = codes.new_empty((m, out_features), dtype=dtype)
    partials: Tensor | int = 0
    arrivals: Tensor | int = 0
    if config.shared_tiles:
        partials, arrivals = workspace(
            codes.device,
            2 * config.workers * config.sharers * config.tokens * ROWS,
            config.shared_tiles * config.sharers,
        )
    share = config.tokens // config.sharers
    tail_map = tensor_map(codes, (m - 1) % share + 1, STEP)
    tokens_map = tensor_map(codes, share, STEP) if m > share else tail_map
    y_maps: tuple[TensorMap, ...] = ()
    if config.tokens >= _ASIDE_FROM:  # as the source has it; where y cannot be copied in bulk, nobody looks at the map
        y_maps = (tensor_map(y, min(_OUT_TOKENS, m), 64) if out_features % 8 == 0 else tail_map,)
    launch(
        "linear_a8",
        "linear_a8",
        (config.ctas * config.sharers, 1, 1),
        THREADS,
        shared,
        codes.device,
        tokens_map,
        tail_map,
        tokens_map if bits == 4 else tensor_map(weight, ROWS, STEP),
        weight,
        scale,
        token_scale,
        0 if bias is None else bias,
        y,
        partials,
        arrivals,
        *y_maps,
        m,
        out_features,
        k,
        group_size,
        stages,
        *work(*config.tiles(m, out_features), -(-k // STEP), config.raster, config.shared_tiles, config.workers),
        cluster=2 if config.multicast else 0,
        dependent=True,
        defines=(*variant.defines, *config.defines),
    )
    return y
