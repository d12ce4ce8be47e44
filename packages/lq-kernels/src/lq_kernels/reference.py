"""Slow and obvious oracles: what every kernel of this package must agree with, within stated bounds.

They run on any device, allocate freely and read like the definition. Tests compare kernels with them in float64; the
registry falls back on them where nothing faster can run.
"""

import functools

import torch
from lq_formats import (
    DeviceError,
    DTypeError,
    QuantSpec,
    ShapeError,
    check_matrix,
    check_tensors,
    dequantize_affine,
    dequantize_weight_int8,
    unpack_int4,
)
from lq_formats.layouts import FRAGMENT_INT4, FRAGMENT_INT8
from torch import Tensor


@functools.lru_cache(maxsize=1024)
def int4_spec(group_size: int, in_features: int, symmetric: bool, scale_dtype: torch.dtype) -> QuantSpec:
    """Return the spec of a 4-bit weight; a group as long as the row is a row."""
    if group_size == in_features:
        return QuantSpec(4, "row", None, symmetric, scale_dtype)
    return QuantSpec(4, "group", group_size, symmetric, scale_dtype)


def int8_spec(scale: Tensor) -> QuantSpec:
    """Return the spec of an 8-bit weight with scales ``(N,)``, or ``()`` for one in all."""
    return QuantSpec(8, "row" if scale.dim() == 1 else "tensor", None, True, scale.dtype)


