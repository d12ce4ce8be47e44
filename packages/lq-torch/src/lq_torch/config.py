"""What to quantize weights to: frozen, validated, JSON round-trippable configurations for ``quantize_``."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum, StrEnum
from typing import Any, ClassVar, Literal

import torch
from lq_formats import GGML_FORMATS, ShapeError, SpecError, UnsupportedError, ggml_format
from lq_formats.search import ALGORITHMS
from torch import Tensor

from lq_torch.tensors import (
    GGMLTensor,
    Int4PreshuffledTensor,
    Int4Tensor,
    Int4TilePackedTensor,
    Int8PreshuffledTensor,
    Int8Tensor,
    LowBitTensor,
)
from lq_torch.tensors.int4 import int4_spec

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Int4PackingFormat(StrEnum):
    """Where the bits of an int4 weight are.

    - ``plain``: lq's canonical packing; the kernels of lq-kernels on any device.
    - ``preshuffled``: the order of Hopper's tensor cores, rearranged when quantized: stored once, for lq's CUDA kernels.
      Elsewhere it works, slower.
    - ``tile_packed_to_4d``: ATen's tinygemm layout; bf16.
    - ``gemlite``: gemlite's packing and kernels (extra ``lq-torch[gemlite]``).
    """

    PLAIN = "plain"
    PRESHUFFLED = "preshuffled"
    TILE_PACKED_TO_4D = "tile_packed_to_4d"
    GEMLITE = "gemlite"


@dataclass(frozen=True)
class WeightConfig:
    """Base of all configurations: a name, JSON, and what it does to one weight."""

    name: ClassVar[str] = ""
    _classes: ClassVar[dict[str, type["WeightConfig"]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        WeightConfig._classes[cls.name] = cls

    def quantize(self, w: Tensor) -> LowBitTensor:
        """Return the quantized weight of a floating point ``w: (N, K)``."""
        raise NotImplementedError

    def validate(self, w: Tensor) -> None:
        """Raise a named error if ``w`` cannot be quantized so, without quantizing it (w may be on ``meta``)."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; :meth:`from_dict` reads them back."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"name": self.name} | {
            key: value.value
            if isinstance(value, Enum)
            else str(value).removeprefix("torch.")
            if isinstance(value, torch.dtype)
            else value
            for key, value in values.items()
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "WeightConfig":
        """Build the configuration that :meth:`to_dict` describes.

        Raises:
            SpecError: If it is not one.
        """
        if not isinstance(data, Mapping):
            raise SpecError(f"a configuration is a map of names to values, not a {type(data).__name__}")
        values = dict(data)
        name = values.pop("name", None)
        cls = WeightConfig._classes.get(name) if isinstance(name, str) else None
        if cls is None:
            raise SpecError(
                f"unknown configuration {data.get('name')!r}: expected one of {sorted(WeightConfig._classes)}"
            )
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise SpecError(f"{cls.__name__} has no {', '.join(sorted(str(key) for key in unknown))}")
        dtype = values.get("scale_dtype")
        if dtype is not None:
            if not isinstance(dtype, str) or dtype not in _DTYPES:
                raise SpecError(f"scale_dtype={dtype!r}: expected one of {', '.join(_DTYPES)}")
            values["scale_dtype"] = _DTYPES[dtype]
        return cls(**values)

    def to_json(self) -> str:
        """Return the configuration as a JSON object."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "WeightConfig":
        """Build the configuration that :meth:`to_json` describes.

        Raises:
            SpecError: If the text is not JSON or not a configuration.
        """
        try:
            data = json.loads(text)
        except (TypeError, ValueError) as error:
            raise SpecError(f"not a JSON configuration: {error}") from None
        if not isinstance(data, dict):
            raise SpecError(f"a configuration is a JSON object, not {type(data).__name__}")
        return WeightConfig.from_dict(data)


def check_group_size(group_size: object) -> None:
    """Raise SpecError unless a group size is an integer; -1.0 would pass for -1."""
    if type(group_size) is not int:
        raise SpecError(f"group_size={group_size!r}: expected an integer, -1 for one scale a row")


@dataclass(frozen=True)
class Int4WeightOnlyConfig(WeightConfig):
    """4-bit weights, activations as they are (W4A16).

    Attributes:
        group_size: In features per scale; -1 for one scale a row.
        int4_packing_format: Where the bits are; see :class:`Int4PackingFormat`.
        symmetric: No zero points. gemlite takes symmetric weights only.
        scale_dtype: dtype of the scales; None for the weight's.
        int4_choose_qparams_algorithm: How scales and zeros are chosen: ``"mse"`` searches ranges, ``"hqq"`` refits zeros,
            ``"rtn"`` represents the whole range (:func:`lq_formats.search_qparams`).
    """

    name: ClassVar[str] = "int4_weight_only"
    group_size: int = 128
    int4_packing_format: Int4PackingFormat = Int4PackingFormat.PLAIN
    symmetric: bool = True
    scale_dtype: torch.dtype | None = None
    int4_choose_qparams_algorithm: Literal["rtn", "mse", "hqq"] = "mse"

    def __post_init__(self) -> None:
        algorithm = self.int4_choose_qparams_algorithm
        if algorithm not in ALGORITHMS:
            raise SpecError(f"int4_choose_qparams_algorithm={algorithm!r}: expected one of {', '.join(ALGORITHMS)}")
        try:
            packing = Int4PackingFormat(self.int4_packing_format)
        except ValueError:
            known = ", ".join(item.value for item in Int4PackingFormat)
            raise SpecError(f"int4_packing_format={self.int4_packing_format!r}: expected one of {known}") from None
        object.__setattr__(self, "int4_packing_format", packing)
        if packing is Int4PackingFormat.GEMLITE and not self.symmetric:
            raise SpecError("int4_packing_format='gemlite' is symmetric; use 'plain' for zero points")
        ours = (Int4PackingFormat.PLAIN, Int4PackingFormat.PRESHUFFLED)
        if packing not in ours and self.scale_dtype is not None:
            raise SpecError(
                f"scale_dtype goes with int4_packing_format='plain' or 'preshuffled', not {packing.value!r}"
            )
        check_group_size(self.group_size)
        int4_spec(self.group_size, self.symmetric, self.scale_dtype or torch.float32)

    def quantize(self, w: Tensor) -> LowBitTensor:
        """Return ``w: (N, K)`` as the tensor subclass of the packing format."""
        algorithm = self.int4_choose_qparams_algorithm
        if self.int4_packing_format is Int4PackingFormat.TILE_PACKED_TO_4D:
            return Int4TilePackedTensor.from_hp(w, self.group_size, symmetric=self.symmetric, algorithm=algorithm)
        if self.int4_packing_format is Int4PackingFormat.GEMLITE:
            from lq_torch.tensors.int4_gemlite import Int4GemliteTensor

            packed: LowBitTensor = Int4GemliteTensor.from_hp(w, self.group_size, algorithm=algorithm)
            return packed
        cls = Int4PreshuffledTensor if self.int4_packing_format is Int4PackingFormat.PRESHUFFLED else Int4Tensor
        return cls.from_hp(
            w, self.group_size, symmetric=self.symmetric, scale_dtype=self.scale_dtype, algorithm=algorithm
        )

    def validate(self, w: Tensor) -> None:
        """Raise a named error if ``w`` cannot be quantized so."""
        spec = int4_spec(self.group_size, self.symmetric, torch.float32)
        spec.resolve_group_size(w.shape[1])
        if self.int4_packing_format is Int4PackingFormat.TILE_PACKED_TO_4D:
            Int4TilePackedTensor.check_shape(w, self.group_size)
        if self.int4_packing_format is Int4PackingFormat.GEMLITE:
            from lq_torch.tensors.int4_gemlite import Int4GemliteTensor

            Int4GemliteTensor.check_shape(w, self.group_size)


@dataclass(frozen=True)
class Int8WeightOnlyConfig(WeightConfig):
    """8-bit weights, activations as they are (W8A16).

    Attributes:
        granularity: ``"row"`` for one scale an out feature, ``"tensor"`` for one in all.
        int8_packing_format: ``"plain"``, or ``"preshuffled"`` for the order of Hopper's tensor cores (one scale a row).
    """

    name: ClassVar[str] = "int8_weight_only"
    granularity: Literal["row", "tensor"] = "row"
    int8_packing_format: Literal["plain", "preshuffled"] = "plain"

    def __post_init__(self) -> None:
        if self.granularity not in ("row", "tensor"):
            raise SpecError(f"granularity={self.granularity!r}: expected 'row' or 'tensor'")
        if self.int8_packing_format not in ("plain", "preshuffled"):
            raise SpecError(f"int8_packing_format={self.int8_packing_format!r}: expected 'plain' or 'preshuffled'")
        if self.int8_packing_format == "preshuffled" and self.granularity != "row":
            raise SpecError("int8_packing_format='preshuffled' has one scale a row: use granularity='row'")

    def quantize(self, w: Tensor) -> LowBitTensor:
        """Return ``w: (N, K)`` as the tensor subclass of the packing format."""
        if self.int8_packing_format == "preshuffled":
            return Int8PreshuffledTensor.from_hp(w)
        return Int8Tensor.from_hp(w, self.granularity)

    def validate(self, w: Tensor) -> None:
        """Accept every matrix."""


@dataclass(frozen=True)
class GGMLWeightOnlyConfig(WeightConfig):
    """Weights in ggml blocks.

    Attributes:
        ggml_type: ``"q4_0"``, ``"q4_1"``, ``"q5_0"``, ``"q5_1"``, ``"q8_0"``, ``"iq4_nl"``, ``"mxfp4"``, ``"q4_k"``,
            ``"q5_k"`` or ``"q6_k"``. Other types come from files only.
    """

    name: ClassVar[str] = "ggml_weight_only"
    ggml_type: str = "q4_0"

    def __post_init__(self) -> None:
        form = ggml_format(self.ggml_type)
        if form.name == "q8_1":
            raise SpecError("q8_1 is ggml's format for activations; use q8_0 for weights")
        if form.quantizer is None:
            written = ", ".join(name for name, other in GGML_FORMATS.items() if other.quantizer and name != "q8_1")
            raise UnsupportedError(f"lq reads {form.name} but does not quantize to it: expected one of {written}")
        object.__setattr__(self, "ggml_type", form.name)

    def quantize(self, w: Tensor) -> LowBitTensor:
        """Return ``w: (N, K)`` as a GGMLTensor."""
        return GGMLTensor.from_hp(w, self.ggml_type)

    def validate(self, w: Tensor) -> None:
        """Raise ShapeError unless K is a multiple of the block size."""
        block = ggml_format(self.ggml_type).block_size
        if w.shape[1] % block:
            raise ShapeError(
                f"in_features={w.shape[1]} is not a multiple of the {block} elements of a {self.ggml_type} block"
            )
