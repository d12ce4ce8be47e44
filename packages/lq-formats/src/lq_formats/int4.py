"""int4: the canonical packing of 4-bit codes, and symmetric group-wise quantization straight into it.

Canonical packing of codes ``u: (N, K)``, word ``i`` of row ``n`` (int32, eight codes, low nibble first)::

    bit   31    28 27    24 23    20 19    16 15    12 11     8 7      4 3      0
         | k=8i+7 | k=8i+6 | k=8i+5 | k=8i+4 | k=8i+3 | k=8i+2 | k=8i+1 | k=8i   |

Codes are unsigned; a symmetric weight's signed code is ``u - 8``. Where K is not a multiple of 8 the missing nibbles of
a row's last word are 0. On a little-endian machine the same memory read as int8 is the packing of two codes a byte,
low nibble first.
"""

import torch
from torch import Tensor

from lq_formats.affine import choose_qparams, dequantize_affine, quantize_affine
from lq_formats.bitpack import as_octets
from lq_formats.errors import DTypeError, ShapeError
from lq_formats.spec import QuantSpec
from lq_formats.validation import check_codes, check_matrix

CODES_PER_WORD = 8
_CODES_PER_ITEM = {torch.int32: 8, torch.int8: 2}


def pack_int4(codes: Tensor) -> Tensor:
    """Pack 4-bit codes into the canonical layout.

    Args:
        codes: ``(N, K) uint8`` in [0, 15].

    Returns:
        ``(N, ceil(K / 8)) int32``.

    Raises:
        ShapeError, DTypeError: If ``codes`` is not a uint8 matrix.
        SpecError: If a code is above 15.
    """
    rows, columns = check_matrix(codes, "codes")
    check_codes(codes, 4)
    padded = -columns % CODES_PER_WORD
    if padded:
        codes = torch.nn.functional.pad(codes, (0, padded))
    # Bytes are laid out from the least significant up, which is what a little-endian int32 view reads.
    # Flat, because a wider view refuses the odd strides that a dimension of size 1 may have.
    octets = (codes[:, ::2] | codes[:, 1::2] << 4).reshape(-1)
    return octets.view(torch.int32).reshape(rows, (columns + padded) // CODES_PER_WORD)


def unpack_int4(qweight: Tensor, in_features: int) -> Tensor:
    """Unpack the canonical layout; the inverse of :func:`pack_int4`.

    Args:
        qweight: ``(N, ceil(in_features / 8)) int32``.
        in_features: K.

    Returns:
        ``(N, in_features) uint8`` codes.

    Raises:
        ShapeError, DTypeError: If ``qweight`` is not int32 or has the wrong number of words.
    """
    _, words = check_matrix(qweight, "qweight")
    if qweight.dtype != torch.int32:
        raise DTypeError(f"qweight has dtype {qweight.dtype}: expected int32 words of eight codes")
    if isinstance(in_features, float):  # a symbolic integer is not an int
        raise ShapeError(f"in_features={in_features!r}: expected an integer")
    expected = -(-in_features // CODES_PER_WORD)
    if words != expected:
        raise ShapeError(f"qweight has {words} words a row: in_features={in_features} needs {expected}")
    return _split_bytes(as_octets(qweight))[:, :in_features].contiguous()


def quantize_i4_pack8(
    w: Tensor,
    group_size: int = 256,
    pack_dtype: torch.dtype = torch.int32,
    *,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Quantize symmetrically to 4 bits, ``scale = max|group| / 7``, and pack.

    Args:
        w: ``(N, K)`` weights, fp16, bf16, fp32 or fp64.
        group_size: In features per scale, a divisor of K from 8 up; -1 for one scale a row.
        pack_dtype: ``torch.int32`` packs 8 codes an item, ``torch.int8`` packs 2. Both hold the same bytes.
        scale_dtype: fp16, bf16 or fp32.

    Returns:
        ``packed``: ``(N, K // 8) int32`` or ``(N, K // 2) int8``, a quarter of the bytes of an fp16 weight, and
        ``scales: (N, K // group_size)``.

    Raises:
        ShapeError: If K is not divisible by the number of codes in an item.
        GroupSizeError: If ``group_size`` does not divide K.
        DTypeError: If a dtype is none of the above.
        NonFiniteError: If ``w`` holds NaN or infinity.
    """
    _, columns = check_matrix(w)
    _check_pack_dtype(pack_dtype)
    per_item = _CODES_PER_ITEM[pack_dtype]
    if columns % per_item:
        raise ShapeError(f"in_features={columns} is not divisible by the {per_item} codes of a {pack_dtype} item")
    spec = _symmetric(group_size, scale_dtype)
    scale, _ = choose_qparams(w, spec)
    codes = quantize_affine(w, scale, None, spec)
    if pack_dtype == torch.int32:
        return pack_int4(codes), scale
    return (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.int8), scale


def dequantize_i4_pack8(
    packed: Tensor, scales: Tensor, group_size: int = 256, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Undo :func:`quantize_i4_pack8` up to rounding: ``(u - 8) * scale``.

    Args:
        packed: ``(N, K // 8) int32`` or ``(N, K // 2) int8``.
        scales: ``(N, K // group_size)``.
        group_size: As given to :func:`quantize_i4_pack8`.
        dtype: dtype of the result.

    Returns:
        ``(N, K)`` weights.

    Raises:
        ShapeError, GroupSizeError, DTypeError, DeviceError: If the tensors do not fit each other.
    """
    check_matrix(packed, "packed")
    _check_pack_dtype(packed.dtype)
    codes = _split_bytes(as_octets(packed))
    return dequantize_affine(codes, scales, None, _symmetric(group_size, torch.float32), dtype)


def _split_bytes(octets: Tensor) -> Tensor:
    """``(N, B) uint8`` of two codes a byte to ``(N, 2 B)`` codes, low nibble first."""
    return torch.stack((octets & 0x0F, octets >> 4), dim=-1).flatten(1)


def _check_pack_dtype(pack_dtype: torch.dtype) -> None:
    if pack_dtype not in _CODES_PER_ITEM:
        raise DTypeError(f"packed dtype {pack_dtype}: expected torch.int32 (8 codes an item) or torch.int8 (2 codes)")


def _symmetric(group_size: int, scale_dtype: torch.dtype) -> QuantSpec:
    if group_size == -1:
        return QuantSpec(4, "row", None, True, scale_dtype)
    return QuantSpec(4, "group", group_size, True, scale_dtype)
