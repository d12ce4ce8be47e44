"""Int8Tensor: signed 8-bit weights with one scale a row or one in all."""

from typing import ClassVar, Literal, Self

import torch
from lq_formats import SpecError, quantize_weight_per_channel, quantize_weight_per_tensor
from lq_kernels import int8_gemm
from lq_kernels.preshuffled import start_compiler
from torch import Tensor

from lq_torch.tensors.base import SCALE_DTYPES, LowBitTensor, check_weight
from lq_torch.tensors.saved import SavedWeight


class Int8Tensor(LowBitTensor):
    """An 8-bit weight ``(N, K)``: ``qdata * scale``.

    Attributes:
        qdata: ``(N, K) int8``.
        scale: ``(N,)`` per row or ``()`` per tensor.
    """

    tensor_names: ClassVar = ("qdata", "scale")
    kind: ClassVar = "int8"
    qdata: Tensor
    scale: Tensor

    @classmethod
    def from_hp(cls, w: Tensor, granularity: Literal["row", "tensor"] = "row") -> Self:
        """Quantize a floating point weight ``(N, K)``; scales are float32.

        Raises:
            ShapeError, DTypeError, NonFiniteError: If ``w`` cannot be quantized.
            SpecError: If ``granularity`` is neither ``"row"`` nor ``"tensor"``.
        """
        if granularity not in ("row", "tensor"):
            raise SpecError(f"granularity={granularity!r}: expected 'row' or 'tensor'")
        check_weight(w)
        start_compiler(w.device)
        quantize = quantize_weight_per_channel if granularity == "row" else quantize_weight_per_tensor
        qdata, scale = quantize(w)
        return cls({"qdata": qdata, "scale": scale}, {}, w.shape, w.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the ``(N, K)`` weight in ``dtype`` (default: this tensor's dtype)."""
        w: Tensor = torch.ops.lq.int8_dequantize(self.qdata, self.scale, dtype or self.dtype)
        return w

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ self.T + bias`` by the kernel that the registry selects."""
        return int8_gemm(x, self.qdata, self.scale, bias)

    @classmethod
    def check_saved(cls, saved: SavedWeight) -> None:
        """Raise FormatError unless the tensors fit the shape."""
        rows, columns = saved.matrix()
        saved.expect("qdata", (rows, columns), torch.int8)
        scale = saved.tensors.get("scale")
        saved.expect("scale", () if scale is not None and scale.dim() == 0 else (rows,), *SCALE_DTYPES)
