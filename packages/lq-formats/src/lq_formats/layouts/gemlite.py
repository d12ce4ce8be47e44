"""GEMLITE: the packing of gemlite's Triton kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lq_formats.bitpack import pack_bits, unpack_bits
from lq_formats.errors import DTypeError, ShapeError, SpecError
from lq_formats.validation import check_elements, check_matrix

_BITS = (1, 2, 4, 8)
_ITEM_DTYPES = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


@dataclass(frozen=True)
class GemliteLayout:
    """Codes packed along the in features, then transposed, so that a kernel's tile reads consecutive out features.

    Item ``(i, n)`` holds ``E = packing_bitwidth / bits`` codes of out feature ``n``, low bits first; with 4 bits in an
    int32 (E = 8)::

        bit   31     28 27     24           7      4 3      0
             | k=8i+7  | k=8i+6  |   ...   | k=8i+1 | k=8i   |

    The packed tensor is ``(K / E, N)`` and contiguous, of dtype uint8, int16 or int32 for a ``packing_bitwidth`` of 8,
    16 or 32. gemlite takes scales and zeros transposed as well, ``(K / group_size, N)``.

    Source: ``gemlite.bitpack.pack_weights_over_cols_torch`` with ``transpose=True`` and ``GemLiteLinear.pack`` with its
    default ``contiguous=True`` (gemlite 0.6).
    """

    name: str = "gemlite"

    def packed_shape(
        self, out_features: int, in_features: int, bits: int = 4, packing_bitwidth: int = 32
    ) -> tuple[int, int]:
        """Return the shape ``(K / E, N)`` of the packed tensor.

        Raises:
            SpecError: If ``bits`` is not 1, 2, 4 or 8, or ``packing_bitwidth`` not 8, 16 or 32.
            ShapeError: If K is not divisible by the codes in an item.
        """
        check_elements(out_features, in_features)
        per_item = self.elements_per_item(bits, packing_bitwidth)
        if in_features % per_item:
            raise ShapeError(
                f"in_features={in_features} is not divisible by the {per_item} codes of {bits} bits in a "
                f"{packing_bitwidth}-bit item"
            )
        return (in_features // per_item, out_features)

    def pack(self, codes: Tensor, bits: int = 4, packing_bitwidth: int = 32) -> Tensor:
        """Pack ``(N, K) uint8`` codes.

        Args:
            codes: ``(N, K) uint8`` in ``[0, 2**bits - 1]``.
            bits: 1, 2, 4 or 8.
            packing_bitwidth: 8, 16 or 32 (gemlite's default on most GPUs).

        Returns:
            ``(K * bits / packing_bitwidth, N)`` uint8, int16 or int32, contiguous.

        Raises:
            SpecError: If a code does not fit ``bits`` bits, or as in :meth:`packed_shape`.
            ShapeError, DTypeError: If ``codes`` is not a uint8 matrix of a divisible width.
        """
        rows, columns = check_matrix(codes, "codes")
        self.packed_shape(rows, columns, bits, packing_bitwidth)
        return pack_bits(codes, bits, _ITEM_DTYPES[packing_bitwidth]).t().contiguous()

    def unpack(self, packed: Tensor, bits: int = 4) -> Tensor:
        """Return the ``(N, K) uint8`` codes of a packed tensor of any ``packing_bitwidth``.

        Raises:
            SpecError: If ``bits`` is not 1, 2, 4 or 8.
            ShapeError, DTypeError: If ``packed`` is not a uint8, int16 or int32 matrix.
        """
        if packed.dim() != 2:
            raise ShapeError(f"packed has shape {tuple(packed.shape)}: expected (K / codes in an item, out_features)")
        if packed.dtype not in _ITEM_DTYPES.values():
            raise DTypeError(f"packed has dtype {packed.dtype}: expected uint8, int16 or int32")
        per_item = self.elements_per_item(bits, packed.dtype.itemsize * 8)
        return unpack_bits(packed.t().contiguous(), bits, packed.shape[0] * per_item)

    def elements_per_item(self, bits: int, packing_bitwidth: int) -> int:
        """Return E, the codes in an item (gemlite calls it ``elements_per_sample``).

        Raises:
            SpecError: If ``bits`` is not 1, 2, 4 or 8, or ``packing_bitwidth`` not 8, 16 or 32.
        """
        if bits not in _BITS:
            raise SpecError(f"bits={bits}: gemlite packs 1, 2, 4 or 8 bits")
        if packing_bitwidth not in _ITEM_DTYPES:
            raise SpecError(f"packing_bitwidth={packing_bitwidth}: expected 8, 16 or 32")
        return packing_bitwidth // bits


GEMLITE = GemliteLayout()
