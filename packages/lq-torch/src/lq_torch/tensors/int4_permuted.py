"""Int4PermutedTensor: 4-bit weights whose groups are not runs of in features, as GPTQ with ``desc_act`` makes them.

The in features are sorted by group once, when the weight is made; each product then picks x's features in that order.
That costs one gather of the activations a product. lq's own calibration (static groups) needs none.
"""

from typing import ClassVar, Self

import torch
from lq_formats import DTypeError, FormatError, ShapeError
from lq_kernels import int4_dequantize, int4_linear
from torch import Tensor

from lq_torch.tensors.base import LowBitTensor
from lq_torch.tensors.int4 import Int4Tensor, check_canonical
from lq_torch.tensors.saved import SavedWeight


class Int4PermutedTensor(LowBitTensor):
    """A 4-bit weight ``(N, K)``: column ``order[j]`` is ``(u[:, j] - zero) * scale`` of group ``j // group_size``.

    Attributes:
        qdata: ``(N, ceil(K / 8)) int32``, codes in sorted order in the canonical packing.
        scale: ``(N, K // group_size)``.
        zero: ``(N, K // group_size)``, uint8 or of scale's dtype; None for symmetric weights.
        order: ``(K,) int32``, a permutation: the in feature that each sorted column stands for.
        group_size: In features per scale.
    """

    tensor_names: ClassVar = ("qdata", "scale", "zero", "order")
    attribute_names: ClassVar = ("group_size",)
    kind: ClassVar = "int4_permuted"
    qdata: Tensor
    scale: Tensor
    zero: Tensor | None
    order: Tensor
    group_size: int

    @classmethod
    def from_plain(cls, weight: Int4Tensor, order: Tensor) -> Self:
        """Wrap a sorted canonical weight ``(N, K)`` and its ``order: (K,) int32``; nothing is copied.

        Raises:
            DTypeError, ShapeError: If the order is not ``(K,) int32``.
            FormatError: If it is not a permutation.
        """
        if order.dtype != torch.int32:
            raise DTypeError(f"order has dtype {order.dtype}: expected int32")
        if tuple(order.shape) != (weight.shape[1],):
            raise ShapeError(f"order has shape {tuple(order.shape)}: expected ({weight.shape[1]},)")
        _check_permutation(order)
        tensors = {"qdata": weight.qdata, "scale": weight.scale, "zero": weight.zero, "order": order}
        return cls(tensors, {"group_size": weight.group_size}, weight.shape, weight.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the ``(N, K)`` weight in ``dtype`` (default: this tensor's dtype), columns as x has its features."""
        columns = self.shape[1]
        w = int4_dequantize(
            self.qdata,
            self.scale,
            self.zero,
            group_size=self.group_size,
            in_features=columns,
            dtype=dtype or self.dtype,
        )
        return w.index_select(1, torch.argsort(self.order))

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ self.T + bias``: x's features in sorted order, times the sorted weight."""
        gathered = x.index_select(-1, self.order)
        return int4_linear(gathered, self.qdata, self.scale, self.zero, group_size=self.group_size, bias=bias)

    @classmethod
    def check_saved(cls, saved: SavedWeight) -> None:
        """Raise FormatError unless the tensors fit the shape and the group size."""
        check_canonical(saved, saved.attributes["group_size"])
        saved.expect("order", (saved.matrix()[1],), torch.int32)

    @classmethod
    def from_saved(cls, saved: SavedWeight) -> Self:
        """Build from a file, whose order may be anything: on a GPU a bad index would end the process.

        Raises:
            FormatError: If the order is not a permutation.
        """
        _check_permutation(saved.tensors["order"])
        return super().from_saved(saved)


def _check_permutation(order: Tensor) -> None:
    expected = torch.arange(order.numel(), dtype=order.dtype, device=order.device)
    if not torch.equal(torch.sort(order).values, expected):
        raise FormatError(f"order is not a permutation of the {order.numel()} in features")
