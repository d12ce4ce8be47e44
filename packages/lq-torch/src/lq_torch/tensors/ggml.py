"""GGMLTensor: weights in ggml's blocks, byte for byte what a GGUF file holds."""

from typing import ClassVar, Self

import torch
from lq_formats import FormatError, NonFiniteError, SpecError, ggml_format
from lq_kernels import q4_0_linear
from torch import Tensor

from lq_torch.tensors.base import LowBitTensor, check_weight
from lq_torch.tensors.saved import SavedWeight


class GGMLTensor(LowBitTensor):
    """A weight ``(N, K)`` of ggml blocks.

    Q4_0 multiplies packed, with activations quantized to Q8_1 as llama.cpp does. The other formats are dequantized for
    each product.

    Attributes:
        qdata: ``(N, K // 32, block bytes) uint8``.
        ggml_type: The format's name, for example ``"q4_0"``.
    """

    tensor_names: ClassVar = ("qdata",)
    attribute_names: ClassVar = ("ggml_type",)
    kind: ClassVar = "ggml"
    qdata: Tensor
    ggml_type: str

    @classmethod
    def from_hp(cls, w: Tensor, ggml_type: str = "q4_0") -> Self:
        """Quantize a floating point weight ``(N, K)``, K a multiple of 32.

        Raises:
            ShapeError, DTypeError: If ``w`` does not fit the format.
            NonFiniteError: If ``w`` holds NaN or infinity, or a block's scale is beyond float16.
            SpecError: If there is no such format.
        """
        check_weight(w)
        form = ggml_format(ggml_type)
        qdata = form.quantize(w)
        # Formats with a minimum (q4_1, q5_1) keep it after the scale, in float16 as well.
        head = 4 if form.name.endswith("_1") else 2
        scales = qdata[..., :head].contiguous().view(torch.float16)
        if not bool(torch.isfinite(scales).all()):
            raise NonFiniteError(f"a block's scale is beyond float16, the scale dtype of {form.name}; use int4 or int8")
        return cls({"qdata": qdata}, {"ggml_type": form.name}, w.shape, w.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the ``(N, K)`` weight in ``dtype`` (default: this tensor's dtype)."""
        w: Tensor = ggml_format(self.ggml_type).dequantize(self.qdata, dtype or self.dtype)
        return w

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ self.T + bias``."""
        if self.ggml_type == "q4_0":
            return q4_0_linear(x, self.qdata, bias=bias)
        return torch.nn.functional.linear(x, self.dequantize(x.dtype), bias)

    @classmethod
    def check_saved(cls, saved: SavedWeight) -> None:
        """Raise FormatError unless the blocks fit the shape and the format is known."""
        rows, columns = saved.matrix()
        if columns % 32:
            raise FormatError(f"a ggml weight has the shape (N, K) with K % 32 == 0, not {saved.shape}")
        try:
            form = ggml_format(str(saved.attributes["ggml_type"]))
        except SpecError as error:
            raise FormatError(str(error)) from None
        saved.expect("qdata", (rows, columns // 32, form.type_size), torch.uint8)
