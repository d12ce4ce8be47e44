"""Int4GatedTensor and Int8GatedTensor: the weight of a gate and an up projection, for products that end as silu(gate) * up.

The bits of an :class:`Int4PreshuffledTensor` or :class:`Int8PreshuffledTensor` ``(2 H, K)``, gates and then ups, with rows in
the order that lets a kernel multiply each gate with its up (:mod:`lq_kernels.gated`). As a weight it is that tensor:
``F.linear`` and ``dequantize`` have gates first, and files know nothing of the order. :func:`gated_linear` is what it is for.
"""

from typing import Any, ClassVar, Self

import torch
from lq_formats import ShapeError
from lq_kernels import (
    interleave_rows,
    preshuffled_dequantize,
    preshuffled_gated_linear,
    preshuffled_linear,
    separate_rows,
)
from lq_kernels.gated import interleaved_rows
from torch import Tensor

from lq_torch.tensors.base import LowBitTensor, linear
from lq_torch.tensors.preshuffled import Int4PreshuffledTensor, Int8PreshuffledTensor


class GatedTensor(LowBitTensor):
    """What both have in common.

    Attributes:
        stacked: The class of the same weight with its rows in order.
        packed: Codes of interleaved rows, :class:`lq_formats.layouts.FragmentLayout`.
        scale: Arranged alike (``scale_shape`` of the layout).
    """

    stacked: ClassVar[Any]
    packed: Tensor
    scale: Tensor

    @classmethod
    def from_plain(cls, weight: Any) -> Self:
        """Rearrange a canonical weight ``(2 H, K)``, gates and then ups; nothing is lost.

        Raises:
            ShapeError: If there are not as many gates as ups.
        """
        rows, columns = weight.shape
        if rows % 2:
            raise ShapeError(f"a gated weight of shape {(rows, columns)}: expected (2 H, K), gates and as many ups")
        tensors = {name: interleave_rows(tensor) for name, tensor in weight.inner_tensors().items()}
        shape = (interleaved_rows(rows // 2), columns)
        ordered = cls.stacked.from_plain(type(weight)(tensors, weight.attributes(), shape, weight.dtype))
        return cls(ordered.inner_tensors(), ordered.attributes(), weight.shape, weight.dtype)

    def plain(self) -> Any:
        """Return the canonical weight that this one was made from, bit for bit."""
        shape = (interleaved_rows(self.shape[0] // 2), self.shape[1])
        ordered = self.stacked(self.inner_tensors(), self.attributes(), shape, self.dtype).plain()
        tensors = {name: separate_rows(tensor, self.shape[0] // 2) for name, tensor in ordered.inner_tensors().items()}
        return type(ordered)(tensors, ordered.attributes(), self.shape, self.dtype)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the canonical weight."""
        tensors: dict[str, Tensor] = self.plain().to_tensors()
        return tensors

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the ``(2 H, K)`` weight in ``dtype`` (default: this tensor's dtype), gates and then ups."""
        (rows, columns), (bits, group_size, zero) = self.shape, self._format()
        ordered = preshuffled_dequantize(
            self.packed,
            self.scale,
            zero,
            bits=bits,
            group_size=group_size,
            out_features=interleaved_rows(rows // 2),
            in_features=columns,
            dtype=dtype or self.dtype,
        )
        return separate_rows(ordered, rows // 2)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ self.T + bias (..., 2 H)``, gates and then ups."""
        half, (bits, group_size, zero) = self.shape[0] // 2, self._format()
        y = preshuffled_linear(
            x,
            self.packed,
            self.scale,
            zero,
            bits=bits,
            group_size=group_size,
            out_features=interleaved_rows(half),
            bias=None if bias is None else interleave_rows(bias),
        )
        return separate_rows(y.movedim(-1, 0), half).movedim(0, -1).contiguous()

    def gated_linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``silu(gate) * up (..., H)`` of the product with ``x``, by the kernel that the registry selects."""
        bits, group_size, zero = self._format()
        return preshuffled_gated_linear(
            x,
            self.packed,
            self.scale,
            zero,
            bits=bits,
            group_size=group_size,
            out_features=self.shape[0] // 2,
            bias=bias,
        )

    def _format(self) -> tuple[int, int, Tensor | None]:
        """Return bits, group size and zeros."""
        raise NotImplementedError


class Int4GatedTensor(GatedTensor, Int4PreshuffledTensor):
    """A 4-bit weight ``(2 H, K)`` of gates and ups, rows interleaved, in fragment order."""

    stacked: ClassVar = Int4PreshuffledTensor

    def _format(self) -> tuple[int, int, Tensor | None]:
        return 4, self.group_size, self.zero


class Int8GatedTensor(GatedTensor, Int8PreshuffledTensor):
    """An 8-bit weight ``(2 H, K)`` of gates and ups with one scale a row, rows interleaved, in fragment order."""

    stacked: ClassVar = Int8PreshuffledTensor

    def _format(self) -> tuple[int, int, Tensor | None]:
        return 8, self.shape[1], None


def gated_form(weight: Int4PreshuffledTensor | Int8PreshuffledTensor) -> GatedTensor:
    """Return a weight ``(2 H, K)`` with its rows interleaved; itself if they are.

    Raises:
        ShapeError: If there are not as many gates as ups.
    """
    if isinstance(weight, GatedTensor):
        return weight
    if isinstance(weight, Int4PreshuffledTensor):
        return Int4GatedTensor.from_plain(weight.plain())
    return Int8GatedTensor.from_plain(weight.plain())


def gated_linear(input: Tensor, weight: GatedTensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    """Return ``silu(gate) * up (..., H)`` where ``gate, up = F.linear(input, weight, bias).chunk(2, -1)``, in one launch.

    Raises:
        ShapeError, DTypeError, DeviceError: As ``F.linear``. Under autocast x and bias are cast.
    """
    # Inside, reading a shape or a dtype of the weight does not leave Python's attribute access.
    with torch._C.DisableTorchFunctionSubclass():
        return linear(input, weight, bias, product=weight.gated_linear)
