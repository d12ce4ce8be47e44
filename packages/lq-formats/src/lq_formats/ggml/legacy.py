"""ggml's "legacy" block formats: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0, byte for byte.

A block is 32 consecutive elements. Byte layouts (``d`` and ``m`` are little-endian fp16)::

    Q4_0 (18)   d:2 | qs:16                   x = (q - 8) d
    Q4_1 (20)   d:2 | m:2 | qs:16             x = q d + m
    Q5_0 (22)   d:2 | qh:4 | qs:16            x = (q - 16) d
    Q5_1 (24)   d:2 | m:2 | qh:4 | qs:16      x = q d + m
    Q8_0 (34)   d:2 | qs:32 int8              x = q d

    qs[j]       7..4: element j + 16   3..0: element j
    qh          bit j: fifth bit of element j

Numerics that the bytes depend on, from ggml's reference quantizers:

- Everything is float32, and division, multiplication and addition round separately: a fused multiply-add changes bytes,
  and so does a division replaced by a multiplication. Eager torch keeps the steps apart on every device; a compiler
  that fuses them need not, so quantize outside of ``torch.compile``.
- Codes are computed with the reciprocal of the *unrounded* scale; the scale is then stored as fp16, nearest even.
- Q4_0 and Q5_0 take the element of largest magnitude *with its sign* (the first of equals), ``d = extreme / -8`` (-16),
  so it gets code 0. A block of zeros stores ``d = -0.0`` (bytes 00 80) and the middle code (0x88). Only if its first
  element is -0.0 it stores +0.0, as in gguf-py; ggml in C does not tell the two zeros apart.
- Q4_1 and Q5_1 store the first of equal minima, as ggml does in C. That shows only where a minimum of zero occurs with
  both signs: numpy, and so gguf-py, then stores either zero. The values are the same.
- ``trunc(x / d + 8.5)``: ties go up in code space. Q8_0 rounds half away from zero.

A scale (or ``m``) beyond fp16 is stored as infinity, as ggml does, and such a block dequantizes to infinities and NaN:
byte equality comes first here, and refusing such a weight is up to the caller. NaN and infinity in the input are
refused, since their bytes are not portable.
"""

import torch
from torch import Tensor

from lq_formats.division import divide
from lq_formats.ggml.blocks import (
    BLOCK_SIZE,
    check_blocks,
    first_of,
    half_bytes,
    merge_blocks,
    pack_fifth_bits,
    pack_nibbles,
    read_half,
    reciprocal,
    round_codes,
    signed_extreme,
    split_blocks,
    truncate_codes,
    unpack_fifth_bits,
    unpack_nibbles,
)
from lq_formats.ggml.importance import by_chunks, finite_reciprocal, search_scale, split_importance

# Levels that a search of Q4_0's scale gives to the extreme of a block: codes reach -8 but only +7.
_SHARES = tuple(sign * (5 + 0.125 * step) for sign in (-1, 1) for step in range(33 if sign < 0 else 25))


def quantize_q4_0(x: Tensor, importance: Tensor | None = None) -> Tensor:
    """Quantize ``(..., K)`` floats to Q4_0 blocks ``(..., K // 32, 18) uint8``.

    Args:
        x: Floating point weights, K a multiple of 32.
        importance: ``(K,)``, how much an error in a column counts: scales are searched for the least of it. None for
            the bytes of ggml's reference.

    Raises:
        DTypeError, ShapeError, NonFiniteError: If ``x`` is not finite floats with K a multiple of 32.
        SpecError: If ``importance`` holds negative numbers.
    """
    blocks = split_blocks(x, "quantize_q4_0")
    if importance is not None:
        return by_chunks(_search_q4_0, blocks, split_importance(importance, x, BLOCK_SIZE))
    d = divide(signed_extreme(blocks), -8)
    codes = truncate_codes(blocks * reciprocal(d) + 8.5, 15)
    return torch.cat((half_bytes(d), pack_nibbles(codes)), dim=-1)


