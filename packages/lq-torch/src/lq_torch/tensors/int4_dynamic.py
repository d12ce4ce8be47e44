"""Int4DynamicTensor: symmetric 4-bit weights for activations that are quantized to 8 bits in each product (W4A8).

The bits of a symmetric :class:`Int4Tensor`, as many, in the order of Hopper's 8-bit tensor cores. Files hold the canonical
bits. On other devices the weight is unpacked for each product: correct, slower.
"""

from typing import ClassVar, Literal, Self

import torch
from lq_formats import FormatError, UnsupportedError
from lq_kernels import int4_dynamic_dequantize, int4_dynamic_linear, pack_int4_dynamic, restore_int4_dynamic
from torch import Tensor

from lq_torch.tensors.base import LowBitTensor, SharedValue
from lq_torch.tensors.int4 import Int4Tensor, check_canonical
from lq_torch.tensors.int8_dynamic import check_activation
from lq_torch.tensors.saved import SavedWeight


class Int4DynamicTensor(LowBitTensor):
    """A 4-bit weight ``(N, K)``, ``(u - 8) * scale``, in fragment order for 8-bit activations.

    Attributes:
        packed: int32, :class:`lq_formats.layouts.Fragment8Layout`.
        scale: Arranged alike (``scale_shape`` of the layout).
        group_size: In features per scale (K: one scale a row).
        activation: ``"int8"`` or ``"fp8"``: what activations are quantized to.
        lowest: Whether the code -8 occurs, as fp8 kernels need to know.
    """

    tensor_names: ClassVar = ("packed", "scale")
    attribute_names: ClassVar = ("group_size", "activation", "lowest")
    value_names: ClassVar = ("lowest",)
    saved_names: ClassVar = ("qdata", "scale")
    kind: ClassVar = "int4_dynamic"
    packed: Tensor
    scale: Tensor
    group_size: int
    activation: Literal["int8", "fp8"]
    lowest: bool = SharedValue()  # type: ignore[assignment]

    @classmethod
    def from_hp(
        cls,
        w: Tensor,
        group_size: int = 128,
        *,
        activation: Literal["int8", "fp8"] = "fp8",
        scale_dtype: torch.dtype | None = None,
    ) -> Self:
        """Quantize as :meth:`Int4Tensor.from_hp` does, symmetrically; the arguments and errors are the same.

        Raises:
            SpecError: If ``activation`` is neither ``"int8"`` nor ``"fp8"``.
        """
        return cls.from_plain(Int4Tensor.from_hp(w, group_size, scale_dtype=scale_dtype), activation)

    @classmethod
    def from_plain(cls, weight: Int4Tensor, activation: Literal["int8", "fp8"] = "fp8") -> Self:
        """Rearrange a canonical weight; nothing is lost.

        Raises:
            UnsupportedError: If the weight has zero points.
            SpecError: If ``activation`` is neither ``"int8"`` nor ``"fp8"``.
        """
        if weight.zero is not None:
            raise UnsupportedError("8-bit activations need a symmetric weight: this one has zero points")
        packed, scale, lowest = pack_int4_dynamic(
            weight.qdata,
            weight.scale,
            group_size=weight.group_size,
            in_features=weight.shape[1],
            activation=activation,
        )
        attributes = {"group_size": weight.group_size, "activation": activation, "lowest": lowest}
        return cls({"packed": packed, "scale": scale}, attributes, weight.shape, weight.dtype)

    def plain(self) -> Int4Tensor:
        """Return the canonical weight that this one was made from, bit for bit."""
        qdata, scale = restore_int4_dynamic(
            self.packed,
            self.scale,
            group_size=self.group_size,
            out_features=self.shape[0],
            in_features=self.shape[1],
            activation=self.activation,
        )
        return Int4Tensor.from_packed(
            qdata, scale, None, group_size=self.group_size, in_features=self.shape[1], dtype=self.dtype
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the ``(N, K)`` weight in ``dtype`` (default: this tensor's dtype)."""
        return int4_dynamic_dequantize(
            self.packed,
            self.scale,
            group_size=self.group_size,
            out_features=self.shape[0],
            in_features=self.shape[1],
            activation=self.activation,
            dtype=dtype or self.dtype,
        )

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ self.T + bias``, x quantized token by token, by the kernel that the registry selects."""
        return int4_dynamic_linear(
            x,
            self.packed,
            self.scale,
            bias,
            group_size=self.group_size,
            out_features=self.shape[0],
            activation=self.activation,
            lowest=self.lowest,
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the canonical weight."""
        return self.plain().to_tensors()

    @classmethod
    def check_saved(cls, saved: SavedWeight) -> None:
        """Raise FormatError unless the tensors are those of a symmetric Int4Tensor."""
        check_activation(saved.attributes["activation"])
        if type(saved.attributes["lowest"]) is not bool:
            raise FormatError(f"lowest={saved.attributes['lowest']!r}: expected true or false")
        check_canonical(saved, saved.attributes["group_size"])

    @classmethod
    def from_saved(cls, saved: SavedWeight) -> Self:
        """Rearrange canonical bits; whether -8 occurs is looked up, not believed."""
        plain = Int4Tensor.from_packed(
            saved.tensors["qdata"],
            saved.tensors["scale"],
            None,
            group_size=saved.attributes["group_size"],
            in_features=saved.shape[1],
            dtype=saved.dtype,
        )
        return cls.from_plain(plain, saved.attributes["activation"])
