"""SavedWeight: what a file says of one quantized weight, its JSON checked and its tensors not yet trusted."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from lq_formats import FormatError
from torch import Tensor

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class SavedWeight:
    """A quantized weight as files hold it: canonical tensors and JSON values.

    Attributes:
        tensors: The saved tensors by name, on any device; on ``meta`` where only shapes and dtypes are to be checked.
        attributes: Plain values by name.
        shape: Of the weight.
        dtype: The weight's nominal dtype: fp16, bf16 or fp32.
    """

    tensors: Mapping[str, Tensor]
    attributes: Mapping[str, Any]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def parse(cls, tensors: Mapping[str, Tensor], spec: Mapping[str, Any]) -> Self:
        """Read the JSON values of :meth:`LowBitTensor.spec_json`.

        Raises:
            FormatError: If they are none.
        """
        shape, dtype, attributes = spec.get("shape"), spec.get("dtype"), spec.get("attributes")
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise FormatError(f"shape {shape!r}: expected a list of sizes")
        if len(shape) > 8 or math.prod(max(size, 1) for size in shape) >= 2**60:
            raise FormatError(f"shape {shape!r} is larger than any tensor")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise FormatError(f"dtype {dtype!r}: expected float16, bfloat16 or float32")
        if not isinstance(attributes, dict):
            raise FormatError(f"attributes {attributes!r}: expected a map")
        return cls(dict(tensors), dict(attributes), tuple(shape), _DTYPES[dtype])

    def matrix(self) -> tuple[int, int]:
        """Return ``(N, K)``.

        Raises:
            FormatError: If the weight is not a matrix, or K is 0.
        """
        if len(self.shape) != 2 or self.shape[1] == 0:
            raise FormatError(f"a quantized weight has the shape (N, K), not {self.shape}")
        return self.shape[0], self.shape[1]

    def expect(self, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
        """Return a tensor that must be there, with this shape and one of these dtypes.

        Raises:
            FormatError: If it is not.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise FormatError(f"tensor {name!r} is missing")
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            wanted = " or ".join(str(dtype) for dtype in dtypes)
            raise FormatError(f"tensor {name!r} is {tuple(tensor.shape)} {tensor.dtype}: expected {shape} {wanted}")
        return tensor
