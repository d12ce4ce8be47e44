"""Configurations for weights whose activations are quantized to 8 bits, token by token, in each product."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from lq_formats import SpecError
from torch import Tensor

from lq_torch.config import WeightConfig, check_group_size
from lq_torch.tensors.base import LowBitTensor
from lq_torch.tensors.int4 import int4_spec
from lq_torch.tensors.int4_dynamic import Int4DynamicTensor
from lq_torch.tensors.int8_dynamic import Int8DynamicTensor


@dataclass(frozen=True)
class Int4DynamicActivationConfig(WeightConfig):
    """Symmetric 4-bit weights, activations of 8 bits with one scale a token (W4A8).

    Attributes:
        activation: ``"fp8"`` (e4m3), which keeps outliers and small values, or ``"int8"``.
        group_size: In features per scale, -1 for one scale a row. The Hopper kernel takes multiples of 128 and rows.
        scale_dtype: dtype of the scales; None for the weight's.
    """

    name: ClassVar[str] = "int4_dynamic_activation"
    activation: Literal["fp8", "int8"] = "fp8"
    group_size: int = 128
    scale_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        _check(self.activation)
        check_group_size(self.group_size)
        int4_spec(self.group_size, True, self.scale_dtype or torch.float32)

    def quantize(self, w: Tensor) -> LowBitTensor:
        """Return ``w: (N, K)`` as an Int4DynamicTensor."""
        return Int4DynamicTensor.from_hp(w, self.group_size, activation=self.activation, scale_dtype=self.scale_dtype)

    def validate(self, w: Tensor) -> None:
        """Raise a named error if ``w`` cannot be quantized so."""
        int4_spec(self.group_size, True, torch.float32).resolve_group_size(w.shape[1])


@dataclass(frozen=True)
class Int8DynamicActivationConfig(WeightConfig):
    """8-bit weights with one scale a row, activations of the same 8 bits with one scale a token (W8A8).

    Attributes:
        activation: ``"int8"``, or ``"fp8"`` (e4m3) for weights and activations.
    """

    name: ClassVar[str] = "int8_dynamic_activation"
    activation: Literal["int8", "fp8"] = "int8"

    def __post_init__(self) -> None:
        _check(self.activation)

    def quantize(self, w: Tensor) -> LowBitTensor:
        """Return ``w: (N, K)`` as an Int8DynamicTensor."""
        return Int8DynamicTensor.from_hp(w, self.activation)

    def validate(self, w: Tensor) -> None:
        """Accept every matrix."""


def _check(activation: str) -> None:
    if activation not in ("int8", "fp8"):
        raise SpecError(f"activation={activation!r}: expected 'int8' or 'fp8'")
