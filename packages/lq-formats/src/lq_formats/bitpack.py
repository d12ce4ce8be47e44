"""Dense bit packing: a stream of n-bit codes with no gaps, for any n from 1 to 8.

Code ``i`` of a row occupies bits ``n*i`` to ``n*i + n - 1`` of the row's bit stream; bit ``b`` of the stream is bit
``b % 8`` (least significant first) of byte ``b // 8``. With n = 3::

    byte      0                 1                 2
    bit   7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0
          2 2|1 1 1|0 0 0   5|4 4 4|3 3 3|2   7 7 7|6 6 6|5 5        (which code the bit belongs to)

An int32 item holds four such bytes, little-endian. Unused bits at the end of a row are 0.
"""

import torch
from torch import Tensor

from lq_formats.errors import DTypeError, ShapeError, SpecError

_ITEM_BYTES = {torch.uint8: 1, torch.int32: 4}


def packed_items(count: int, bits: int, dtype: torch.dtype = torch.uint8) -> int:
    """Return how many items of ``dtype`` hold ``count`` codes of ``bits`` bits."""
    _check(bits, dtype)
    return -(-count * bits // (8 * _ITEM_BYTES[dtype]))


def pack_bits(codes: Tensor, bits: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Pack codes along the last dimension.

    Args:
        codes: ``(..., count) uint8`` in ``[0, 2**bits - 1]``.
        bits: 1 to 8.
        dtype: ``torch.uint8`` or ``torch.int32``.

    Returns:
        ``(..., packed_items(count, bits, dtype))`` of ``dtype``.

    Raises:
        SpecError: If ``bits`` is not in 1 to 8.
        DTypeError: If ``codes`` is not uint8 or ``dtype`` is not uint8 or int32.
        ShapeError: If ``codes`` has no dimension, or a code does not fit ``bits`` bits.
    """
    _check(bits, dtype)
    if codes.dtype != torch.uint8:
        raise DTypeError(f"codes have dtype {codes.dtype}: expected uint8")
    if codes.dim() == 0:
        raise ShapeError("codes is a scalar: expected at least one dimension")
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise ShapeError(f"a code of {int(codes.max())} does not fit {bits} bits")
    lead, count = codes.shape[:-1], codes.shape[-1]
    items = packed_items(count, bits, dtype)
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = ((codes.unsqueeze(-1) >> shifts) & 1).reshape(*lead, count * bits)
    stream = torch.nn.functional.pad(stream, (0, items * _ITEM_BYTES[dtype] * 8 - count * bits))
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=codes.device)
    packed = (stream.reshape(*lead, -1, 8) * weights).sum(dim=-1, dtype=torch.uint8)
    return packed if dtype == torch.uint8 else packed.contiguous().view(torch.int32)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Unpack codes along the last dimension; the inverse of :func:`pack_bits`.

    Args:
        packed: ``(..., packed_items(count, bits, dtype))`` uint8 or int32.
        bits: 1 to 8.
        count: Codes in a row.

    Returns:
        ``(..., count) uint8``.

    Raises:
        SpecError: If ``bits`` is not in 1 to 8.
        DTypeError: If ``packed`` is neither uint8 nor int32.
        ShapeError: If the number of items is not what ``count`` codes need.
    """
    _check(bits, packed.dtype)
    expected = packed_items(count, bits, packed.dtype)
    if packed.dim() == 0 or packed.shape[-1] != expected:
        raise ShapeError(f"packed has shape {tuple(packed.shape)}: {count} codes of {bits} bits need {expected} items")
    octets = packed.contiguous().view(torch.uint8)
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((octets.unsqueeze(-1) >> shifts) & 1).reshape(*packed.shape[:-1], -1)[..., : count * bits]
    weights = 1 << torch.arange(bits, dtype=torch.uint8, device=packed.device)
    return (stream.reshape(*packed.shape[:-1], count, bits) * weights).sum(dim=-1, dtype=torch.uint8)


def _check(bits: int, dtype: torch.dtype) -> None:
    if not 1 <= bits <= 8:
        raise SpecError(f"bits={bits}: expected 1 to 8")
    if dtype not in _ITEM_BYTES:
        raise DTypeError(f"packed dtype {dtype}: expected torch.uint8 or torch.int32")
