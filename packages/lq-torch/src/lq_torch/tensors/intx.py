"""IntxTensor: 2 to 8 bits in a dense stream of bits, for the widths that no kernel multiplies packed."""

from typing import ClassVar, Self

import torch
from lq_formats import (
    FormatError,
    QuantSpec,
    dequantize_affine,
    pack_bits,
    packed_items,
    quantize_affine,
    search_qparams,
    unpack_bits,
)
from torch import Tensor

from lq_torch.tensors.base import SCALE_DTYPES, LowBitTensor, check_weight
from lq_torch.tensors.saved import SavedWeight


class IntxTensor(LowBitTensor):
    """A weight ``(N, K)`` of ``bits`` bits: ``(u - zero) * scale``.

    Codes are stored without gaps (:func:`lq_formats.pack_bits`: three bits take three bits). The weight is dequantized for
    each product: it saves memory, not time. For 4 bits, :class:`Int4Tensor` has kernels.

    Attributes:
        qdata: ``(N, ceil(K * bits / 8)) uint8``.
        scale: ``(N, K // group_size)``.
        zero: ``(N, K // group_size)``, uint8 or of scale's dtype; None for symmetric weights.
        bits: 2 to 8.
        group_size: In features per scale (K: one scale a row).
    """

    tensor_names: ClassVar = ("qdata", "scale", "zero")
    attribute_names: ClassVar = ("bits", "group_size")
    kind: ClassVar = "intx"
    qdata: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int

    @classmethod
    def from_hp(cls, w: Tensor, spec: QuantSpec, algorithm: str = "rtn") -> Self:
        """Quantize a floating point weight to the nearest codes.

        Args:
            w: ``(N, K)`` fp16, bf16 or fp32.
            spec: Bits, groups (or rows), symmetry and the dtype of scales.
            algorithm: How scales and zeros are chosen: ``"rtn"``, ``"mse"`` or ``"hqq"``
                (:func:`lq_formats.search_qparams`).

        Raises:
            SpecError: If the algorithm is none of these.
            ShapeError, GroupSizeError, DTypeError, NonFiniteError: If ``w`` cannot be quantized so.
        """
        check_weight(w)
        scale, zero = search_qparams(w, spec, algorithm)
        return cls.from_codes(quantize_affine(w, scale, zero, spec), scale, zero, bits=spec.bits, dtype=w.dtype)

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, dtype: torch.dtype) -> Self:
        """Pack codes ``(N, K) uint8`` with their parameters ``(N, groups)``."""
        attributes = {"bits": bits, "group_size": codes.shape[1] // scale.shape[1]}
        return cls({"qdata": pack_bits(codes, bits), "scale": scale, "zero": zero}, attributes, codes.shape, dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the ``(N, K)`` weight in ``dtype`` (default: this tensor's dtype)."""
        whole = self.group_size == self.shape[1]
        spec = QuantSpec(self.bits, "row" if whole else "group", None if whole else self.group_size, self.zero is None)
        codes = unpack_bits(self.qdata, self.bits, self.shape[1])
        return dequantize_affine(codes, self.scale, self.zero, spec, dtype or self.dtype)

    def why_not_batch_invariant(self) -> str | None:
        """Return why: a dense product of torch's is none."""
        return "it is dequantized for a dense product, whose results depend on the number of tokens"

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ self.T + bias`` by a dense product."""
        return torch.nn.functional.linear(x, self.dequantize(x.dtype), bias)

    @classmethod
    def check_saved(cls, saved: SavedWeight) -> None:
        """Raise FormatError unless the tensors fit the shape, the bits and the group size."""
        rows, columns = saved.matrix()
        bits, group_size = saved.attributes["bits"], saved.attributes["group_size"]
        if type(bits) is not int or not 2 <= bits <= 8:
            raise FormatError(f"bits={bits!r}: expected an integer from 2 to 8")
        if type(group_size) is not int or group_size < 1 or columns % group_size or (8 > group_size != columns):
            raise FormatError(f"group_size={group_size!r} does not divide the {columns} in features, or is below 8")
        saved.expect("qdata", (rows, packed_items(columns, bits)), torch.uint8)
        scale = saved.expect("scale", (rows, columns // group_size), *SCALE_DTYPES)
        if "zero" in saved.tensors:
            saved.expect("zero", (rows, columns // group_size), torch.uint8, scale.dtype)
