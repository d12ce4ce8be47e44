"""Int4Tensor: 4-bit weights in lq's canonical packing, ``int4_packing_format="plain"``."""

from typing import Any, ClassVar, Self

import torch
from lq_formats import FormatError, QuantSpec, pack_int4, quantize_affine, search_qparams
from lq_kernels import int4_dequantize, int4_linear
from lq_kernels.preshuffled import start_compiler
from torch import Tensor

from lq_torch.tensors.base import SCALE_DTYPES, LowBitTensor, check_weight
from lq_torch.tensors.saved import SavedWeight


class Int4Tensor(LowBitTensor):
    """A 4-bit weight ``(N, K)``: ``(u - zero) * scale``.

    Attributes:
        qdata: ``(N, ceil(K / 8)) int32``, the canonical packing (:func:`lq_formats.pack_int4`).
        scale: ``(N, K // group_size)``.
        zero: ``(N, K // group_size)``, uint8 or of scale's dtype; None for symmetric weights.
        group_size: In features per scale (K: one scale a row).
    """

    tensor_names: ClassVar = ("qdata", "scale", "zero")
    attribute_names: ClassVar = ("group_size",)
    kind: ClassVar = "int4"
    qdata: Tensor
    scale: Tensor
    zero: Tensor | None
    group_size: int

    @classmethod
    def from_hp(
        cls,
        w: Tensor,
        group_size: int = 128,
        *,
        symmetric: bool = True,
        scale_dtype: torch.dtype | None = None,
        algorithm: str = "rtn",
    ) -> Self:
        """Quantize a floating point weight to the nearest codes.

        Args:
            w: ``(N, K)`` fp16, bf16 or fp32.
            group_size: A divisor of K from 8 up; -1 for one scale a row.
            symmetric: No zero points.
            scale_dtype: dtype of the scales; None for w's.
            algorithm: How scales and zeros are chosen: ``"rtn"``, ``"mse"`` or ``"hqq"``
                (:func:`lq_formats.search_qparams`). Zeros that were searched have the scales' dtype, not uint8.

        Raises:
            SpecError: If the algorithm is none of these.
            ShapeError, GroupSizeError, DTypeError, NonFiniteError: If ``w`` cannot be quantized so.
        """
        check_weight(w)
        start_compiler(w.device)  # while scales are searched
        spec = int4_spec(group_size, symmetric, scale_dtype or w.dtype)
        scale, zero = search_qparams(w, spec, algorithm)
        qdata = pack_int4(quantize_affine(w, scale, zero, spec))
        resolved = spec.resolve_group_size(w.shape[1])
        return cls.from_packed(qdata, scale, zero, group_size=resolved, in_features=w.shape[1], dtype=w.dtype)

    @classmethod
    def from_packed(
        cls,
        qdata: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        *,
        group_size: int,
        in_features: int,
        dtype: torch.dtype,
    ) -> Self:
        """Wrap canonical bits; nothing is copied. Arguments are the attributes of the class."""
        tensors = {"qdata": qdata, "scale": scale, "zero": zero}
        attributes = {"group_size": group_size}
        return cls(tensors, attributes, (qdata.shape[0], in_features), dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the ``(N, K)`` weight in ``dtype`` (default: this tensor's dtype)."""
        return int4_dequantize(
            self.qdata,
            self.scale,
            self.zero,
            group_size=self.group_size,
            in_features=self.shape[1],
            dtype=dtype or self.dtype,
        )

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ self.T + bias`` by the kernel that the registry selects."""
        return int4_linear(x, self.qdata, self.scale, self.zero, group_size=self.group_size, bias=bias)

    @classmethod
    def check_saved(cls, saved: SavedWeight) -> None:
        """Raise FormatError unless the tensors fit the shape and the group size."""
        check_canonical(saved, saved.attributes["group_size"])


def check_canonical(saved: SavedWeight, group_size: Any) -> None:
    """Raise FormatError unless ``qdata``, ``scale`` and perhaps ``zero`` are a canonical int4 weight."""
    rows, columns = saved.matrix()
    if type(group_size) is not int or group_size < 1 or columns % group_size or (8 > group_size != columns):
        raise FormatError(f"group_size={group_size!r} does not divide the {columns} in features")
    groups = (rows, columns // group_size)
    saved.expect("qdata", (rows, -(-columns // 8)), torch.int32)
    scale = saved.expect("scale", groups, *SCALE_DTYPES)
    if "zero" in saved.tensors:
        saved.expect("zero", groups, torch.uint8, scale.dtype)


def int4_spec(group_size: int, symmetric: bool, scale_dtype: torch.dtype) -> QuantSpec:
    """Return the 4-bit spec with this group size; -1 is one scale a row."""
    if group_size == -1:
        return QuantSpec(4, "row", None, symmetric, scale_dtype)
    return QuantSpec(4, "group", group_size, symmetric, scale_dtype)
