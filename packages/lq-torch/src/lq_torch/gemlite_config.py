"""GemliteConfig: every weight and activation format that runs through gemlite."""

from dataclasses import dataclass
from typing import ClassVar

from lq_formats import SpecError, UnsupportedError
from torch import Tensor

from lq_torch.config import WeightConfig, check_group_size
from lq_torch.tensors import LowBitTensor
from lq_torch.tensors.gemlite_dynamic import GemliteTensor, check_combination
from lq_torch.tensors.int4_gemlite import Int4GemliteTensor

_WEIGHT_ONLY_BITS = {"int1": 1, "int2": 2, "int4": 4, "int8": 8}


@dataclass(frozen=True)
class GemliteConfig(WeightConfig):
    """Weights for gemlite's kernels, with or without activations quantized on the fly.

    Attributes:
        weight: ``"int1"``, ``"int2"``, ``"int4"``, ``"int8"``, ``"fp8"``, ``"mxfp4"`` or ``"mxfp8"``.
        activation: ``"none"``, or the format gemlite quantizes x to on each call: ``"int8"`` (with int8 and int4
            weights), ``"fp8"`` (fp8, int4), ``"mxfp8"`` (mxfp8, mxfp4), ``"mxfp4"`` (mxfp4).
        group_size: In features per scale; -1 for one a row; None for 128 for integers with activations as they are,
            and for what the format prescribes otherwise.
    """

    name: ClassVar[str] = "gemlite"
    weight: str = "int4"
    activation: str = "none"
    group_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "activation"):
            if not isinstance(getattr(self, name), str):
                raise SpecError(f"{name}={getattr(self, name)!r}: expected the name of a format, for example 'int8'")
        if self.group_size is not None:
            check_group_size(self.group_size)
        if self.weight in _WEIGHT_ONLY_BITS and self.activation == "none":
            return
        if self.weight in ("int1", "int2"):
            raise UnsupportedError(f"{self.weight} weights are multiplied with activations as they are ('none') only")
        check_combination(self.weight, self.activation)

    def quantize(self, w: Tensor) -> LowBitTensor:
        """Return ``w: (N, K)`` as an Int4GemliteTensor (integers, no activation format) or a GemliteTensor."""
        if self.activation == "none" and self.weight in _WEIGHT_ONLY_BITS:
            return Int4GemliteTensor.from_hp(w, self._weight_only_group(), _WEIGHT_ONLY_BITS[self.weight])
        return GemliteTensor.from_hp(w, self.weight, self.activation, self.group_size)

    def validate(self, w: Tensor) -> None:
        """Raise the named error of the first reason why gemlite cannot take ``w``."""
        if self.activation == "none" and self.weight in _WEIGHT_ONLY_BITS:
            Int4GemliteTensor.check_shape(w, self._weight_only_group(), _WEIGHT_ONLY_BITS[self.weight])
        else:
            GemliteTensor.check_shape(w, self.weight, self.activation, self.group_size)

    def _weight_only_group(self) -> int:
        return 128 if self.group_size is None else self.group_size
