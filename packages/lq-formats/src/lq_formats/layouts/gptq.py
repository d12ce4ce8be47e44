"""GPTQ and GPTQ_V2: the layer of a checkpoint that AutoGPTQ or GPTQModel saved."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lq_formats.bitpack import pack_bits, unpack_bits
from lq_formats.errors import DTypeError, GroupSizeError, ShapeError, SpecError
from lq_formats.layouts.affine_weight import AffineWeight
from lq_formats.layouts.fields import expect_shape, meaningful_g_idx, symmetric_zero, take
from lq_formats.validation import check_elements

_BITS = (2, 3, 4, 8)
_SCALE_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class GPTQLayout:
    """Codes packed along the in features and stored transposed; zeros packed along the out features.

    ``qweight: (K * bits / 32, N) int32``, with 4 bits word ``(i, n)`` is::

        bit   31    28 27    24 23    20 19    16 15    12 11     8 7      4 3      0
             | k=8i+7 | k=8i+6 | k=8i+5 | k=8i+4 | k=8i+3 | k=8i+2 | k=8i+1 | k=8i   |

    ``qzeros: (G, N * bits / 32) int32``, with 4 bits word ``(g, c)`` is::

        bit   31    28 27    24 23    20 19    16 15    12 11     8 7      4 3      0
             | n=8c+7 | n=8c+6 | n=8c+5 | n=8c+4 | n=8c+3 | n=8c+2 | n=8c+1 | n=8c   |

    ``scales: (G, N)`` float16 or bfloat16; ``g_idx: (K,) int32``, the group of each in feature, with ``desc_act`` in
    any order. Three bits are dense: code 10 of a word continues in the next one. Symmetric layers store their zeros as
    well, all equal to the midpoint.

    A ``checkpoint_format`` of ``gptq`` (version 1) stores ``zero - 1`` modulo ``2**bits``, and ``gptq_v2`` the zero
    itself. Version 1 cannot tell a zero of 0 from one of ``2**bits``, and readers disagree on it; here it is 0.

    Source: ``QuantLinear.pack`` of AutoGPTQ's ``qlinear_cuda_old.py``; ``convert_gptq_v1_to_v2_format`` of GPTQModel.
    """

    checkpoint_format: str = "gptq"

    def __post_init__(self) -> None:
        if self.checkpoint_format not in ("gptq", "gptq_v2"):
            raise SpecError(f"checkpoint_format={self.checkpoint_format!r}: expected 'gptq' or 'gptq_v2'")

    @property
    def name(self) -> str:
        """The ``checkpoint_format``."""
        return self.checkpoint_format

    @property
    def zero_offset(self) -> int:
        """What is added to a stored zero: 1 in version 1, 0 in version 2."""
        return 1 if self.checkpoint_format == "gptq" else 0

    def packed_shape(
        self, out_features: int, in_features: int, groups: int, bits: int = 4
    ) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor by its name.

        Raises:
            SpecError: If ``bits`` is not 2, 3, 4 or 8.
            ShapeError: If N or K does not fill whole words.
            GroupSizeError: If ``groups`` does not divide K.
        """
        check_elements(out_features, in_features)
        if bits not in _BITS:
            raise SpecError(f"bits={bits}: {self.name} has layouts for 2, 3, 4 and 8 bits")
        for what, size in (("in_features", in_features), ("out_features", out_features)):
            if size * bits % 32:
                raise ShapeError(
                    f"{what}={size} codes of {bits} bits do not fill whole int32 words, as {self.name} needs"
                )
        if groups < 1 or in_features % groups:
            raise GroupSizeError(f"{groups} groups do not divide in_features={in_features}")
        return {
            "qweight": (in_features * bits // 32, out_features),
            "qzeros": (groups, out_features * bits // 32),
            "scales": (groups, out_features),
            "g_idx": (in_features,),
        }

    def pack(self, weight: AffineWeight) -> dict[str, Tensor]:
        """Return ``qweight``, ``qzeros``, ``scales`` and ``g_idx`` of a weight.

        Raises:
            DTypeError: If the scales are float32, which the format does not store: quantize with float16 scales.
            UnsupportedError: If the zeros are not integers.
            SpecError, ShapeError, GroupSizeError: As in :meth:`packed_shape`, or if a code does not fit.
        """
        self.packed_shape(weight.out_features, weight.in_features, weight.groups, weight.bits)
        if weight.scale.dtype not in _SCALE_DTYPES:
            raise DTypeError(
                f"{self.name} stores float16 or bfloat16 scales; quantize with one of these scale dtypes (8 bits: scale_dtype "
                "of IntxWeightOnlyConfig)"
            )
        zero = weight.stored_zero(self.name)
        mask = (1 << weight.bits) - 1
        g_idx = weight.g_idx
        if g_idx is None:
            g_idx = torch.arange(weight.in_features, dtype=torch.int32, device=zero.device) // weight.group_size
        return {
            "qweight": pack_bits(weight.codes, weight.bits, torch.int32).t().contiguous(),
            # uint8 arithmetic wraps, so 0 - 1 is 255 and the mask makes it 2**bits - 1.
            "qzeros": pack_bits((zero.t() - self.zero_offset) & mask, weight.bits, torch.int32),
            "scales": weight.scale.t().contiguous(),
            "g_idx": g_idx.clone(),
        }

    def unpack(self, tensors: Mapping[str, Tensor], bits: int = 4, *, symmetric: bool = False) -> AffineWeight:
        """Read the tensors of a layer; the inverse of :meth:`pack`.

        Args:
            tensors: ``qweight``, ``qzeros``, ``scales`` and, optionally, ``g_idx``, by name; others are ignored.
            bits: 2, 3, 4 or 8: ``bits`` of the checkpoint's quantization config.
            symmetric: ``sym`` of that config: the stored zeros are checked and dropped.

        Returns:
            The weight; its ``g_idx`` is None where groups are consecutive.

        Raises:
            FormatError: If a tensor is missing, ``g_idx`` is out of range, or a symmetric layer's zeros are not.
            SpecError, ShapeError, GroupSizeError, DTypeError: If the tensors do not fit each other.
        """
        qweight = take(tensors, "qweight", self.name, (torch.int32,), 2)
        scales = take(tensors, "scales", self.name, _SCALE_DTYPES, 2)
        qzeros = take(tensors, "qzeros", self.name, (torch.int32,), 2)
        if bits not in _BITS:
            raise SpecError(f"bits={bits}: {self.name} has layouts for 2, 3, 4 and 8 bits")
        groups, out_features = scales.shape
        in_features = qweight.shape[0] * 32 // bits
        shapes = self.packed_shape(out_features, in_features, groups, bits)
        expect_shape(qweight, "qweight", self.name, shapes["qweight"])
        expect_shape(qzeros, "qzeros", self.name, shapes["qzeros"])
        zero: Tensor | None = (unpack_bits(qzeros, bits, out_features) + self.zero_offset) & ((1 << bits) - 1)
        if symmetric and zero is not None:
            symmetric_zero(zero, bits, self.name)
            zero = None
        g_idx = None
        if tensors.get("g_idx") is not None and tensors["g_idx"].numel():
            g_idx = take(tensors, "g_idx", self.name, (torch.int32, torch.int64), 1)
            expect_shape(g_idx, "g_idx", self.name, shapes["g_idx"])
            g_idx = meaningful_g_idx(g_idx, groups, self.name)
        return AffineWeight(
            codes=unpack_bits(qweight.t().contiguous(), bits, in_features),
            scale=scales.t().contiguous(),
            zero=None if zero is None else zero.t().contiguous(),
            bits=bits,
            g_idx=g_idx,
        )


GPTQ = GPTQLayout("gptq")
GPTQ_V2 = GPTQLayout("gptq_v2")
