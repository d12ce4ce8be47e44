"""IntxWeightOnlyConfig: weights of 2 to 8 bits in dense packing."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from lq_formats import QuantSpec, SpecError
from lq_formats.search import ALGORITHMS
from torch import Tensor

from lq_torch.config import WeightConfig, check_group_size
from lq_torch.tensors.base import LowBitTensor
from lq_torch.tensors.intx import IntxTensor


@dataclass(frozen=True)
class IntxWeightOnlyConfig(WeightConfig):
    """Weights of any width, one scale a group, activations as they are; dequantized for each product.

    Attributes:
        bits: 2 to 8. For 4, ``Int4WeightOnlyConfig`` has kernels.
        group_size: In features per scale, from 8 up; -1 for one scale a row.
        symmetric: No zero points.
        scale_dtype: dtype of the scales; None for the weight's.
        choose_qparams_algorithm: How scales and zeros are chosen: ``"mse"``, ``"hqq"`` or ``"rtn"``
            (:func:`lq_formats.search_qparams`).
    """

    name: ClassVar[str] = "intx_weight_only"
    bits: int = 3
    group_size: int = 128
    symmetric: bool = True
    scale_dtype: torch.dtype | None = None
    choose_qparams_algorithm: Literal["rtn", "mse", "hqq"] = "mse"

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise SpecError(f"bits={self.bits!r}: expected an integer from 2 to 8")
        if self.choose_qparams_algorithm not in ALGORITHMS:
            raise SpecError(
                f"choose_qparams_algorithm={self.choose_qparams_algorithm!r}: expected one of {', '.join(ALGORITHMS)}"
            )
        check_group_size(self.group_size)
        self.spec(torch.float32)

    def spec(self, dtype: torch.dtype) -> QuantSpec:
        """Return how weights of ``dtype`` are quantized."""
        scale_dtype = self.scale_dtype or dtype
        if self.group_size == -1:
            return QuantSpec(self.bits, "row", None, self.symmetric, scale_dtype)
        return QuantSpec(self.bits, "group", self.group_size, self.symmetric, scale_dtype)

    def quantize(self, w: Tensor) -> LowBitTensor:
        """Return ``w: (N, K)`` as an IntxTensor."""
        return IntxTensor.from_hp(w, self.spec(w.dtype), self.choose_qparams_algorithm)

    def validate(self, w: Tensor) -> None:
        """Raise a named error if ``w`` cannot be quantized so."""
        self.spec(torch.float32).resolve_group_size(w.shape[1])
