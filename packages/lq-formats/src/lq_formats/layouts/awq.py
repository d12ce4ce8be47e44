"""AWQ: the layer of a checkpoint that AutoAWQ saved in its GEMM version."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lq_formats.bitpack import pack_bits, unpack_bits
from lq_formats.errors import DTypeError, GroupSizeError, ShapeError, UnsupportedError
from lq_formats.layouts.affine_weight import AffineWeight
from lq_formats.layouts.fields import expect_shape, symmetric_zero, take
from lq_formats.validation import check_elements

BITS = 4
_PER_WORD = 8
# Nibble i of a word is out feature _ORDER[i] of the word's eight: even ones in the low half, odd ones in the high half.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = tuple(_ORDER.index(i) for i in range(_PER_WORD))
_SCALE_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AWQLayout:
    """4-bit codes packed along the *out* features, in an order that suits a half-precision unpacking trick.

    ``qweight: (K, N / 8) int32``, word ``(k, c)``, and ``qzeros: (G, N / 8) int32``, word ``(g, c)``, are::

        bit   31    28 27    24 23    20 19    16 15    12 11     8 7      4 3      0
             | n=8c+7 | n=8c+5 | n=8c+3 | n=8c+1 | n=8c+6 | n=8c+4 | n=8c+2 | n=8c   |

    ``scales: (G, N)`` float16 or bfloat16. Codes and zeros are unsigned and stored as they are; a symmetric weight's
    zeros are stored too, all 8. (AutoAWQ's GEMV and GEMV-fast versions and llm-awq's own files are other layouts.)

    Source: ``WQLinear_GEMM.from_linear`` in AutoAWQ's ``awq/modules/linear/gemm.py``.
    """

    name: str = "awq"

    def packed_shape(self, out_features: int, in_features: int, groups: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor by its name.

        Raises:
            ShapeError: If N is not divisible by 8.
            GroupSizeError: If ``groups`` does not divide K.
        """
        check_elements(out_features, in_features)
        if out_features % _PER_WORD:
            raise ShapeError(f"out_features={out_features} is not divisible by the 8 codes of an awq word")
        if groups < 1 or in_features % groups:
            raise GroupSizeError(f"{groups} groups do not divide in_features={in_features}")
        words = out_features // _PER_WORD
        return {"qweight": (in_features, words), "qzeros": (groups, words), "scales": (groups, out_features)}

    def pack(self, weight: AffineWeight) -> dict[str, Tensor]:
        """Return ``qweight``, ``qzeros`` and ``scales`` of a weight.

        Raises:
            UnsupportedError: If the weight has not 4 bits, has a ``g_idx``, or zeros that are not integers.
            DTypeError: If the scales are float32, which the format does not store: quantize with float16 scales.
            SpecError, ShapeError, GroupSizeError: As in :meth:`packed_shape`, or if a code does not fit.
        """
        if weight.bits != BITS:
            raise UnsupportedError(f"awq has a layout for 4 bits only, not for {weight.bits}")
        if weight.g_idx is not None:
            raise UnsupportedError("awq has no g_idx: permute the in features with sorted_by_group() first")
        if weight.scale.dtype not in _SCALE_DTYPES:
            raise DTypeError("awq stores float16 or bfloat16 scales; quantize with one of these scale dtypes")
        self.packed_shape(weight.out_features, weight.in_features, weight.groups)
        return {
            "qweight": _pack(weight.codes.t()),
            "qzeros": _pack(weight.stored_zero(self.name).t()),
            "scales": weight.scale.t().contiguous(),
        }

    def unpack(self, tensors: Mapping[str, Tensor], *, symmetric: bool = False) -> AffineWeight:
        """Read the tensors of a layer; the inverse of :meth:`pack`.

        Args:
            tensors: ``qweight``, ``qzeros`` and ``scales`` by name; others are ignored.
            symmetric: The stored zeros are checked to be 8 and dropped.

        Raises:
            FormatError: If a tensor is missing, or a symmetric layer's zeros are not all 8.
            ShapeError, GroupSizeError, DTypeError: If the tensors do not fit each other.
        """
        qweight = take(tensors, "qweight", self.name, (torch.int32,), 2)
        qzeros = take(tensors, "qzeros", self.name, (torch.int32,), 2)
        scales = take(tensors, "scales", self.name, _SCALE_DTYPES, 2)
        groups, out_features = scales.shape
        shapes = self.packed_shape(out_features, qweight.shape[0], groups)
        expect_shape(qweight, "qweight", self.name, shapes["qweight"])
        expect_shape(qzeros, "qzeros", self.name, shapes["qzeros"])
        zero = _unpack(qzeros, out_features)
        if symmetric:
            symmetric_zero(zero, BITS, self.name)
        return AffineWeight(
            codes=_unpack(qweight, out_features).t().contiguous(),
            scale=scales.t().contiguous(),
            zero=None if symmetric else zero.t().contiguous(),
            bits=BITS,
        )


def _pack(matrix: Tensor) -> Tensor:
    """``(rows, N) uint8`` to ``(rows, N / 8) int32`` in AWQ's order."""
    rows, columns = matrix.shape
    ordered = matrix.reshape(rows, columns // _PER_WORD, _PER_WORD)[..., list(_ORDER)]
    return pack_bits(ordered.reshape(rows, columns), BITS, torch.int32)


def _unpack(packed: Tensor, columns: int) -> Tensor:
    """``(rows, N / 8) int32`` in AWQ's order to ``(rows, N) uint8``."""
    rows = packed.shape[0]
    nibbles = unpack_bits(packed, BITS, columns).reshape(rows, columns // _PER_WORD, _PER_WORD)
    return nibbles[..., list(_INVERSE)].reshape(rows, columns)


AWQ = AWQLayout()
