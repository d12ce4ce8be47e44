"""Launch ``src/prefill_a16.cu``: many tokens times an int4 or int8 weight in fragment order, on Hopper."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from lq_kernels.cuda.variant import Variant
from lq_kernels.jit.launcher import launch
from lq_kernels.jit.tensor_map import tensor_map
from lq_kernels.problem import Arch

THREADS = 384
TOKEN_TILES = (64, 128, 256)
_BLOCKS = 8
_BLOCK_BYTES = 1024
_ROW_TILE = 128
_STAGING = 2 * 64 * 144


@dataclass(frozen=True)
class PrefillConfig:
    """How a product is cut.

    Attributes:
        tokens: Tokens in a tile: 64, 128 or 256.
        cluster: CTAs that share K; above 1 every cluster has one tile.
        ctas: CTAs in the grid.
    """

    tokens: int
    cluster: int
    ctas: int


def prefill_config(m: int, blocks: int, k: int, bits: int, sm_count: int) -> PrefillConfig:
    """Return the fastest cut by a model in clocks.

    A k16 step of a tile takes a clock a token on the tensor cores, and at least 72 clocks to unpack. A tile costs 2000 clocks
    besides, and 12 a token to store; a cluster's reduction 1500 and 12 a token.

    Args:
        m: Tokens.
        blocks: Blocks of 16 rows.
        k: In features.
        bits: 4 or 8.
        sm_count: Multiprocessors.
    """
    return _best(m, blocks, k, bits, sm_count)[1]


@functools.lru_cache(maxsize=4096)
def _best(m: int, blocks: int, k: int, bits: int, sm_count: int) -> tuple[float, PrefillConfig]:
    steps = -(-k // (512 // bits))
    best: tuple[float, PrefillConfig] | None = None
    for tokens in TOKEN_TILES:
        tiles = -(-blocks // _BLOCKS) * -(-m // tokens)
        for cluster in (1, 2, 4, 8):
            room = sm_count if cluster <= 2 else sm_count - 12
            if cluster > 1 and (cluster > steps or tiles * cluster > room):
                continue
            waves = -(-tiles // sm_count) if cluster == 1 else 1
            products = -(-steps // cluster) * (512 // bits) / 16 * max(tokens, 72)
            cost = waves * (products + 2000 + 12 * tokens) + (1500 + 12 * tokens if cluster > 1 else 0)
            if best is None or cost < best[0]:
                best = (cost, PrefillConfig(tokens, cluster, min(tiles, sm_count) if cluster == 1 else tiles * cluster))
    assert best is not None
    return best


def prefill_clocks(m: int, blocks: int, k: int, bits: int, sm_count: int) -> float:
    """Return the clocks that the model gives the fastest cut."""
    return _best(m, blocks, k, bits, sm_count)[0]


def shared_bytes(tokens: int, variant: Variant, scale_size: int) -> int:
    """Return the shared memory of a CTA; the numbers of stages are those of the source."""
    weight_stage = _BLOCKS * (_BLOCK_BYTES + variant.groups * 16 * scale_size * (2 if variant.zero else 1))
    token_stages = 5 if tokens == 256 else 8
    weight_stages = 3 + (weight_stage <= 9216) if tokens == 256 else 6
    return 1024 + token_stages * tokens * 128 + weight_stages * weight_stage + _STAGING


def linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    bits: int,
) -> Tensor:
    """Return ``x (M, K) @ w.T + bias``, ``(M, out_features)`` in x's dtype; bitwise reproducible.

    Arguments are those of :func:`lq_kernels.cuda.decode_a16.linear`.
    """
    m, k = x.shape
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    variant = Variant.of(x.dtype, scale.dtype, bits, group_size, k, zero is not None)
    blocks = packed.shape[1]
    config = prefill_config(m, blocks, k, bits, Arch.of(x.device).sm_count)
    y = torch.empty((m, out_features), dtype=x.dtype, device=x.device)
    launch(
        "prefill_a16",
        "prefill_a16",
        (config.ctas, 1, 1),
        THREADS,
        shared_bytes(config.tokens, variant, scale.element_size()),
        x.device,
        tensor_map(x, config.tokens, 64),
        packed,
        scale,
        0 if zero is None else zero,
        0 if bias is None else bias,
        y,
        m,
        out_features,
        k,
        blocks,
        group_size,
        cluster=config.cluster,
        dependent=True,
        defines=(*variant.defines, f"LQ_TOKENS={config.tokens}"),
    )
    return y
