"""HQQ: the layer of a checkpoint that hqq (or transformers with it) saved."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lq_formats.errors import FormatError, GroupSizeError, ShapeError, SpecError, UnsupportedError
from lq_formats.layouts.affine_weight import AffineWeight
from lq_formats.layouts.fields import expect_shape, take
from lq_formats.validation import check_codes, check_elements

_PACKING = {1: "1bit_u8", 2: "2bit_u8", 4: "4bit_u8", 8: "8bit_u8"}
_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_INTEGERS = (torch.uint8, torch.int32, torch.int64)


@dataclass(frozen=True)
class HQQLayout:
    """Codes of a matrix of groups, cut in equal blocks of rows that share bytes; scales and zeros are floats.

    The weight ``(N, K)`` is read as groups ``(N * G, K / G)``, G groups a row (hqq calls that ``axis=1``). With 4 bits
    ``W_q: (N * G / 2, K / G) uint8`` has the first half of these rows above the second; H is ``N * G / 2``::

        bit   7            4 3            0
             | group r, k   | group r+H, k |      byte (r, k)

    With 2 bits there are four blocks in a byte, with 1 bit eight, the first in the highest bits; 8 bits are a byte each.
    ``scale`` and ``zero``: ``(N * G, 1)`` float16, bfloat16 or float32, for ``w = (code - zero) * scale``. The rest are
    numbers and strings as tensors: ``shape: (2,)`` holds N and K, ``nbits``, ``group_size``, ``axis``, ``packing`` (its
    characters) and settings of how it was quantized.

    With ``axis=0`` groups run along the out features, and no row has a scale of its own: an error, as are packed scales
    or zeros of old versions, and 3 bits (ten codes an int32).

    Source: ``BitPack`` in hqq's ``hqq/core/bitpack.py``, ``HQQLinear.state_dict`` and ``encode_safetensor_type`` beside.
    """

    name: str = "hqq"

    def packed_shape(
        self, out_features: int, in_features: int, groups: int, bits: int = 4
    ) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of the weight by its name.

        Raises:
            SpecError: If ``bits`` is not 1, 2, 4 or 8.
            ShapeError: If the groups cannot be cut in ``8 / bits`` equal blocks.
            GroupSizeError: If ``groups`` does not divide K.
        """
        check_elements(out_features, in_features)
        if bits not in _PACKING:
            raise SpecError(f"bits={bits}: {self.name} has layouts for 1, 2, 4 and 8 bits here")
        if groups < 1 or in_features % groups:
            raise GroupSizeError(f"{groups} groups do not divide in_features={in_features}")
        rows, blocks = out_features * groups, 8 // bits
        if rows % blocks:
            raise ShapeError(
                f"{rows} groups cannot be cut in the {blocks} equal blocks that share bytes in {self.name}"
            )
        return {
            "W_q": (rows // blocks, in_features // groups),
            "scale": (rows, 1),
            "zero": (rows, 1),
            "shape": (2,),
        }

    def pack(self, weight: AffineWeight) -> dict[str, Tensor]:
        """Return the tensors of a weight, with the numbers and strings that hqq expects beside them.

        Raises:
            UnsupportedError: If the weight has a ``g_idx``.
            SpecError, ShapeError, GroupSizeError: As in :meth:`packed_shape`, or if a code does not fit.
        """
        if weight.g_idx is not None:
            raise UnsupportedError(f"{self.name} has no g_idx: permute the in features with sorted_by_group() first")
        check_codes(weight.codes, weight.bits)
        bits, rows = weight.bits, weight.out_features * weight.groups
        shapes = self.packed_shape(weight.out_features, weight.in_features, weight.groups, bits)
        blocks = weight.codes.reshape(8 // bits, *shapes["W_q"])
        packed = torch.zeros(shapes["W_q"], dtype=torch.uint8, device=blocks.device)
        for block in blocks:
            packed = (packed << bits if bits < 8 else packed) | block
        midpoint = float(1 << (bits - 1))
        zero = torch.full_like(weight.scale, midpoint) if weight.zero is None else weight.zero.to(weight.scale.dtype)
        return {
            "W_q": packed,
            "scale": weight.scale.reshape(rows, 1).contiguous(),
            "zero": zero.reshape(rows, 1).contiguous(),
            "shape": torch.tensor([weight.out_features, weight.in_features]),
            **_settings(bits, weight.group_size, weight.scale.dtype),
        }

    def unpack(self, tensors: Mapping[str, Tensor]) -> AffineWeight:
        """Read the tensors of a layer; the inverse of :meth:`pack` (but zeros that are all the midpoint stay zeros).

        Args:
            tensors: ``W_q``, ``scale``, ``zero``, ``shape``, ``nbits`` and, where they are there, ``axis`` and
                ``packing``, by name; others are ignored.

        Returns:
            The weight, its zeros in the scales' dtype.

        Raises:
            UnsupportedError: If groups run along the out features or across rows, scales or zeros are packed, or the
                packing is another one.
            FormatError: If a tensor is missing, or a number is impossible.
            ShapeError, DTypeError: If the tensors do not fit each other.
        """
        for old in ("scale_q", "zero_q"):
            if old in tensors:
                raise UnsupportedError(f"{self.name} layer with a packed {old[:-2]}: quantize it with hqq 0.2 or newer")
        bits = _number(take(tensors, "nbits", self.name, _INTEGERS, None), "nbits")
        shape = take(tensors, "shape", self.name, (torch.int64, torch.int32), 1).tolist()
        if len(shape) != 2 or min(shape) < 1:
            raise FormatError(f"{self.name} shape holds {shape}: expected [out_features, in_features]")
        if bits not in _PACKING or _string(tensors.get("packing"), _PACKING[bits]) != _PACKING[bits]:
            packing = _string(tensors.get("packing"), "its usual packing")
            raise UnsupportedError(
                f"{self.name} layer of {bits} bits in {packing}: expected one of {sorted(_PACKING.values())}"
            )
        packed = take(tensors, "W_q", self.name, (torch.uint8,), 2)
        scale = take(tensors, "scale", self.name, _SCALE_DTYPES, 2)
        zero = take(tensors, "zero", self.name, (scale.dtype,), 2)
        axis = _number(tensors["axis"], "axis") if "axis" in tensors else 1
        size = packed.shape[1]
        if axis != 1 or scale.shape[1] != 1 or size == 0 or shape[1] % size:
            raise UnsupportedError(
                f"{self.name} layer of shape {shape} with axis={axis}, groups of {size} and scales {tuple(scale.shape)}: "
                "its groups do not run along the in features of one row; quantize it with axis=1 and a group size that "
                "divides the in features"
            )
        shapes = self.packed_shape(shape[0], shape[1], shape[1] // size, bits)
        for name, tensor in (("W_q", packed), ("scale", scale), ("zero", zero)):
            expect_shape(tensor, name, self.name, shapes[name])
        mask = (1 << bits) - 1
        blocks = [packed >> shift & mask for shift in range(8 - bits, -1, -bits)]
        groups = (shape[0], shape[1] // size)
        return AffineWeight(torch.cat(blocks).reshape(shape), scale.reshape(groups), zero.reshape(groups), bits)


def _settings(bits: int, group_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what hqq saves beside the weight: integers as int32, booleans as uint8, strings as their characters."""
    integers = {"nbits": bits, "group_size": group_size, "axis": 1}
    flags = {"channel_wise", "encoded_state_dict", "optimize", "stores_quant_config"}
    unset = {"offload_meta", "quant_scale", "quant_zero", "round_zero", "view_as_float"}
    strings = {"packing": _PACKING[bits], "compute_dtype": str(dtype), "unpack_view_dtype": "torch.uint8"}
    return {
        **{name: torch.tensor(value, dtype=torch.int32) for name, value in integers.items()},
        **{name: torch.tensor(int(name in flags), dtype=torch.uint8) for name in sorted(flags | unset)},
        **{name: torch.tensor(list(value.encode()), dtype=torch.uint8) for name, value in strings.items()},
    }


def _number(tensor: Tensor, name: str) -> int:
    if tensor.numel() != 1 or tensor.dtype not in (*_INTEGERS, torch.int16, torch.int8, torch.bool):
        raise FormatError(f"hqq tensor {name!r} is {tuple(tensor.shape)} {tensor.dtype}: expected one integer")
    return int(tensor)


def _string(tensor: Tensor | None, default: str) -> str:
    if tensor is None:
        return default
    if tensor.dtype != torch.uint8 or tensor.numel() > 64:
        raise FormatError(f"hqq tensor 'packing' is {tuple(tensor.shape)} {tensor.dtype}: expected characters")
    return bytes(tensor.flatten().tolist()).decode("ascii", "replace")


HQQ = HQQLayout()
