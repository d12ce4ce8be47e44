"""What products with dynamically quantized activations are: slow and obvious, on any device.

A token ``x`` becomes codes of 8 bits and one scale, for itself alone::

    amax    = max(max|x|, 2**-100)         top = 127 for int8, 448 for fp8 (e4m3)
    scale   = amax / top                   inverse = top / amax          both rounded to float32
    codes   = round(x * inverse)           to nearest even; int8: of the exact product, fp8: of the product in float32

A token that holds NaN or infinity has the scale NaN and zeros for codes, so its row of the result is NaN, and no other.
The product is ``y = (codes * scale) @ w.T + bias`` with the weight as it is dequantized.
"""

from typing import Literal, TypeAlias

import torch
from lq_formats import QuantSpec, dequantize_affine
from lq_formats.layouts import FRAGMENT_A8_FP8, FRAGMENT_A8_INT8, Fragment8Layout
from torch import Tensor

Activation: TypeAlias = Literal["int8", "fp8"]

LAYOUTS: dict[str, Fragment8Layout] = {"int8": FRAGMENT_A8_INT8, "fp8": FRAGMENT_A8_FP8}
"""The packing of int4 weights for tokens of each kind."""
TOPS = {"int8": 127.0, "fp8": 448.0}
"""The largest code."""
LEAST = 2.0**-100
"""Smaller largest magnitudes count as this one: neither the scale nor its inverse leaves the normal floats."""


def quantize_tokens_reference(x: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Return codes ``(M, K)`` and scales ``(M,) float32`` of ``x (M, K)``; see the module docstring."""
    values = x.detach().to(torch.float32)
    amax = values.abs().amax(dim=1) if x.shape[0] else values.new_zeros(0)
    finite = torch.isfinite(amax)
    # One device's division by a number is another's multiplication by its reciprocal; by a tensor it is a division.
    amax = torch.where(finite, amax, torch.ones_like(amax)).clamp(min=LEAST)
    top = torch.full_like(amax, TOPS[activation])
    scale, inverse = amax / top, top / amax
    values = torch.where(finite[:, None], values, torch.zeros_like(values))
    if activation == "int8":
        codes = (values.to(torch.float64) * inverse.to(torch.float64)[:, None]).round_().to(torch.int8)
    else:
        codes = (values * inverse[:, None]).to(torch.float8_e4m3fn)
    return codes, torch.where(finite, scale, torch.full_like(scale, float("nan")))


def dequantize_tokens_reference(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``codes * scale``, rounded once to ``dtype``."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return (codes.to(compute) * scale.to(compute)[:, None]).to(dtype)


def int8_dynamic_dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the ``(N, K)`` weight ``weight * scale`` of int8 or e4m3 codes, rounded once to ``dtype``."""
    return dequantize_tokens_reference(weight, scale, dtype)


def int4_dynamic_dequantize(
    packed: Tensor,
    scale: Tensor,
    group_size: int,
    out_features: int,
    in_features: int,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """Return the ``(N, K)`` weight of int4 codes in fragment order, rounded once to ``dtype``."""
    layout = LAYOUTS[activation]
    codes = layout.unpack(packed, out_features, in_features)
    scales = layout.restore_scales(scale, out_features, in_features, group_size)
    if group_size == in_features:
        spec = QuantSpec(4, "row", None, True, scale.dtype)
    else:
        spec = QuantSpec(4, "group", group_size, True, scale.dtype)
    return dequantize_affine(codes, scales, None, spec, dtype)


def linear_reference(x: Tensor, w: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """Return the product of quantized ``x (M, K)`` and a float64 weight in float64, rounded once to x's dtype."""
    codes, scale = quantize_tokens_reference(x, activation)
    y = dequantize_tokens_reference(codes, scale, torch.float64) @ w.t()
    return (y if bias is None else y + bias.to(torch.float64)).to(x.dtype)