def dequantize_q4_0(data: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the ``(..., K)`` values of Q4_0 blocks ``(..., K // 32, 18) uint8``: ``(q - 8) d``.

    Raises:
        DTypeError, ShapeError: If ``data`` is not uint8 blocks of 18 bytes.
    """
    check_blocks(data, 18, "Q4_0", dtype)
    codes = unpack_nibbles(data[..., 2:]).to(torch.float32) - 8
    return merge_blocks(codes * read_half(data, 0), dtype)


def quantize_q4_1(x: Tensor) -> Tensor:
    """Quantize ``(..., K)`` floats to Q4_1 blocks ``(..., K // 32, 20) uint8``; errors as :func:`quantize_q4_0`."""
    blocks = split_blocks(x, "quantize_q4_1")
    d, low, codes = _quantize_range(blocks, 15)
    return torch.cat((half_bytes(d), half_bytes(low), pack_nibbles(codes)), dim=-1)


def dequantize_q4_1(data: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the ``(..., K)`` values of Q4_1 blocks: ``q d + m``; errors as :func:`dequantize_q4_0`."""
    check_blocks(data, 20, "Q4_1", dtype)
    codes = unpack_nibbles(data[..., 4:]).to(torch.float32)
    return merge_blocks(codes * read_half(data, 0) + read_half(data, 2), dtype)


def quantize_q5_0(x: Tensor) -> Tensor:
    """Quantize ``(..., K)`` floats to Q5_0 blocks ``(..., K // 32, 22) uint8``; errors as :func:`quantize_q4_0`."""
    blocks = split_blocks(x, "quantize_q5_0")
    d = divide(signed_extreme(blocks), -16)
    codes = truncate_codes(blocks * reciprocal(d) + 16.5, 31)
    return torch.cat((half_bytes(d), pack_fifth_bits(codes), pack_nibbles(codes & 0x0F)), dim=-1)


def dequantize_q5_0(data: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the ``(..., K)`` values of Q5_0 blocks: ``(q - 16) d``; errors as :func:`dequantize_q4_0`."""
    check_blocks(data, 22, "Q5_0", dtype)
    codes = unpack_nibbles(data[..., 6:]) | unpack_fifth_bits(data[..., 2:6])
    return merge_blocks((codes.to(torch.float32) - 16) * read_half(data, 0), dtype)


def quantize_q5_1(x: Tensor) -> Tensor:
    """Quantize ``(..., K)`` floats to Q5_1 blocks ``(..., K // 32, 24) uint8``; errors as :func:`quantize_q4_0`."""
    blocks = split_blocks(x, "quantize_q5_1")
    d, low, codes = _quantize_range(blocks, 31)
    fifth, nibbles = pack_fifth_bits(codes), pack_nibbles(codes & 0x0F)
    return torch.cat((half_bytes(d), half_bytes(low), fifth, nibbles), dim=-1)


def dequantize_q5_1(data: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the ``(..., K)`` values of Q5_1 blocks: ``q d + m``; errors as :func:`dequantize_q4_0`."""
    check_blocks(data, 24, "Q5_1", dtype)
    codes = unpack_nibbles(data[..., 8:]) | unpack_fifth_bits(data[..., 4:8])
    return merge_blocks(codes.to(torch.float32) * read_half(data, 0) + read_half(data, 2), dtype)


def quantize_q8_0(x: Tensor) -> Tensor:
    """Quantize ``(..., K)`` floats to Q8_0 blocks ``(..., K // 32, 34) uint8``; errors as :func:`quantize_q4_0`."""
    blocks = split_blocks(x, "quantize_q8_0")
    d = divide(blocks.abs().amax(dim=-1, keepdim=True), 127)
    codes = round_codes(blocks * reciprocal(d))
    return torch.cat((half_bytes(d), codes.view(torch.uint8)), dim=-1)


def dequantize_q8_0(data: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the ``(..., K)`` values of Q8_0 blocks: ``q d``; errors as :func:`dequantize_q4_0`."""
    check_blocks(data, 34, "Q8_0", dtype)
    codes = data[..., 2:].contiguous().view(torch.int8).to(torch.float32)
    return merge_blocks(codes * read_half(data, 0), dtype)


def _search_q4_0(blocks: Tensor, importance: Tensor | None) -> Tensor:
    d = search_scale(blocks, importance, _SHARES, lambda levels: levels.round_().clamp_(-8, 7))
    codes = (blocks * finite_reciprocal(d)).round_().clamp_(-8, 7) + 8
    return torch.cat((half_bytes(d), pack_nibbles(codes)), dim=-1)


def _quantize_range(blocks: Tensor, max_code: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``d``, ``m`` and uint8 codes of the formats that store a minimum (Q4_1, Q5_1)."""
    low = first_of(blocks, blocks.amin(dim=-1, keepdim=True))
    high = first_of(blocks, blocks.amax(dim=-1, keepdim=True))
    d = divide(high - low, max_code)
    return d, low, truncate_codes((blocks - low) * reciprocal(d) + 0.5, max_code)
