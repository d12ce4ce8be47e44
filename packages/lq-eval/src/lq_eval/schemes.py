"""Schemes by name, and the error and size of each on one matrix.

A scheme is a short name for a configuration of :func:`lq_torch.quantize_`::

    int8  int8-tensor                         8 bits, one scale a row or for the tensor
    int4-g128  int4-g128-asym                 4 bits, symmetric or asymmetric, one scale per 128 in features
    int4-row  int4-row-asym                   4 bits, one scale a row
    int4-g128-mse  int4-g128-asym-hqq         scales and zeros searched (without: round to nearest)
    int4-g128:gemlite                         the same numbers in another packing
    int4-g128-a8-fp8  int8-a8-int8            activations quantized per token on each call, to fp8 or int8
    q4_0  q8_0  q4_k  q6_k  iq4_nl  mxfp4     ggml blocks
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lq_torch
import torch
from lq_formats import SpecError, UnsupportedError, check_float, check_matrix
from lq_torch import GGMLWeightOnlyConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig, WeightConfig
from torch import Tensor

_INT4 = re.compile(
    r"int4-(?:g(?P<group>\d+)|row)(?P<asym>-asym)?(?:-(?P<algorithm>rtn|mse|hqq))?(?::(?P<format>[a-z0-9_]+))?"
)
_DYNAMIC = re.compile(r"(?P<weight>int4-(?:g\d+|row)|int8)-a8-(?P<activation>fp8|int8)")
_GGML = re.compile(r"q\d_[\dk]|iq4_nl|mxfp4")

DEMO_SCHEMES = (
    "int8",
    "int4-g32",
    "int4-g32-asym",
    "q4_0",
    "int4-g128",
    "int4-g128-asym",
    "int4-g128-mse",
    "int4-g128-asym-mse",
    "int4-g256",
    "int4-g256-asym",
    "int4-row",
    "int4-row-asym",
)
MATRIX_SCHEMES = ("int8", "int8-tensor", *DEMO_SCHEMES[1:])

SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse_scheme(name: str, scale_dtype: torch.dtype | None = None) -> WeightConfig:
    """Return the lq_torch configuration that a scheme's name stands for.

    Args:
        name: See the module docstring.
        scale_dtype: dtype of int4 scales; None for the weight's own. int8 scales are float32 and ggml's float16.

    Raises:
        SpecError: If the name is none of these.
    """
    if name in ("int8", "int8-tensor"):
        return Int8WeightOnlyConfig(granularity="tensor" if name.endswith("tensor") else "row")
    if _GGML.fullmatch(name):
        return GGMLWeightOnlyConfig(name)
    if dynamic := _DYNAMIC.fullmatch(name):
        return _dynamic_config(dynamic["weight"], dynamic["activation"], scale_dtype)
    match = _INT4.fullmatch(name)
    if match is None:
        raise SpecError(
            f"unknown scheme {name!r}: expected int8, int8-tensor, int4-g<group>, int4-row (either with -asym, "
            "-mse or -hqq and :<packing format>), int4-g<group>-a8-fp8, int8-a8-int8 or a ggml type such as q4_0 and q4_k"
        )
    options: dict[str, Any] = {"int4_choose_qparams_algorithm": match["algorithm"] or "rtn"}
    if match["format"]:
        options["int4_packing_format"] = match["format"]
    return Int4WeightOnlyConfig(
        group_size=int(match["group"]) if match["group"] else -1,
        symmetric=match["asym"] is None,
        scale_dtype=scale_dtype,
        **options,
    )


def _dynamic_config(weight: str, activation: str, scale_dtype: torch.dtype | None) -> WeightConfig:
    """Return the configuration of weights whose activations are quantized on each call; ``scale_dtype`` is for int4."""
    name = "Int8DynamicActivationConfig" if weight == "int8" else "Int4DynamicActivationConfig"
    config = getattr(lq_torch, name, None)
    if config is None:
        raise UnsupportedError(f"{weight} weights with {activation} activations need lq_torch.{name}")
    options: dict[str, Any] = {"activation": activation}
    if weight != "int8":
        options["group_size"] = -1 if weight == "int4-row" else int(weight.removeprefix("int4-g"))
        options["scale_dtype"] = scale_dtype
    made: WeightConfig = config(**options)
    return made


def parse_schemes(names: str, scale_dtype: torch.dtype | None = None) -> dict[str, WeightConfig]:
    """Read a comma-separated list of schemes into configurations by name, in order.

    Raises:
        SpecError: If a name is unknown or there is none.
    """
    found = {item: parse_scheme(item, scale_dtype) for item in (part.strip() for part in names.split(",")) if item}
    if not found:
        raise SpecError(f"no scheme in {names!r}: expected for example 'int8,int4-g128'")
    return found


def weight_nbytes(weight: Tensor) -> int:
    """Return the bytes of a weight: all codes, scales and zeros of a quantized one."""
    packed = getattr(weight, "packed_nbytes", None)
    return int(packed) if packed is not None else weight.numel() * weight.element_size()


@dataclass(frozen=True)
class MatrixError:
    """What a scheme does to one matrix.

    Attributes:
        scheme: Its name.
        scale_dtype: dtype of the scales, for example ``"float32"``.
        mae: Mean absolute error per weight.
        relative_rmse: ``|w - dequantized| / |w|`` in the Frobenius norm.
        bits_per_weight: True bits, scales and zeros included.
        reduction: Bytes of the 16-bit matrix over bytes of the quantized one.
    """

    scheme: str
    scale_dtype: str
    mae: float
    relative_rmse: float
    bits_per_weight: float
    reduction: float


def measure_matrix(
    w: Tensor,
    schemes: Sequence[str] = MATRIX_SCHEMES,
    scale_dtypes: Sequence[str] = ("float32", "float16"),
) -> Iterator[MatrixError]:
    """Yield error and size of every scheme on ``w: (N, K)``.

    int4 schemes are measured with each of ``scale_dtypes``; the scales of int8 (float32) and ggml (float16) are fixed.

    Raises:
        SpecError: If a name is unknown.
        ShapeError, GroupSizeError, DTypeError, NonFiniteError: If ``w`` does not fit a scheme.
    """
    check_float(w)
    check_matrix(w)
    for dtype in scale_dtypes:
        if dtype not in SCALE_DTYPES:
            raise SpecError(f"unknown scale dtype {dtype!r}: expected one of {', '.join(SCALE_DTYPES)}")
    exact = w.detach().float()
    norm = float(exact.norm())
    for name in schemes:
        parse_scheme(name)
        chosen = (
            list(scale_dtypes) if name.startswith("int4") else ["float32" if name.startswith("int8") else "float16"]
        )
        for dtype in chosen:
            weight = parse_scheme(name, SCALE_DTYPES[dtype]).quantize(exact)
            difference = weight.dequantize() - exact
            nbytes = weight_nbytes(weight)
            yield MatrixError(
                scheme=name,
                scale_dtype=dtype,
                mae=float(difference.abs().mean(dtype=torch.float64)),
                relative_rmse=float(difference.norm()) / norm if norm else math.nan,
                bits_per_weight=nbytes * 8 / w.numel(),
                reduction=w.numel() * 2 / nbytes,
            )
