"""Quantizing to Q6_K: a scale for each group of 16 by search, in 8 bits under one factor a block. Layout: :mod:`.kquants`.

A group of 16 weights is ``x = s q`` with codes -32..31. Each scale is searched for the least squared error
(:mod:`lq_formats.ggml.importance`); the one of largest magnitude becomes ``s = -128`` of the block's factor ``d``, which is
rounded first, so that the others and all codes fit what is stored. An error counts as ``importance`` says, or without one the
same everywhere (ggml's search counts it by the square of the weight, which leaves a sixth more). Bytes differ from llama.cpp's:
its search visits other scales, and the order of its sums is its own.
"""

import torch
from torch import Tensor

from lq_formats.ggml.blocks import half_bytes, pack_nibbles, signed_extreme, split_blocks, stored_half
from lq_formats.ggml.importance import by_chunks, counted, finite_reciprocal, search_scale, split_importance
from lq_formats.ggml.kquants import SUPER_BLOCK

_GROUP = 16
_SHARES = tuple(sign * (28 + 0.25 * step) for sign in (-1, 1) for step in range(25 if sign < 0 else 21))


def quantize_q6_k(x: Tensor, importance: Tensor | None = None) -> Tensor:
    """Quantize ``(..., K)`` floats to Q6_K blocks ``(..., K // 256, 210) uint8``.

    Args:
        x: Floating point weights, K a multiple of 256.
        importance: ``(K,)``, how much an error in a column counts; see :mod:`lq_formats.ggml.importance`.

    Raises:
        DTypeError, ShapeError, NonFiniteError: If ``x`` is not finite floats with K a multiple of 256.
        SpecError: If ``importance`` holds negative numbers.
    """
    blocks = split_blocks(x, "quantize_q6_k", block_size=SUPER_BLOCK)
    counts = None if importance is None else split_importance(importance, x, SUPER_BLOCK)
    return by_chunks(_search, blocks, counts)


def _search(blocks: Tensor, importance: Tensor | None) -> Tensor:
    # In units of the block's largest weight: squares neither overflow nor vanish.
    unit = counted(blocks, importance).abs().amax(dim=-1, keepdim=True)
    groups = _groups((blocks * finite_reciprocal(unit)).clamp_(-2, 2))  # only what does not count is beyond 1
    weight = None if importance is None else _groups(importance)
    scales = search_scale(groups, weight, _SHARES, _levels).squeeze(-1)
    largest = signed_extreme(scales)
    d = stored_half(largest / -128 * unit)
    per_unit = d * finite_reciprocal(unit)
    s = (scales * finite_reciprocal(per_unit)).round_().nan_to_num_(0.0, 127.0, -128.0).clamp_(-128, 127)
    codes = (_levels(groups * finite_reciprocal(s * per_unit).unsqueeze(-1)) + 32).to(torch.uint8).flatten(-2)
    low = pack_nibbles((codes & 15).reshape(*codes.shape[:-1], 2, 128)).flatten(-2)
    upper = (codes >> 4).reshape(*codes.shape[:-1], 2, 4, 32)
    high = (upper[..., 0, :] | upper[..., 1, :] << 2 | upper[..., 2, :] << 4 | upper[..., 3, :] << 6).flatten(-2)
    return torch.cat((low, high, s.to(torch.int8).view(torch.uint8), half_bytes(d)), dim=-1)


def _levels(x: Tensor) -> Tensor:
    return x.round().nan_to_num_(0.0, 31.0, -32.0).clamp_(-32, 31)


def _groups(values: Tensor) -> Tensor:
    """Return ``(..., 256)`` as ``(..., 16, 16)``."""
    return values.reshape(*values.shape[:-1], SUPER_BLOCK // _GROUP, _GROUP)
