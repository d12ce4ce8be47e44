"""ggml's "K" formats: 256 weights a block, in groups whose scales are themselves quantized. Q2_K to Q6_K.

A block ("super-block") has one or two fp16 factors and a small integer scale for each group of 16 or 32 weights. Byte
layouts (``d`` and ``dmin`` are little-endian fp16; ``x`` is computed in float32, multiplication first, each step rounded)::

    Q2_K  (84)  scales:16 | qs:64 | d:2 | dmin:2                   x = (d s) q - (dmin m)        16 groups of 16
    Q3_K (110)  hmask:32 | qs:64 | scales:12 | d:2                 x = (d (s - 32)) (q - 4)      16 groups of 16
    Q4_K (144)  d:2 | dmin:2 | scales:12 | qs:128                  x = (d s) q - (dmin m)         8 groups of 32
    Q5_K (176)  d:2 | dmin:2 | scales:12 | qh:32 | qs:128          x = (d s) q - (dmin m)         8 groups of 32
    Q6_K (210)  ql:128 | qh:64 | scales:16 int8 | d:2              x = (d s) (q - 32)            16 groups of 16

Codes are spread so that 32 lanes read 32 consecutive bytes. With j = 0..31 a byte of a run of 32 bytes::

    2 bits (Q2_K qs, Q3_K qs)    run r, byte j, bits 2b+1..2b     weight 128 r + 32 b + j
    4 bits (Q4_K qs, Q5_K qs)    run r, byte j, low, high nibble  weights 64 r + j, 64 r + 32 + j
    4 bits (Q6_K ql)             run r of 64 bytes, byte j        low: weight 128 r + j, high: 128 r + 64 + j  (j = 0..63)
    third bit (Q3_K hmask)       byte j, bit b                    weight 32 b + j
    fifth bit (Q5_K qh)          byte j, bit b                    weight 32 b + j
    upper two (Q6_K qh)          run r, byte j, bits 2b+1..2b     weight 128 r + 32 b + j

Scales: Q2_K has ``s`` in the low and ``m`` in the high nibble. Q4_K and Q5_K pack eight 6-bit ``s`` and ``m`` into 12
bytes, Q3_K sixteen 6-bit ``s`` (:func:`pack_scale_min`, and the diagrams there). Q8_K and the codebook formats are not
here: Q8_K is for activations.
"""

from typing import Final

import torch
from torch import Tensor

from lq_formats.ggml.blocks import check_blocks, merge_blocks, read_half, unpack_nibbles

SUPER_BLOCK: Final = 256


