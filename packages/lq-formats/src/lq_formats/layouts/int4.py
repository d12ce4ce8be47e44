"""INT4: the canonical layout of 4-bit codes."""

from dataclasses import dataclass

from torch import Tensor

from lq_formats.int4 import CODES_PER_WORD, pack_int4, unpack_int4
from lq_formats.validation import check_elements


@dataclass(frozen=True)
class Int4Layout:
    """Eight codes in an int32, along the in features, low nibble first: what lq saves and its kernels read.

    Word ``i`` of row ``n``::

        bit   31    28 27    24 23    20 19    16 15    12 11     8 7      4 3      0
             | k=8i+7 | k=8i+6 | k=8i+5 | k=8i+4 | k=8i+3 | k=8i+2 | k=8i+1 | k=8i   |

    Missing nibbles of a row's last word are 0.
    """

    name: str = "int4"

    def packed_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Return the shape ``(N, ceil(K / 8))`` of the packed int32 tensor."""
        check_elements(out_features, in_features)
        return (out_features, -(-in_features // CODES_PER_WORD))

    def pack(self, codes: Tensor) -> Tensor:
        """Pack ``(N, K) uint8`` codes into ``(N, ceil(K / 8)) int32``; see :func:`lq_formats.pack_int4`."""
        return pack_int4(codes)

    def unpack(self, packed: Tensor, in_features: int) -> Tensor:
        """Return the ``(N, in_features) uint8`` codes; see :func:`lq_formats.unpack_int4`."""
        return unpack_int4(packed, in_features)


INT4 = Int4Layout()
