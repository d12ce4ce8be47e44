"""MXFP4: the OCP microscaling format in ggml's order, 17 bytes for 32 elements.

::

    byte  0     1                17
          | e:1 | qs:16          |      x = kv[q] 2^(e - 128)

    qs[j]   7..4: element j + 16   3..0: element j
    q       3: sign   2..0: kv = 0, 1, 2, 3, 4, 6, 8, 12   (twice the e2m1 values 0 .5 1 1.5 2 3 4 6)

``e = floor(log2(max|x|)) - 2 + 127`` with log2 rounded to float32, as ggml computes it: just below a power of two it is that
power's, and the largest element is then represented by the largest value. Each element takes the nearest value, the smaller of
two; what rounds to zero loses its sign. There is no scale to overflow: e is at most 253. Where e would be below 0, for
max|x| < 2^-125, ggml converts a negative float to a byte, which C leaves undefined; here e is 0.
"""

from itertools import pairwise

import torch
from torch import Tensor

from lq_formats.ggml.blocks import check_blocks, merge_blocks, pack_nibbles, split_blocks, unpack_nibbles

_VALUES = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)


def quantize_mxfp4(x: Tensor) -> Tensor:
    """Quantize ``(..., K)`` floats to MXFP4 blocks ``(..., K // 32, 17) uint8``.

    Raises:
        DTypeError, ShapeError, NonFiniteError: If ``x`` is not finite floats with K a multiple of 32.
    """
    blocks = split_blocks(x, "quantize_mxfp4")
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    exponent = largest.to(torch.float64).log2().to(torch.float32).floor() - 2 + 127
    e = torch.where(largest > 0, exponent, 0.0).clamp_(min=0).to(torch.uint8)
    magnitude = blocks.abs()
    codes = torch.zeros_like(blocks, dtype=torch.uint8)
    d = _factor(e)
    for low, high in pairwise(_VALUES):
        codes += magnitude > d * ((low + high) / 2)
    codes |= ((blocks < 0) & (codes > 0)).to(torch.uint8) << 3
    return torch.cat((e, pack_nibbles(codes)), dim=-1)


def dequantize_mxfp4(data: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the ``(..., K)`` values of MXFP4 blocks ``(..., K // 32, 17) uint8``; ``e`` = 255 is 2^127 as in ggml, not NaN.

    Raises:
        DTypeError, ShapeError: If ``data`` is not uint8 blocks of 17 bytes.
    """
    check_blocks(data, 17, "MXFP4", dtype)
    table = torch.tensor((*_VALUES, 0.0, *(-value for value in _VALUES[1:])), device=data.device)
    return merge_blocks(table[unpack_nibbles(data[..., 1:]).int()] * _factor(data[..., :1]), dtype)


def _factor(e: Tensor) -> Tensor:
    """Return ``2^(e - 128)`` of bytes, float32; subnormal for 0 and 1."""
    bits = torch.where(e < 2, 0x00200000 << e.int(), e.int() - 1 << 23)
    return bits.to(torch.int32).view(torch.float32)
