"""INT8: the canonical layout of 8-bit codes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lq_formats.errors import DTypeError, ShapeError
from lq_formats.validation import check_codes, check_elements, check_matrix


@dataclass(frozen=True)
class Int8Layout:
    """One signed byte a weight: the unsigned code minus its midpoint 128, which only flips the sign bit.

    Byte ``k`` of row ``n``::

        bit   7           6  5  4  3  2  1  0
             | not u[7] | u[6:0]              |       q = u - 128

    """

    name: str = "int8"

    def packed_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Return the shape ``(N, K)`` of the int8 tensor."""
        check_elements(out_features, in_features)
        return (out_features, in_features)

    def pack(self, codes: Tensor) -> Tensor:
        """Return ``(N, K) int8`` of ``(N, K) uint8`` codes.

        Raises:
            ShapeError, DTypeError: If ``codes`` is not a uint8 matrix.
        """
        check_matrix(codes, "codes")
        check_codes(codes, 8)
        return (codes ^ 0x80).view(torch.int8)

    def unpack(self, packed: Tensor, in_features: int | None = None) -> Tensor:
        """Return the ``(N, K) uint8`` codes; ``in_features`` is there for symmetry with the other layouts.

        Raises:
            ShapeError, DTypeError: If ``packed`` is not an int8 matrix (with ``in_features`` columns).
        """
        _, columns = check_matrix(packed, "packed")
        if packed.dtype != torch.int8:
            raise DTypeError(f"packed has dtype {packed.dtype}: expected int8")
        if in_features not in (None, columns):
            raise ShapeError(f"packed has {columns} columns: expected in_features={in_features}")
        return packed.view(torch.uint8) ^ 0x80


INT8 = Int8Layout()