def int4_dequantize_reference(
    qweight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Return the ``(N, K)`` weight ``(u - zero) * scale`` of canonical int4 bits, rounded once to ``dtype``."""
    spec = int4_spec(group_size, in_features, zero is None, scale.dtype)
    return dequantize_affine(unpack_int4(qweight, in_features), scale, zero, spec, dtype)


def int4_linear_reference(x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    """Return ``x (M, K) @ w.T`` in float64, rounded once to x's dtype; ``w`` as :func:`int4_dequantize_reference`."""
    w = int4_dequantize_reference(qweight, scale, zero, group_size, x.shape[-1], torch.float64)
    return (x.to(torch.float64) @ w.t()).to(x.dtype)


def int8_linear_reference(x: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
    """Return ``x (M, K) @ (q * scale).T`` in float64, rounded once to x's dtype."""
    w = dequantize_weight_int8(qweight, scale, torch.float64)
    return (x.to(torch.float64) @ w.t()).to(x.dtype)


def preshuffled_dequantize_reference(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the ``(N, K)`` weight of bits in fragment order, rounded once to ``dtype``."""
    layout = FRAGMENT_INT4 if bits == 4 else FRAGMENT_INT8
    codes = layout.unpack(packed, out_features, in_features)
    scales = layout.restore_scales(scale, out_features, in_features, group_size)
    zeros = None if zero is None else layout.restore_scales(zero, out_features, in_features, group_size)
    if group_size == in_features:
        spec = QuantSpec(bits, "row", None, zero is None, scale.dtype)
    else:
        spec = QuantSpec(bits, "group", group_size, zero is None, scale.dtype)
    return dequantize_affine(codes, scales, zeros, spec, dtype)


def preshuffled_linear_reference(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    bits: int,
    residual: Tensor | None = None,
) -> Tensor:
    """Return ``x (M, K) @ w.T + bias + residual`` in float64, rounded once to x's dtype."""
    w = preshuffled_dequantize_reference(packed, scale, zero, bits, group_size, out_features, x.shape[1], torch.float64)
    y = x.to(torch.float64) @ w.t()
    for term in (bias, residual):
        if term is not None:
            y += term.to(torch.float64)
    return y.to(x.dtype)


def minima_dequantize_reference(
    packed: Tensor,
    scale: Tensor,
    minimum: Tensor,
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the ``(N, K)`` weight ``u * scale + minimum`` of int4 bits in fragment order, rounded once to ``dtype``."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    groups = in_features // group_size
    codes = FRAGMENT_INT4.unpack(packed, out_features, in_features).view(out_features, groups, group_size).to(compute)
    scales, minima = (
        FRAGMENT_INT4.restore_scales(each, out_features, in_features, group_size).to(compute)[..., None]
        for each in (scale, minimum)
    )
    return (codes * scales + minima).view(out_features, in_features).to(dtype)


def minima_linear_reference(
    x: Tensor, packed: Tensor, scale: Tensor, minimum: Tensor, bias: Tensor | None, out_features: int, group_size: int
) -> Tensor:
    """Return ``x (M, K) @ w.T + bias`` in float64, rounded once to x's dtype."""
    w = minima_dequantize_reference(packed, scale, minimum, group_size, out_features, x.shape[1], torch.float64)
    y = x.to(torch.float64) @ w.t()
    return (y if bias is None else y + bias.to(torch.float64)).to(x.dtype)


def int8_gemm_torch(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """W8A16 product in plain torch: dequantize, multiply in float32 (float64 for float64 x), round once.

    Args:
        x: ``(..., K)`` activations.
        weight: ``(N, K) int8``.
        scale: ``(N,)`` or ``()``.
        bias: ``(N,)`` or None.

    Returns:
        ``(..., N)`` in x's dtype.

    Raises:
        ShapeError, DTypeError, DeviceError: If the arguments do not fit each other.
    """
    rows, columns = check_matrix(weight, "weight")
    check_tensors(x=x)
    if bias is not None:
        check_tensors(bias=bias)
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ShapeError(f"x has shape {tuple(x.shape)}: a weight of shape {(rows, columns)} needs (..., {columns})")
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ShapeError(f"bias has shape {tuple(bias.shape)}: expected ({rows},)")
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise DTypeError(f"{name} has dtype {tensor.dtype}: expected floating point")
        if tensor is not None and tensor.device != weight.device:
            raise DeviceError(f"{name} is on {tensor.device} and weight on {weight.device}; move one of them")
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    w = dequantize_weight_int8(weight, scale, compute)
    y = torch.nn.functional.linear(x.to(compute), w, None if bias is None else bias.to(compute))
    return y.to(x.dtype)


def gemm_q4_0_q8_1_reference(weight_q: Tensor, activation_q: Tensor) -> Tensor:
    """Return the Q4_0 x Q8_1 product with the blocks' own arithmetic, summed in float64.

    ``sum over blocks of d4 * (d8 * sum(q4 * q8) - 8 * s8)`` with unsigned q4: the definition that ggml's kernels
    compute, not the product of dequantized operands (which differs by the rounding of ``s8``).

    Args:
        weight_q: ``(M, B, 18) uint8`` Q4_0 blocks.
        activation_q: ``(N, B, 36) uint8`` Q8_1 blocks.

    Returns:
        ``(M, N) float32``.
    """
    out = torch.zeros(weight_q.shape[0], activation_q.shape[0], dtype=torch.float64, device=weight_q.device)
    d4 = weight_q[..., 0:2].contiguous().view(torch.float16).to(torch.float64)[..., 0]
    q4 = torch.cat((weight_q[..., 2:] & 0x0F, weight_q[..., 2:] >> 4), dim=-1).to(torch.float64)
    d8 = activation_q[..., 0:2].contiguous().view(torch.float16).to(torch.float64)[..., 0]
    s8 = activation_q[..., 2:4].contiguous().view(torch.float16).to(torch.float64)[..., 0]
    q8 = activation_q[..., 4:].contiguous().view(torch.int8).to(torch.float64)
    # sum_b d4 d8 (q4 . q8) is one product of scaled codes, exact up to float64 rounding.
    rows, tokens = weight_q.shape[0], activation_q.shape[0]
    out += (q4 * d4[..., None]).reshape(rows, -1) @ (q8 * d8[..., None]).reshape(tokens, -1).t()
    out -= 8 * d4 @ s8.t()
    return out.to(torch.float32)
