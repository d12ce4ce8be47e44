"""COMPRESSED_TENSORS: the layer of a ``pack-quantized`` checkpoint of compressed-tensors (llm-compressor, vLLM)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lq_formats.bitpack import pack_bits, packed_items, unpack_bits
from lq_formats.errors import FormatError, GroupSizeError, SpecError
from lq_formats.layouts.affine_weight import AffineWeight
from lq_formats.layouts.fields import expect_shape, meaningful_g_idx, take
from lq_formats.validation import check_elements

_BITS = (4, 8)
_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class CompressedTensorsLayout:
    """Signed codes plus their offset ``2**(bits - 1)``, packed along the in features, not transposed.

    That sum is exactly lq's unsigned code. ``weight_packed: (N, ceil(K * bits / 32)) int32``, word ``(n, i)``::

        4 bits  31    28 27    24 23    20 19    16 15    12 11     8 7      4 3      0
               | k=8i+7 | k=8i+6 | k=8i+5 | k=8i+4 | k=8i+3 | k=8i+2 | k=8i+1 | k=8i   |
        8 bits  31             24 23             16 15              8 7               0
               | k=4i+3          | k=4i+2          | k=4i+1          | k=4i            |

    ``weight_zero_point: (ceil(N * bits / 32), G) int32`` is packed along the *out* features, word ``(c, g)``::

        4 bits  31    28 27    24 23    20 19    16 15    12 11     8 7      4 3      0
               | n=8c+7 | n=8c+6 | n=8c+5 | n=8c+4 | n=8c+3 | n=8c+2 | n=8c+1 | n=8c   |

    and absent if symmetric. ``weight_scale: (N, G)``; ``weight_shape: (2,) int64`` holds N and K;
    ``weight_g_idx: (K,) int32`` is there with activation ordering only.

    Source: ``PackedQuantizationCompressor`` and ``pack_to_int32`` in compressed-tensors' ``compressors/pack_quantized``.
    """

    name: str = "pack-quantized"

    def packed_shape(
        self, out_features: int, in_features: int, groups: int, bits: int = 4, *, symmetric: bool = True
    ) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor by its name.

        Raises:
            SpecError: If ``bits`` is neither 4 nor 8.
            GroupSizeError: If ``groups`` does not divide K.
        """
        check_elements(out_features, in_features)
        if bits not in _BITS:
            raise SpecError(f"bits={bits}: {self.name} has layouts for 4 and 8 bits")
        if groups < 1 or in_features % groups:
            raise GroupSizeError(f"{groups} groups do not divide in_features={in_features}")
        shapes: dict[str, tuple[int, ...]] = {
            "weight_packed": (out_features, packed_items(in_features, bits, torch.int32)),
            "weight_scale": (out_features, groups),
            "weight_shape": (2,),
        }
        if not symmetric:
            shapes["weight_zero_point"] = (packed_items(out_features, bits, torch.int32), groups)
        return shapes

    def pack(self, weight: AffineWeight) -> dict[str, Tensor]:
        """Return ``weight_packed``, ``weight_scale``, ``weight_shape`` and what the weight needs of the other two.

        Raises:
            UnsupportedError: If the zeros are not integers.
            SpecError, GroupSizeError: As in :meth:`packed_shape`, or if a code does not fit.
        """
        self.packed_shape(weight.out_features, weight.in_features, weight.groups, weight.bits)
        device = weight.codes.device
        tensors = {
            "weight_packed": pack_bits(weight.codes, weight.bits, torch.int32),
            "weight_scale": weight.scale.contiguous(),
            "weight_shape": torch.tensor([weight.out_features, weight.in_features], dtype=torch.int64, device=device),
        }
        if weight.zero is not None:
            tensors["weight_zero_point"] = (
                pack_bits(weight.stored_zero(self.name).t(), weight.bits, torch.int32).t().contiguous()
            )
        if weight.g_idx is not None:
            tensors["weight_g_idx"] = weight.g_idx.clone()
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], bits: int = 4) -> AffineWeight:
        """Read the tensors of a layer; the inverse of :meth:`pack`.

        Args:
            tensors: By name as in :meth:`pack`; others are ignored. Asymmetric if there is a ``weight_zero_point``.
            bits: ``num_bits`` of the checkpoint's quantization config, 4 or 8.

        Returns:
            The weight; its ``g_idx`` is None where groups are consecutive.

        Raises:
            FormatError: If a tensor is missing, or ``weight_shape`` or ``weight_g_idx`` holds impossible numbers.
            SpecError, ShapeError, GroupSizeError, DTypeError: If the tensors do not fit each other.
        """
        packed = take(tensors, "weight_packed", self.name, (torch.int32,), 2)
        scale = take(tensors, "weight_scale", self.name, _SCALE_DTYPES, 2)
        shape = take(tensors, "weight_shape", self.name, (torch.int64, torch.int32), 1).tolist()
        if len(shape) != 2 or min(shape) < 0:
            raise FormatError(f"{self.name} weight_shape holds {shape}: expected [out_features, in_features]")
        out_features, in_features = shape
        groups = scale.shape[1]
        shapes = self.packed_shape(out_features, in_features, groups, bits, symmetric=False)
        expect_shape(packed, "weight_packed", self.name, shapes["weight_packed"])
        expect_shape(scale, "weight_scale", self.name, shapes["weight_scale"])
        zero = None
        if tensors.get("weight_zero_point") is not None:
            packed_zero = take(tensors, "weight_zero_point", self.name, (torch.int32,), 2)
            expect_shape(packed_zero, "weight_zero_point", self.name, shapes["weight_zero_point"])
            zero = unpack_bits(packed_zero.t().contiguous(), bits, out_features).t().contiguous()
        g_idx = None
        if tensors.get("weight_g_idx") is not None:
            g_idx = take(tensors, "weight_g_idx", self.name, (torch.int32, torch.int64), 1)
            expect_shape(g_idx, "weight_g_idx", self.name, (in_features,))
            g_idx = meaningful_g_idx(g_idx, groups, self.name)
        return AffineWeight(unpack_bits(packed, bits, in_features), scale.contiguous(), zero, bits, g_idx)


COMPRESSED_TENSORS = CompressedTensorsLayout()
