"""``w.t()`` of a quantized weight, so that ``x @ w.t()``, ``torch.mm`` and ``torch.addmm`` run its low-bit kernel.

PyTorch's own composite functions (``nn.MultiheadAttention``, for one) reach a weight through ``t`` and ``addmm`` rather
than through ``F.linear``. Transposing copies nothing. The other product, ``x @ w`` with ``x: (M, N)``, is what autograd
needs for the gradient of x; no low-bit kernel reads a weight that way, and it dequantizes for the product.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from lq_formats import UnsupportedError
from torch import Tensor

from lq_torch.tensors.base import DISPATCH, LowBitTensor, aten, linear


class TransposedWeight(LowBitTensor):
    """A view ``(K, N)`` of a quantized weight ``(N, K)``; not saved in checkpoints.

    Attributes:
        weight: The quantized weight.
    """

    tensor_names: ClassVar = ("weight",)
    weight: LowBitTensor

    def __new__(  # noqa: D102
        cls,
        tensors: Mapping[str, Tensor | None],
        attributes: Mapping[str, Any],
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> Self:
        weight = tensors["weight"]
        assert isinstance(weight, LowBitTensor)
        self: Self = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), strides=(1, shape[0]), dtype=dtype, device=weight.device, requires_grad=False
        )
        self.weight = weight
        return self

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense ``(K, N)`` matrix."""
        return self.weight.dequantize(dtype or self.dtype).t()

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ weight + bias`` for ``x: (..., N)``."""
        return torch.nn.functional.linear(x, self.dequantize(x.dtype), bias)

    def spec_json(self) -> dict[str, Any]:
        """Raise UnsupportedError: a view is not saved."""
        raise UnsupportedError("a transposed view of a quantized weight is not saved; save the weight itself")


def _transpose(tensor: LowBitTensor) -> LowBitTensor:
    if isinstance(tensor, TransposedWeight):
        # A new wrapper: autograd takes what t() returns for a view, and nothing is a view of itself.
        return tensor.weight._alias()
    rows, columns = tensor.shape
    with torch.inference_mode(tensor.is_inference()):  # as LowBitTensor._alias
        return TransposedWeight({"weight": tensor}, {}, (columns, rows), tensor.dtype)


def _permute(tensor: LowBitTensor, dims: Sequence[int]) -> LowBitTensor:
    order = [dim % 2 for dim in dims]
    return _transpose(tensor) if order == [1, 0] else tensor._alias()


def _swap(tensor: LowBitTensor, first: int, second: int) -> LowBitTensor:
    return tensor._alias() if first % 2 == second % 2 else _transpose(tensor)


def _mm(left: Tensor, right: Tensor) -> Tensor:
    if isinstance(right, LowBitTensor):
        return linear(left, _transpose(right))
    assert isinstance(left, LowBitTensor)
    return linear(right.t(), left).t()


def _addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if isinstance(bias, LowBitTensor):
        raise UnsupportedError("addmm takes a quantized weight as a factor, not as the summand")
    # One rounding like F.linear's where it is one.
    if isinstance(right, LowBitTensor) and alpha == beta == 1 and bias.dim() == 1:
        return linear(left, _transpose(right), bias)
    product = _mm(left, right)
    # A bias that counts nothing is not read: it may hold NaN.
    return product * alpha if beta == 0 else torch.add(bias * beta, product, alpha=alpha)


DISPATCH[aten.t.default] = _transpose
DISPATCH[aten.transpose.int] = _swap
DISPATCH[aten.permute.default] = _permute
DISPATCH[aten.mm.default] = _mm
DISPATCH[aten.addmm.default] = _addmm
