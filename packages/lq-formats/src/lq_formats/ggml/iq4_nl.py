"""IQ4_NL: 4-bit codes of a table that is finer near zero, 18 bytes for 32 elements.

::

    byte  0     2                18
          | d:2 | qs:16          |      x = d kv[q]

    qs[j]   7..4: element j + 16   3..0: element j
    kv      -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113

Quantizing searches ``d``: 39 candidates, which give the block's extreme a value from -140 to -80 or from 80 to 131, the codes
of each, and the scale that fits those codes best. There is no reference whose bytes to equal: llama.cpp's search visits
fewer candidates, and the order of its float additions is its own.
"""

from itertools import pairwise

import torch
from torch import Tensor

from lq_formats.ggml.blocks import (
    check_blocks,
    half_bytes,
    merge_blocks,
    pack_nibbles,
    read_half,
    split_blocks,
    stored_half,
    unpack_nibbles,
)
from lq_formats.ggml.importance import (
    by_chunks,
    counted,
    finite_reciprocal,
    ordered_sum,
    search_scale,
    split_importance,
)

_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_BOUNDS = tuple((low + high) / 2 for low, high in pairwise(_VALUES))
_NORMAL_HALF = 2.0**-14
_SHARES = tuple(float(value) for value in (*range(-140, -79, 3), *range(80, 132, 3)))


def quantize_iq4_nl(x: Tensor, importance: Tensor | None = None) -> Tensor:
    """Quantize ``(..., K)`` floats to IQ4_NL blocks ``(..., K // 32, 18) uint8``.

    Args:
        x: Floating point weights, K a multiple of 32.
        importance: ``(K,)``, how much an error in a column counts; see :mod:`lq_formats.ggml.importance`.

    Raises:
        DTypeError, ShapeError, NonFiniteError: If ``x`` is not finite floats with K a multiple of 32.
        SpecError: If ``importance`` holds negative numbers.
    """
    blocks = split_blocks(x, "quantize_iq4_nl")
    counts = None if importance is None else split_importance(importance, x, 32)
    return by_chunks(_search, blocks, counts)


def dequantize_iq4_nl(data: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the ``(..., K)`` values of IQ4_NL blocks ``(..., K // 32, 18) uint8``.

    Raises:
        DTypeError, ShapeError: If ``data`` is not uint8 blocks of 18 bytes.
    """
    check_blocks(data, 18, "IQ4_NL", dtype)
    return merge_blocks(_table(data)[unpack_nibbles(data[..., 2:]).int()] * read_half(data, 0), dtype)


def _search(blocks: Tensor, importance: Tensor | None) -> Tensor:
    table, bounds = _table(blocks), torch.tensor(_BOUNDS, device=blocks.device)
    d = search_scale(blocks, importance, _SHARES, lambda scaled: table[torch.bucketize(scaled, bounds, right=True)])
    small = d.abs() < _NORMAL_HALF
    d = torch.where(small, stored_half(d), d)  # a rounding that the codes should know of
    codes = torch.bucketize(blocks * finite_reciprocal(d), bounds, right=True)
    # Weights far below the least fp16 number are nearer to 0 than to the values of the table, which has no 0.
    values, scaled = table[codes], counted(blocks, importance) * finite_reciprocal(d)
    more = ordered_sum(values * (values - 2 * scaled) * (1.0 if importance is None else importance)) > 0
    d = torch.where(small & more, 0.0, d)
    return torch.cat((half_bytes(d), pack_nibbles(codes)), dim=-1)


def _table(like: Tensor) -> Tensor:
    return torch.tensor(_VALUES, dtype=torch.float32, device=like.device)
