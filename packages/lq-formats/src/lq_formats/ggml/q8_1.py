"""Q8_1: ggml's format for activations, 36 bytes for 32 elements.

::

    byte  0     2     4                36
          | d:2 | s:2 | qs:32 int8     |      x = q d,  s = d * sum(q)

``d = max|x| / 127`` in float32; ``q = round(x * (1 / d))``, half away from zero; ``s`` is the float32 product of the
*unrounded* ``d`` and the integer sum of the codes. Both are then stored as fp16, nearest even. ``s`` lets a product
with an unsigned 4-bit weight block skip the subtraction of 8: ``d4 * (d8 * sum(q4 q8) - 8 s)``. (Taking ``s`` from the
sum of the floats instead, as some kernels do, costs accuracy.)

``d`` beyond fp16 (|x| above 8.3e6) is stored as infinity, and so is ``s``, which can happen from |x| = 2048 on if
nearly all of a block is that large and of one sign. Where 1 / d overflows float32 (|x| below 3.7e-37), d, s and all
codes are 0.
"""

import torch
from torch import Tensor

from lq_formats.division import divide
from lq_formats.ggml.blocks import (
    check_blocks,
    half_bytes,
    merge_blocks,
    read_half,
    reciprocal,
    round_codes,
    split_blocks,
)


def quantize_q8_1(x: Tensor, *, check: bool = True) -> Tensor:
    """Quantize ``(..., K)`` floats to Q8_1 blocks ``(..., K // 32, 36) uint8``.

    Args:
        x: Floating point activations, K a multiple of 32.
        check: Refuse NaN and infinity. Without it their codes are unspecified (but ``d`` is not finite, so products
            with such a block are not finite either).

    Raises:
        DTypeError, ShapeError, NonFiniteError: If ``x`` is not finite floats with K a multiple of 32.
    """
    blocks = split_blocks(x, "quantize_q8_1", check)
    d = divide(blocks.abs().amax(dim=-1, keepdim=True), 127)
    codes = round_codes(blocks * reciprocal(d))
    s = codes.sum(dim=-1, keepdim=True, dtype=torch.int32).to(torch.float32) * d
    return torch.cat((half_bytes(d), half_bytes(s), codes.view(torch.uint8)), dim=-1)


def dequantize_q8_1(data: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the ``(..., K)`` values of Q8_1 blocks ``(..., K // 32, 36) uint8``: ``q d``.

    Raises:
        DTypeError, ShapeError: If ``data`` is not uint8 blocks of 36 bytes.
    """
    check_blocks(data, 36, "Q8_1", dtype)
    codes = data[..., 4:].contiguous().view(torch.int8).to(torch.float32)
    return merge_blocks(codes * read_half(data, 0), dtype)
