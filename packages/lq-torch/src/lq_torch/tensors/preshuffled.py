"""Int4PreshuffledTensor and Int8PreshuffledTensor: weights in the order of Hopper's tensor cores.

The bits of an :class:`Int4Tensor` or :class:`Int8Tensor`, as many, rearranged once for lq's CUDA kernels, which decode and
prefill from the same copy. Files hold the canonical bits. On other devices the weight is unpacked for each product:
correct, slower.
"""

from typing import ClassVar, Self

import torch
from lq_formats import FormatError
from lq_kernels import (
    preshuffle_int4,
    preshuffle_int8,
    preshuffled_dequantize,
    preshuffled_linear,
    restore_int4,
    restore_int8,
)
from torch import Tensor

from lq_torch.tensors.base import LowBitTensor
from lq_torch.tensors.int4 import Int4Tensor
from lq_torch.tensors.int8 import Int8Tensor
from lq_torch.tensors.saved import SavedWeight


class Int4PreshuffledTensor(LowBitTensor):
    """A 4-bit weight ``(N, K)``, ``(u - zero) * scale``, in fragment order.

    Attributes:
        packed: int32, :class:`lq_formats.layouts.FragmentLayout`.
        scale: Arranged alike (``scale_shape`` of the layout).
        zero: As ``scale``, in its dtype; None for symmetric weights.
        group_size: In features per scale (K: one scale a row).
        integer_zero: Whether zeros are saved as uint8.
    """

    tensor_names: ClassVar = ("packed", "scale", "zero")
    attribute_names: ClassVar = ("group_size", "integer_zero")
    saved_names: ClassVar = ("qdata", "scale", "zero")
    kind: ClassVar = "int4_preshuffled"
    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    group_size: int
    integer_zero: bool

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
        """Quantize as :meth:`Int4Tensor.from_hp` does; the arguments and errors are the same."""
        plain = Int4Tensor.from_hp(w, group_size, symmetric=symmetric, scale_dtype=scale_dtype, algorithm=algorithm)
        return cls.from_plain(plain)

    @classmethod
    def from_plain(cls, weight: Int4Tensor) -> Self:
        """Rearrange a canonical weight; nothing is lost."""
        packed, scale, zero = preshuffle_int4(
            weight.qdata, weight.scale, weight.zero, group_size=weight.group_size, in_features=weight.shape[1]
        )
        integer = weight.zero is not None and weight.zero.dtype == torch.uint8
        attributes = {"group_size": weight.group_size, "integer_zero": integer}
        return cls({"packed": packed, "scale": scale, "zero": zero}, attributes, weight.shape, weight.dtype)

    def plain(self) -> Int4Tensor:
        """Return the canonical weight that this one was made from, bit for bit."""
        qdata, scale, zero = restore_int4(
            self.packed,
            self.scale,
            self.zero,
            group_size=self.group_size,
            out_features=self.shape[0],
            in_features=self.shape[1],
        )
        if zero is not None and self.integer_zero:
            zero = zero.to(torch.uint8)
        return Int4Tensor.from_packed(
            qdata, scale, zero, group_size=self.group_size, in_features=self.shape[1], dtype=self.dtype
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the ``(N, K)`` weight in ``dtype`` (default: this tensor's dtype)."""
        return preshuffled_dequantize(
            self.packed,
            self.scale,
            self.zero,
            bits=4,
            group_size=self.group_size,
            out_features=self.shape[0],
            in_features=self.shape[1],
            dtype=dtype or self.dtype,
        )

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ self.T + bias`` by the kernel that the registry selects."""
        return preshuffled_linear(
            x,
            self.packed,
            self.scale,
            self.zero,
            bits=4,
            group_size=self.group_size,
            out_features=self.shape[0],
            bias=bias,
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the canonical weight."""
        return self.plain().to_tensors()

    @classmethod
    def check_saved(cls, saved: SavedWeight) -> None:
        """Raise FormatError unless the tensors are those of an Int4Tensor."""
        integer = saved.attributes["integer_zero"]
        zero = saved.tensors.get("zero")
        if type(integer) is not bool or integer is not (zero is not None and zero.dtype == torch.uint8):
            raise FormatError(f"integer_zero={integer!r}: expected true exactly where zeros are uint8")
        Int4Tensor.check_saved(saved)

    @classmethod
    def from_saved(cls, saved: SavedWeight) -> Self:
        """Rearrange canonical bits."""
        return cls.from_plain(Int4Tensor.from_saved(saved))


class Int8PreshuffledTensor(LowBitTensor):
    """An 8-bit weight ``(N, K)`` with one scale a row, in fragment order.

    Attributes:
        packed: int32, :class:`lq_formats.layouts.FragmentLayout`.
        scale: ``(1, rows)``, arranged alike.
    """

    tensor_names: ClassVar = ("packed", "scale")
    saved_names: ClassVar = ("qdata", "scale")
    kind: ClassVar = "int8_preshuffled"
    packed: Tensor
    scale: Tensor

    @classmethod
    def from_hp(cls, w: Tensor) -> Self:
        """Quantize as :meth:`Int8Tensor.from_hp` does, with one scale a row; the errors are the same."""
        return cls.from_plain(Int8Tensor.from_hp(w))

    @classmethod
    def from_plain(cls, weight: Int8Tensor) -> Self:
        """Rearrange a canonical weight; a scale for all rows becomes one a row."""
        packed, scale = preshuffle_int8(weight.qdata, weight.scale)
        return cls({"packed": packed, "scale": scale}, {}, weight.shape, weight.dtype)

    def plain(self) -> Int8Tensor:
        """Return the canonical weight, with one scale a row."""
        qdata, scale = restore_int8(self.packed, self.scale, out_features=self.shape[0], in_features=self.shape[1])
        return Int8Tensor({"qdata": qdata, "scale": scale}, {}, self.shape, self.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the ``(N, K)`` weight in ``dtype`` (default: this tensor's dtype)."""
        rows, columns = self.shape
        return preshuffled_dequantize(
            self.packed,
            self.scale,
            bits=8,
            group_size=columns,
            out_features=rows,
            in_features=columns,
            dtype=dtype or self.dtype,
        )

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ self.T + bias`` by the kernel that the registry selects."""
        rows, columns = self.shape
        return preshuffled_linear(x, self.packed, self.scale, bits=8, group_size=columns, out_features=rows, bias=bias)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the canonical weight."""
        return self.plain().to_tensors()

    @classmethod
    def check_saved(cls, saved: SavedWeight) -> None:
        """Raise FormatError unless the tensors are those of an Int8Tensor."""
        Int8Tensor.check_saved(saved)

    @classmethod
    def from_saved(cls, saved: SavedWeight) -> Self:
        """Rearrange canonical bits."""
        return cls.from_plain(Int8Tensor.from_saved(saved))
