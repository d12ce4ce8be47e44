"""Int8DynamicTensor: 8-bit weights, one scale a row, for activations that are quantized to the same codes (W8A8)."""

from typing import ClassVar, Literal, Self

import torch
from lq_formats import FormatError, SpecError, check_finite, quantize_weight_per_channel
from lq_kernels import int8_dynamic_linear, quantize_tokens
from lq_kernels.preshuffled import start_compiler
from torch import Tensor

from lq_torch.tensors.base import SCALE_DTYPES, LowBitTensor, check_weight
from lq_torch.tensors.saved import SavedWeight

CODE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class Int8DynamicTensor(LowBitTensor):
    """An 8-bit weight ``(N, K)``: ``qdata * scale``.

    Attributes:
        qdata: ``(N, K)``, int8 or float8_e4m3fn.
        scale: ``(N,)``.
        activation: ``"int8"`` or ``"fp8"``: the codes of the weight, and of the activations in each product.
    """

    tensor_names: ClassVar = ("qdata", "scale")
    attribute_names: ClassVar = ("activation",)
    kind: ClassVar = "int8_dynamic"
    qdata: Tensor
    scale: Tensor
    activation: Literal["int8", "fp8"]

    @classmethod
    def from_hp(cls, w: Tensor, activation: Literal["int8", "fp8"] = "int8") -> Self:
        """Quantize a floating point weight ``(N, K)`` to the nearest codes; scales are float32.

        Raises:
            ShapeError, DTypeError, NonFiniteError: If ``w`` cannot be quantized.
            SpecError: If ``activation`` is neither ``"int8"`` nor ``"fp8"``.
        """
        if activation not in CODE_DTYPES:
            raise SpecError(f"activation={activation!r}: expected 'int8' or 'fp8'")
        check_weight(w)
        start_compiler(w.device)
        if activation == "int8":
            qdata, scale = quantize_weight_per_channel(w)
        else:
            check_finite(w)
            qdata, scale = quantize_tokens(w.detach(), "fp8")  # an out feature is quantized as a token is
        return cls({"qdata": qdata, "scale": scale}, {"activation": activation}, w.shape, w.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the ``(N, K)`` weight in ``dtype`` (default: this tensor's dtype)."""
        w: Tensor = torch.ops.lq.int8_dynamic_dequantize(self.qdata, self.scale, dtype or self.dtype)
        return w

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ self.T + bias``, x quantized token by token, by the kernel that the registry selects."""
        return int8_dynamic_linear(x, self.qdata, self.scale, bias)

    @classmethod
    def check_saved(cls, saved: SavedWeight) -> None:
        """Raise FormatError unless the tensors fit the shape and the kind of codes."""
        rows, columns = saved.matrix()
        saved.expect("qdata", (rows, columns), check_activation(saved.attributes["activation"]))
        saved.expect("scale", (rows,), *SCALE_DTYPES)


def check_activation(activation: object) -> torch.dtype:
    """Return the dtype of the codes.

    Raises:
        FormatError: If there are no such activations.
    """
    dtype = CODE_DTYPES.get(activation) if isinstance(activation, str) else None
    if dtype is None:
        raise FormatError(f"activation={activation!r}: expected 'int8' or 'fp8'")
    return dtype
