"""Launch ``src/wgmma_a16.cu``: many tokens times an int4 or int8 weight in fragment order, on Hopper."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from lq_formats import ShapeError
from lq_formats.layouts.fragment import BLOCK_BYTES, BLOCK_ROWS
from torch import Tensor

from lq_kernels.cuda.variant import Variant
from lq_kernels.jit.launcher import launch
from lq_kernels.jit.tensor_map import tensor_map
from lq_kernels.problem import Arch

THREADS = 384
TILES = ((16, 128), (32, 128), (64, 128), (64, 256), (128, 128), (128, 256), (256, 128))
"""Tokens and out features of every tile that the source is written for: a thread holds at most 128 sums."""
CLUSTERS = (1, 2, 4, 8)

_SHARED = {1: 232448, 2: 115712}
"""Bytes of shared memory that each of so many CTAs of an SM can have."""
_MAX_STAGES = 16
_BARRIERS = (2 * _MAX_STAGES + 2) * 8
_MAX_TILES = 1 << 30

# Clocks, from the H200's data: 4096 bf16 operations a clock and SM; L2 serves 24 bytes a clock and SM, DRAM 17.
_L2 = 24.0
_DRAM = 17.0
_UNPACK = 20.0  # a fragment of 64 x 16 weights, on all four schedulers
_CONTENTION = 0.1  # of the time of loading that products lose to it
_START = 1500.0  # until the first product
_EXCHANGE = 1500.0  # synchronizing a cluster


@dataclass(frozen=True)
class WgmmaConfig:
    """How a product is cut.

    Attributes:
        tokens: Tokens of a tile.
        rows: Out features of a tile.
        cluster: CTAs in a cluster.
        clusters: Clusters in the grid; each takes tile after tile.
        raster: Row tiles (or pairs) in a band; a band's tiles are taken for all tokens before the next band's.
        multicast: The two CTAs of a cluster have neighbouring rows and load their tokens for each other. Otherwise a
            cluster has one tile, and its CTAs share K.
    """

    tokens: int
    rows: int
    cluster: int
    clusters: int
    raster: int
    multicast: bool = False

    @property
    def cluster_rows(self) -> int:
        """Out features of a cluster."""
        return self.rows * (self.cluster if self.multicast else 1)

    @property
    def k_parts(self) -> int:
        """CTAs that share K."""
        return 1 if self.multicast else self.cluster

    def tiles(self, m: int, n: int) -> tuple[int, int]:
        """Return how many clusters' tiles of rows and of tokens there are."""
        return -(-n // self.cluster_rows), -(-m // self.tokens)

    @property
    def ctas(self) -> int:
        """CTAs that fit a multiprocessor."""
        return 2 if self.tokens <= 64 and self.rows == 128 else 1

    @property
    def defines(self) -> tuple[str, ...]:
        """``NAME=VALUE`` of the macros."""
        return (f"LQ_TOKENS={self.tokens}", f"LQ_ROWS={self.rows}", f"LQ_MULTICAST={int(self.multicast)}")


def ring(config: WgmmaConfig, bits: int, scale_bytes: int) -> tuple[int, int]:
    """Return the stages of a CTA's ring and the bytes of its shared memory.

    Args:
        config: The cut.
        bits: 4 or 8.
        scale_bytes: Bytes of scales and zeros beside the codes of a block and K step.
    """
    step, blocks = 512 // bits, config.rows // BLOCK_ROWS
    codes = config.tokens * step * 2 + blocks * BLOCK_BYTES
    scales = blocks * scale_bytes
    chunk = 16 if config.tokens in (16, 256) else 32
    fixed = 2 * chunk * (config.rows + 16) + _BARRIERS
    stages = min(_MAX_STAGES, (_SHARED[config.ctas] - fixed) // (codes + scales))
    return stages, fixed + stages * (codes + scales)


@functools.lru_cache(maxsize=4096)
def wgmma_config(m: int, n: int, k: int, bits: int, sm_count: int) -> WgmmaConfig:
    """Return the fastest cut by a model.

    Args:
        m: Tokens.
        n: Out features.
        k: In features.
        bits: 4 or 8.
        sm_count: Multiprocessors.

    Raises:
        ShapeError: If there are too many tiles to count.
    """
    best = min(candidates(m, n, k, bits, sm_count), key=lambda config: cost(config, m, n, k, bits, sm_count))
    row_tiles, token_tiles = best.tiles(m, n)
    if row_tiles * token_tiles > _MAX_TILES:
        raise ShapeError(f"M={m}, N={n}: too many results for one launch; split the tokens")
    return best


def candidates(m: int, n: int, k: int, bits: int, sm_count: int) -> Iterator[WgmmaConfig]:
    """Yield every cut that makes sense."""
    for tokens, rows in TILES:
        # Half-empty tiles only waste.
        if tokens > 16 and 2 * m <= tokens:
            continue
        for cluster, multicast in [(cluster, False) for cluster in CLUSTERS] + [(2, True)]:
            shape = WgmmaConfig(tokens, rows, cluster, 1, 1, multicast)
            if shape.k_parts > _steps(k, bits) or (multicast and n <= rows):
                continue
            row_tiles, token_tiles = shape.tiles(m, n)
            clusters = min(row_tiles * token_tiles, _clusters(sm_count, cluster) * shape.ctas)
            # What runs at once reads `height` strips of weights and clusters / height strips of x: least where both are equal.
            height = math.sqrt(clusters * tokens * 16 / (shape.cluster_rows * bits))
            bands = max(1, round(row_tiles / height))
            yield replace(shape, clusters=clusters, raster=-(-row_tiles // bands))


def cost(config: WgmmaConfig, m: int, n: int, k: int, bits: int, sm_count: int) -> float:
    """Return the clocks that a product takes by a model: only the order of its answers matters."""
    row_tiles, token_tiles = config.tiles(m, n)
    waves = -(-row_tiles * token_tiles // config.clusters)
    # CTAs that share a multiprocessor also share its time.
    share = min(config.ctas, -(-config.clusters * config.cluster // sm_count))
    slices = -(-_steps(k, bits) // config.k_parts) * (32 // bits)  # of 16 in features, of a CTA
    products = config.rows * config.tokens / 128
    unpacking = config.rows / 64 * _UNPACK
    loading = (config.tokens * 32 / (2 if config.multicast else 1) + config.rows * bits * 2) / _L2
    tile = slices * share * (max(products, unpacking, loading) + _CONTENTION * loading)
    if config.k_parts > 1:
        # Every CTA reads its share of the partial sums of all.
        out = _EXCHANGE + share * config.tokens * config.rows * 4 / _L2
    else:
        out = 500.0 + 8.0 * config.tokens * config.rows / 128
    weights = n * k * bits / 8 / (sm_count * _DRAM)
    return _START + max(waves * (tile + out), weights)


def _steps(k: int, bits: int) -> int:
    """Return the K steps of the packed weight."""
    return -(-k // (512 // bits))


def _clusters(sm_count: int, cluster: int) -> int:
    """Return how many clusters run at once, a CTA a multiprocessor: graphics processing clusters have 16 or 18 of them."""
    return max(1, sm_count // cluster if cluster <= 2 else sm_count // 16 * 16 // cluster)


def linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    bits: int,
    config: WgmmaConfig | None = None,
) -> Tensor:
    """Return ``x (M, K) @ w.T + bias``, ``(M, out_features)`` in x's dtype; bitwise reproducible.

    A group's scale and zero are rounded to x's dtype; one scale a row is not.

    Args:
        x: ``(M, K)`` bf16 or fp16, K a multiple of 8.
        packed: The weight in fragment order (:class:`lq_formats.layouts.FragmentLayout`).
        scale: ``(groups, rows)``, arranged alike.
        zero: As ``scale``, in its dtype; None for symmetric weights. 4 bits only.
        bias: ``(out_features,)`` in x's dtype, or None.
        out_features: Rows of the weight.
        group_size: In features per scale; K for one scale a row.
        bits: 4 or 8.
        config: How to cut, for tuning; by default :func:`wgmma_config`.

    Raises:
        ShapeError: If there are too many tiles for one launch.
    """
    m, k = x.shape
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    variant = Variant.of(x.dtype, scale.dtype, bits, group_size, k, zero is not None)
    if config is None:
        config = wgmma_config(m, out_features, k, bits, Arch.of(x.device).sm_count)
    scale_bytes = variant.groups * BLOCK_ROWS * scale.element_size() * (1 if zero is None else 2)
    stages, shared = ring(config, bits, scale_bytes)
    y = torch.empty((m, out_features), dtype=x.dtype, device=x.device)
    launch(
        "wgmma_a16",
        "wgmma_a16",
        (config.cluster * config.clusters, 1, 1),
        THREADS,
        shared,
        x.device,
        tensor_map(x, config.tokens // (2 if config.multicast else 1), 64),
        packed,
        scale,
        0 if zero is None else zero,
        0 if bias is None else bias,
        y,
        m,
        out_features,
        k,
        packed.shape[1],
        group_size,
        stages,
        config.raster,
        cluster=config.cluster,
        dependent=True,
        defines=(*variant.defines, *config.defines),
    )
    return y
