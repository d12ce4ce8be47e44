"""What every ggml block codec shares: input checks, block views, fp16 fields and ggml's rounding."""

from typing import Final

import torch
from torch import Tensor

from lq_formats.errors import DTypeError, ShapeError
from lq_formats.validation import FLOAT_DTYPES, check_finite, check_float, check_tensor

BLOCK_SIZE: Final = 32
_LEAST_HALF = 2.0**-24


def split_blocks(x: Tensor, name: str, check: bool = True, block_size: int = BLOCK_SIZE) -> Tensor:
    """Return ``x: (..., K)`` as float32 blocks ``(..., K // block_size, block_size)``.

    Raises:
        DTypeError: If ``x`` is not floating point.
        ShapeError: If K is not a positive multiple of ``block_size``.
        NonFiniteError: If ``check`` and ``x`` holds NaN or infinity, or float64 values beyond float32.
    """
    check_float(x, f"the input of {name}")
    if x.dim() == 0 or x.shape[-1] == 0 or x.shape[-1] % block_size:
        raise ShapeError(
            f"the input of {name} has shape {tuple(x.shape)}: the last dimension must be a positive multiple of "
            f"{block_size}; pad it or keep this tensor in floating point"
        )
    values = x.detach().to(torch.float32)
    if check:
        check_finite(values, f"the input of {name}, as float32,")
    return values.reshape(*x.shape[:-1], x.shape[-1] // block_size, block_size)


def check_blocks(data: Tensor, type_size: int, name: str, dtype: torch.dtype) -> None:
    """Raise unless ``data`` is ``(..., blocks, type_size) uint8`` and ``dtype`` is a floating dtype."""
    check_tensor(data, f"{name} blocks")
    if data.dtype != torch.uint8:
        raise DTypeError(f"{name} blocks have dtype {data.dtype}: expected uint8 bytes")
    if data.dim() < 2 or data.shape[-1] != type_size:
        raise ShapeError(f"{name} blocks have shape {tuple(data.shape)}: expected (..., blocks, {type_size}) bytes")
    if dtype not in FLOAT_DTYPES:
        raise DTypeError(f"{name} cannot be dequantized to {dtype}: expected a floating point dtype")


def merge_blocks(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``(..., blocks, block size)`` values as ``(..., K)`` of ``dtype``."""
    return values.reshape(*values.shape[:-2], values.shape[-2] * values.shape[-1]).to(dtype)


def half_bytes(value: Tensor) -> Tensor:
    """Round float32 ``(..., blocks, 1)`` to fp16 (nearest even) and return its two bytes ``(..., blocks, 2)``."""
    return value.to(torch.float16).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def stored_half(value: Tensor) -> Tensor:
    """Return float32 scales as fp16 fields hold them: the least number that they can in place of 0, infinity beyond.

    With a scale of 0 a block of small weights would be lost, which codes beside a larger one still tell apart.
    """
    rounded = value.to(torch.float16).to(torch.float32)
    return torch.where((rounded == 0) & (value != 0), value.sign() * _LEAST_HALF, rounded)


def read_half(data: Tensor, offset: int) -> Tensor:
    """Read the fp16 at byte ``offset`` of each block as float32 ``(..., blocks, 1)``."""
    return data[..., offset : offset + 2].contiguous().view(torch.float16).to(torch.float32)


def reciprocal(d: Tensor) -> Tensor:
    """Return ``1 / d`` in float32, and 0 where ``d`` is 0."""
    return torch.where(d == 0, torch.zeros_like(d), 1.0 / d)


def truncate_codes(x: Tensor, max_code: int) -> Tensor:
    """Truncate to codes in [0, max_code], uint8; ``x`` is not negative, infinite or NaN.

    Infinity and NaN appear where 1 / d overflowed float32 (d below 2.9e-39). The stored fp16 scale is 0 there and the
    code does not matter: it is 0, as in gguf-py.
    """
    return torch.trunc(x).nan_to_num_(0.0, 0.0, 0.0).clamp_(0, max_code).to(torch.uint8)


def round_half_away(x: Tensor) -> Tensor:
    """Round to the nearest integer, ties away from zero: C's ``roundf``, which ``torch.round`` is not."""
    magnitude = x.abs()
    floor = magnitude.floor()
    return torch.copysign(floor + (2 * (magnitude - floor)).floor(), x)


def round_codes(x: Tensor) -> Tensor:
    """Return ``x`` rounded half away from zero as int8 codes; infinity and NaN, where 1 / d overflowed, become 0."""
    return round_half_away(x).nan_to_num_(0.0, 0.0, 0.0).to(torch.int8)


def signed_extreme(blocks: Tensor) -> Tensor:
    """Return the element of largest magnitude of each block with its sign, the first of equals: ``(..., 1)``."""
    first = blocks.abs().argmax(dim=-1, keepdim=True)  # torch.argmax: the first of equals
    return blocks.gather(-1, first)


def first_of(blocks: Tensor, value: Tensor) -> Tensor:
    """Return the first element of each block that equals ``value: (..., 1)``, which is one of them: ``(..., 1)``.

    C's scan for a minimum or maximum keeps the first of equals, and the sign of a zero is stored. torch's own reductions
    may return either of 0.0 and -0.0 (on CUDA they do).
    """
    order = torch.arange(BLOCK_SIZE, 0, -1, device=blocks.device)
    first = ((blocks == value) * order).argmax(dim=-1, keepdim=True)
    return blocks.gather(-1, first)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack ``(..., 2 n)`` codes: element j in the low nibble of byte j, element j + n in the high nibble. n is 16 mostly."""
    low, high = codes.to(torch.uint8).chunk(2, dim=-1)
    return low | high << 4


def unpack_nibbles(octets: Tensor) -> Tensor:
    """Undo :func:`pack_nibbles`: ``(..., n) uint8`` to ``(..., 2 n) uint8``."""
    return torch.cat((octets & 0x0F, octets >> 4), dim=-1)


def pack_fifth_bits(codes: Tensor) -> Tensor:
    """Collect bit 4 of ``(..., 32)`` codes: bit j of a little-endian u32 is element j; returns ``(..., 4)`` bytes."""
    bits = (codes.to(torch.uint8) >> 4 & 1).reshape(*codes.shape[:-1], 4, 8)
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (bits * weights).sum(dim=-1, dtype=torch.uint8)


def unpack_fifth_bits(octets: Tensor) -> Tensor:
    """Undo :func:`pack_fifth_bits`: ``(..., 4)`` bytes to ``(..., 32)`` codes of 0 or 16."""
    shifts = torch.arange(8, dtype=torch.uint8, device=octets.device)
    bits = octets.unsqueeze(-1) >> shifts & 1
    return bits.reshape(*octets.shape[:-1], BLOCK_SIZE) << 4
