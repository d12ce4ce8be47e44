"""What calibrated codes become: the tensor subclass that ``quantize_`` makes of the same configuration."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lq_formats import GGML_FORMATS, QuantSpec, UnsupportedError, ggml_format, pack_int4
from torch import Tensor

from lq_torch.config import GGMLWeightOnlyConfig, Int4PackingFormat, Int4WeightOnlyConfig, WeightConfig
from lq_torch.config_intx import IntxWeightOnlyConfig
from lq_torch.tensors import Int4PreshuffledTensor, Int4Tensor, IntxTensor, LowBitTensor
from lq_torch.tensors.int4 import int4_spec

Build = Callable[[Tensor, Tensor, Tensor | None, torch.dtype], LowBitTensor]


@dataclass(frozen=True)
class Target:
    """How one weight is quantized.

    Attributes:
        spec: Bits, groups, symmetry and the dtype of scales.
        build: ``(codes (N, K) uint8, scale (N, G), zero (N, G) or None, dtype) -> weight``.
    """

    spec: QuantSpec
    build: Build


def target_of(config: WeightConfig, dtype: torch.dtype) -> Target:
    """Return what a configuration makes of a weight of ``dtype``.

    Raises:
        UnsupportedError: If its bits have no scales and zeros that calibration could choose.
    """
    if isinstance(config, IntxWeightOnlyConfig):
        bits = config.bits
        return Target(
            config.spec(dtype),
            lambda codes, scale, zero, dtype: IntxTensor.from_codes(codes, scale, zero, bits=bits, dtype=dtype),
        )
    if isinstance(config, Int4WeightOnlyConfig):
        spec = int4_spec(config.group_size, config.symmetric, config.scale_dtype or dtype)
        if config.int4_packing_format is Int4PackingFormat.PLAIN:
            return Target(spec, _plain)
        if config.int4_packing_format is Int4PackingFormat.PRESHUFFLED:
            return Target(spec, lambda *parts: Int4PreshuffledTensor.from_plain(_plain(*parts)))
        raise UnsupportedError(
            f"calibration into int4_packing_format={config.int4_packing_format.value!r}; calibrate with 'plain', the "
            "canonical bits"
        )
    raise UnsupportedError(
        f"calibration chooses scales, zeros and codes of Int4WeightOnlyConfig or IntxWeightOnlyConfig, not of "
        f"{type(config).__name__}; use quantize_ for that, or imatrix for ggml types"
    )


def searched_type(config: WeightConfig) -> str:
    """Return the ggml type that a configuration quantizes to by a search.

    Raises:
        UnsupportedError: If it is no ggml type, or one whose scales are not searched.
    """
    if isinstance(config, GGMLWeightOnlyConfig) and ggml_format(config.ggml_type).weighted:
        return config.ggml_type
    came = config.ggml_type if isinstance(config, GGMLWeightOnlyConfig) else type(config).__name__
    searched = ", ".join(name for name, form in GGML_FORMATS.items() if form.weighted)
    raise UnsupportedError(f"an importance steers the search of GGMLWeightOnlyConfig for {searched}, not {came}")


def _plain(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Int4Tensor:
    columns = codes.shape[1]
    return Int4Tensor.from_packed(
        pack_int4(codes), scale, zero, group_size=columns // scale.shape[1], in_features=columns, dtype=dtype
    )
