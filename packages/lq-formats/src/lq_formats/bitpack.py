"""Dense bit packing: a stream of n-bit codes with no gaps, for any n from 1 to 8.

Code ``i`` of a row occupies bits ``n*i`` to ``n*i + n - 1`` of the row's bit stream; bit ``b`` of the stream is bit
``b % 8`` (least significant first) of byte ``b // 8``. With n = 3::

    byte      0                 1                 2
    bit   7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0
          2 2|1 1 1|0 0 0   5|4 4 4|3 3 3|2   7 7 7|6 6 6|5 5        (which code the bit belongs to)

An item of more than a byte (int16, int32) holds its bytes little-endian, so code ``i`` starts at bit ``n*i % 32`` of
int32 word ``n*i // 32``. Unused bits at the end of a row are 0.
"""

import torch
from torch import Tensor

from lq_formats.errors import DTypeError, ShapeError, SpecError
from lq_formats.validation import check_codes, check_tensor

_ITEM_BYTES = {torch.uint8: 1, torch.int16: 2, torch.int32: 4}


def packed_items(count: int, bits: int, dtype: torch.dtype = torch.uint8) -> int:
    """Return how many items of ``dtype`` (uint8, int16 or int32) hold ``count`` codes of ``bits`` bits."""
    _check(bits, dtype)
    if count < 0:
        raise ShapeError(f"count={count}: expected a number of codes")
    return -(-count * bits // (8 * _ITEM_BYTES[dtype]))


def pack_bits(codes: Tensor, bits: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Pack codes along the last dimension.

    Args:
        codes: ``(..., count) uint8`` in ``[0, 2**bits - 1]``.
        bits: 1 to 8.
        dtype: ``torch.uint8``, ``torch.int16`` or ``torch.int32``.

    Returns:
        ``(..., packed_items(count, bits, dtype))`` of ``dtype``, contiguous.

    Raises:
        SpecError: If ``bits`` is no integer from 1 to 8, or a code does not fit ``bits`` bits.
        DTypeError: If ``codes`` is not uint8 or ``dtype`` is none of the above.
        ShapeError: If ``codes`` has no dimension.
    """
    _check(bits, dtype)
    check_codes(codes, bits)
    if codes.dim() == 0:
        raise ShapeError("codes is a scalar: expected at least one dimension")
    lead, count = codes.shape[:-1], codes.shape[-1]
    items = packed_items(count, bits, dtype)
    if not codes.numel():
        return torch.empty((*lead, items), dtype=dtype, device=codes.device)
    per_block, block_bytes, word = _block(bits)
    count_blocks = -(-count // per_block)
    blocks = torch.nn.functional.pad(codes, (0, -count % per_block)).reshape(*lead, count_blocks, per_block)
    words = torch.zeros(blocks.shape[:-1], dtype=word, device=codes.device)
    for j in range(per_block):
        words |= blocks[..., j].to(word) << (bits * j)
    octets = words.unsqueeze(-1).view(torch.uint8)[..., :block_bytes].reshape(*lead, count_blocks * block_bytes)
    octets = torch.nn.functional.pad(octets, (0, items * _ITEM_BYTES[dtype] - octets.shape[-1]))
    # Flat, because a wider view refuses the odd strides that a dimension of size 1 may have.
    return octets.reshape(-1).view(dtype).reshape(*lead, items)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Unpack codes along the last dimension; the inverse of :func:`pack_bits`.

    Args:
        packed: ``(..., packed_items(count, bits, dtype))`` uint8, int16 or int32.
        bits: 1 to 8.
        count: Codes in a row.

    Returns:
        ``(..., count) uint8``, contiguous.

    Raises:
        SpecError: If ``bits`` is no integer from 1 to 8.
        DTypeError: If ``packed`` is none of the dtypes above.
        ShapeError: If the number of items is not what ``count`` codes need.
    """
    check_tensor(packed, "packed")
    _check(bits, packed.dtype)
    expected = packed_items(count, bits, packed.dtype)
    if packed.dim() == 0 or packed.shape[-1] != expected:
        raise ShapeError(f"packed has shape {tuple(packed.shape)}: {count} codes of {bits} bits need {expected} items")
    lead = packed.shape[:-1]
    if not packed.numel():
        return torch.empty((*lead, count), dtype=torch.uint8, device=packed.device)
    per_block, block_bytes, word = _block(bits)
    count_blocks = -(-count // per_block)
    octets = as_octets(packed)
    # The padding is negative where the last item has more bytes than the last block of codes.
    octets = torch.nn.functional.pad(octets, (0, count_blocks * block_bytes - octets.shape[-1]))
    octets = octets.reshape(*lead, count_blocks, block_bytes)
    words = torch.nn.functional.pad(octets, (0, word.itemsize - block_bytes)).contiguous().view(word).squeeze(-1)
    codes = torch.empty((*lead, count_blocks, per_block), dtype=torch.uint8, device=packed.device)
    for j in range(per_block):
        codes[..., j] = (words >> (bits * j)) & ((1 << bits) - 1)
    return codes.reshape(*lead, count_blocks * per_block)[..., :count].contiguous()


def _block(bits: int) -> tuple[int, int, torch.dtype]:
    """Return the fewest codes that fill whole bytes, how many bytes, and an integer dtype that holds them."""
    if 8 % bits == 0:
        return 8 // bits, 1, torch.uint8
    return 8, bits, torch.int64


def as_octets(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor of one dimension or more, the last one with those of its items, in memory order.

    Of a tensor with a dimension of size one ``contiguous()`` may leave any stride, with which ``view`` to fewer bytes fails.
    """
    octets = tensor.contiguous().view(-1).view(torch.uint8)
    return octets.view(*tensor.shape[:-1], tensor.shape[-1] * tensor.element_size())


def _check(bits: int, dtype: torch.dtype) -> None:
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise SpecError(f"bits={bits!r}: expected an integer from 1 to 8")
    if dtype not in _ITEM_BYTES:
        raise DTypeError(f"packed dtype {dtype}: expected torch.uint8, torch.int16 or torch.int32")