def dequantize_q2_k(data: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the ``(..., K)`` values of Q2_K blocks ``(..., K // 256, 84) uint8``.

    Raises:
        DTypeError, ShapeError: If ``data`` is not uint8 blocks of 84 bytes.
    """
    check_blocks(data, 84, "Q2_K", dtype)
    scale = read_half(data, 80) * (data[..., :16] & 0x0F)
    low = read_half(data, 82) * (data[..., :16] >> 4)
    return _affine(_fields(data[..., 16:80], 2), scale, low, dtype)


def dequantize_q3_k(data: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the ``(..., K)`` values of Q3_K blocks of 110 bytes; errors as :func:`dequantize_q2_k`."""
    check_blocks(data, 110, "Q3_K", dtype)
    codes = _fields(data[..., 32:96], 2) | _fields(data[..., :32], 1) << 2
    # IIIIAAAA ... PPPPHHHH (8 bytes), then MMIIEEAA NNJJFFBB OOKKGGCC PPLLHHDD: low nibbles, upper bits of s[0..15].
    upper = torch.cat([data[..., 104:108] >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)
    scales = (unpack_nibbles(data[..., 96:104]) | upper << 4).to(torch.float32) - 32
    return _symmetric(codes.to(torch.float32) - 4, read_half(data, 108) * scales, dtype)


def dequantize_q4_k(data: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the ``(..., K)`` values of Q4_K blocks of 144 bytes; errors as :func:`dequantize_q2_k`."""
    check_blocks(data, 144, "Q4_K", dtype)
    scale, low = unpack_scale_min(data[..., 4:16])
    return _affine(_nibbles(data[..., 16:]), read_half(data, 0) * scale, read_half(data, 2) * low, dtype)


def dequantize_q5_k(data: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the ``(..., K)`` values of Q5_K blocks of 176 bytes; errors as :func:`dequantize_q2_k`."""
    check_blocks(data, 176, "Q5_K", dtype)
    scale, low = unpack_scale_min(data[..., 4:16])
    codes = _nibbles(data[..., 48:]) | _fields(data[..., 16:48], 1) << 4
    return _affine(codes, read_half(data, 0) * scale, read_half(data, 2) * low, dtype)


def dequantize_q6_k(data: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the ``(..., K)`` values of Q6_K blocks of 210 bytes; errors as :func:`dequantize_q2_k`."""
    check_blocks(data, 210, "Q6_K", dtype)
    codes = _nibbles(data[..., :128], run=64) | _fields(data[..., 128:192], 2) << 4
    scales = data[..., 192:208].contiguous().view(torch.int8).to(torch.float32)
    return _symmetric(codes.to(torch.float32) - 32, read_half(data, 208) * scales, dtype)


def unpack_scale_min(octets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 6-bit ``s`` and ``m`` ``(..., 8) uint8`` of Q4_K's and Q5_K's 12 scale bytes ``(..., 12)``.

    ::

        byte i (0..3)       7..6: s[i+4] bits 5..4   5..0: s[i]
        byte i + 4          7..6: m[i+4] bits 5..4   5..0: m[i]
        byte i + 8          7..4: m[i+4] bits 3..0   3..0: s[i+4] bits 3..0
    """
    first, second, third = octets[..., :4], octets[..., 4:8], octets[..., 8:]
    scale = torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=-1)
    low = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=-1)
    return scale, low


def pack_scale_min(scale: Tensor, low: Tensor) -> Tensor:
    """Undo :func:`unpack_scale_min`: ``(..., 8) uint8`` of 0..63 each to ``(..., 12)`` bytes."""
    first = scale[..., :4] | scale[..., 4:] >> 4 << 6
    second = low[..., :4] | low[..., 4:] >> 4 << 6
    return torch.cat((first, second, scale[..., 4:] & 15 | (low[..., 4:] & 15) << 4), dim=-1)


def _fields(octets: Tensor, bits: int) -> Tensor:
    """Return 256 codes of 1 or 2 bits: runs of 32 bytes, the lowest bits of all 32 first; ``(..., 256) uint8``."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=octets.device).unsqueeze(-1)
    runs = octets.reshape(*octets.shape[:-1], octets.shape[-1] // 32, 1, 32)
    return (runs >> shifts & (1 << bits) - 1).flatten(-3)


def _nibbles(octets: Tensor, run: int = 32) -> Tensor:
    """Return 256 codes of 4 bits: runs of bytes, the low nibbles of a run first; ``(..., 256) uint8``."""
    return unpack_nibbles(octets.reshape(*octets.shape[:-1], 128 // run, run)).flatten(-2)


def _affine(codes: Tensor, scale: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    return merge_blocks((_groups(codes, scale) * scale.unsqueeze(-1) - low.unsqueeze(-1)).flatten(-2), dtype)


def _symmetric(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return merge_blocks((_groups(codes, scale) * scale.unsqueeze(-1)).flatten(-2), dtype)


def _groups(codes: Tensor, scale: Tensor) -> Tensor:
    """Return codes ``(..., 256)`` as float32 ``(..., groups, group size)`` for scales ``(..., groups)``."""
    groups = scale.shape[-1]
    return codes.to(torch.float32).reshape(*codes.shape[:-1], groups, SUPER_BLOCK // groups)
