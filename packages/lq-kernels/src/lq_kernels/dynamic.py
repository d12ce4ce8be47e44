"""Products with activations that are quantized to 8 bits on the way, one scale a token (W8A8 and W4A8).

The tokens are quantized by one kernel that reads them once, and multiplied in 8 bits; scales are applied to the sums. What
comes out is defined, for all devices, in :mod:`lq_kernels.dynamic_reference`.
"""

import torch
from lq_formats import DTypeError, ShapeError, SpecError, check_tensors, pack_int4, unpack_int4
from torch import Tensor
from torch.nn.functional import linear

from lq_kernels import ops as _ops  # noqa: F401  (registers the operators)
from lq_kernels.derivatives import differentiable
from lq_kernels.dynamic_reference import LAYOUTS, Activation
from lq_kernels.invariance import ask
from lq_kernels.preshuffled import start_compiler
from lq_kernels.validation import (
    ACTIVATIONS,
    check_activations,
    check_bias,
    check_dense_dtype,
    check_devices,
    check_group_size,
    check_int4,
    check_sizes,
)


def quantize_tokens(x: Tensor, activation: Activation = "int8") -> tuple[Tensor, Tensor]:
    """Quantize every token by itself, with ``scale = max|x| / 127`` (int8) or ``/ 448`` (fp8).

    Codes are the same on every device. NaN and infinity are not looked for (that would synchronize): a token that holds one
    has the scale NaN and codes 0.

    Args:
        x: ``(..., K)`` fp16, bf16 or fp32.
        activation: ``"int8"`` or ``"fp8"`` (e4m3).

    Returns:
        ``(..., K)`` codes, int8 or float8_e4m3fn, and ``(...) float32`` scales.

    Raises:
        ShapeError, DTypeError: If x is not a floating point tensor of at least one dimension.
        SpecError: If ``activation`` is neither.
    """
    k = check_activations(x)
    _check_activation(activation)
    codes, scale = torch.ops.lq.quantize_tokens(x.reshape(-1, k), activation)
    return codes.view(x.shape), scale.view(x.shape[:-1])


def int8_dynamic_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, kernel: str | None = None
) -> Tensor:
    """Multiply activations, quantized to the weight's kind of codes, with an 8-bit weight (W8A8).

    Args:
        x: ``(..., K)`` fp16, bf16 or fp32.
        weight: ``(N, K)``, int8 or float8_e4m3fn, contiguous.
        scale: ``(N,)`` fp16, bf16 or fp32.
        bias: ``(N,)`` in x's dtype.
        kernel: Force a kernel by name; see :func:`lq_kernels.kernel_names`.

    Returns:
        ``(..., N)`` in x's dtype.

    Raises:
        ShapeError, DTypeError, DeviceError: If the arguments do not fit each other.
        NoKernelError: If the forced kernel cannot run this problem.
    """
    k = check_activations(x)
    check_tensors(weight=weight, scale=scale)
    if weight.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise DTypeError(f"weight has dtype {weight.dtype}: expected int8 or float8_e4m3fn")
    if weight.dim() != 2 or weight.shape[1] != k or not weight.is_contiguous():
        raise ShapeError(f"weight has shape {tuple(weight.shape)}: x with {k} in features needs (N, {k}), contiguous")
    n = weight.shape[0]
    if tuple(scale.shape) != (n,) or not scale.is_contiguous():
        raise ShapeError(f"scale has shape {tuple(scale.shape)}: expected ({n},), one a row, contiguous")
    _check_rest(x, weight, scale, bias, n)
    y = differentiable(
        lambda x, bias: torch.ops.lq.int8_dynamic_linear(x, weight, scale, bias, ask(kernel)),
        lambda x, bias: linear(x, torch.ops.lq.int8_dynamic_dequantize(weight, scale, x.dtype), bias),
        x.reshape(-1, k),
        bias,
    )
    return y.view(*x.shape[:-1], n)


def pack_int4_dynamic(
    qweight: Tensor, scale: Tensor, *, group_size: int, in_features: int, activation: Activation
) -> tuple[Tensor, Tensor, bool]:
    """Bring a canonical symmetric int4 weight into the order of :func:`int4_dynamic_linear`.

    Args:
        qweight: ``(N, ceil(K / 8)) int32``, the packing of :func:`lq_formats.pack_int4`.
        scale: ``(N, K // group_size)`` fp16, bf16 or fp32.
        group_size: In features per scale; K for one scale a row.
        in_features: K.
        activation: What tokens are quantized to: int8 and fp8 need different bits.

    Returns:
        packed (:class:`lq_formats.layouts.Fragment8Layout`), scale arranged alike, and whether the code -8
        occurs, which takes more instructions to unpack to fp8. Symmetric round-to-nearest does not give it.

    Raises:
        ShapeError, GroupSizeError, DTypeError, SpecError: If the arguments do not fit each other.
    """
    _check_activation(activation)
    check_sizes(in_features=in_features)
    check_int4(qweight, scale, None, group_size, in_features)
    start_compiler(qweight.device)
    codes = unpack_int4(qweight, in_features)
    layout = LAYOUTS[activation]
    arranged = layout.arrange_scales(scale, in_features, group_size)
    lowest = activation == "fp8" and bool((codes == 0).any())
    return layout.pack(codes), arranged, lowest


def restore_int4_dynamic(
    packed: Tensor, scale: Tensor, *, group_size: int, out_features: int, in_features: int, activation: Activation
) -> tuple[Tensor, Tensor]:
    """Undo :func:`pack_int4_dynamic`: return the canonical qweight and scale."""
    _check_activation(activation)
    _check_packed(packed, scale, group_size, out_features, in_features, activation)
    layout = LAYOUTS[activation]
    codes = layout.unpack(packed, out_features, in_features)
    return pack_int4(codes), layout.restore_scales(scale, out_features, in_features, group_size)


def int4_dynamic_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int,
    out_features: int,
    activation: Activation,
    lowest: bool = True,
    kernel: str | None = None,
) -> Tensor:
    """Multiply activations, quantized to 8 bits, with a symmetric int4 weight (W4A8).

    Args:
        x: ``(..., K)`` fp16, bf16 or fp32.
        packed: As :func:`pack_int4_dynamic` returns it for this ``activation``.
        scale: Arranged alike (``scale_shape`` of the layout).
        bias: ``(N,)`` in x's dtype.
        group_size: In features per scale; K for one scale a row.
        out_features: N.
        activation: ``"int8"`` or ``"fp8"``.
        lowest: Whether the code -8 may occur; False where it does is wrong.
        kernel: Force a kernel by name; see :func:`lq_kernels.kernel_names`.

    Returns:
        ``(..., N)`` in x's dtype.

    Raises:
        ShapeError, GroupSizeError, DTypeError, DeviceError, SpecError: If the arguments do not fit each other.
        NoKernelError: If the forced kernel cannot run this problem.
    """
    k = check_activations(x)
    _check_activation(activation)
    _check_packed(packed, scale, group_size, out_features, k, activation)
    _check_rest(x, packed, scale, bias, out_features)
    sizes = (group_size, out_features)
    y = differentiable(
        lambda x, bias: torch.ops.lq.int4_dynamic_linear(
            x, packed, scale, bias, *sizes, activation, lowest, ask(kernel)
        ),
        lambda x, bias: linear(
            x, torch.ops.lq.int4_dynamic_dequantize(packed, scale, *sizes, k, activation, x.dtype), bias
        ),
        x.reshape(-1, k),
        bias,
    )
    return y.view(*x.shape[:-1], out_features)


def int4_dynamic_dequantize(
    packed: Tensor,
    scale: Tensor,
    *,
    group_size: int,
    out_features: int,
    in_features: int,
    activation: Activation,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the ``(out_features, in_features)`` weight in ``dtype``, rounded once from fp32.

    Arguments and errors are those of :func:`int4_dynamic_linear`.
    """
    _check_activation(activation)
    _check_packed(packed, scale, group_size, out_features, in_features, activation)
    check_devices(packed, scale=scale)
    check_dense_dtype(dtype)
    w: Tensor = torch.ops.lq.int4_dynamic_dequantize(
        packed, scale, group_size, out_features, in_features, activation, dtype
    )
    return w


def _check_activation(activation: str) -> None:
    if not isinstance(activation, str) or activation not in LAYOUTS:
        raise SpecError(f"activation={activation!r}: expected 'int8' or 'fp8'")


def _check_packed(
    packed: Tensor, scale: Tensor, group_size: int, out_features: int, in_features: int, activation: str
) -> None:
    check_tensors(packed=packed, scale=scale)
    check_sizes(out_features=out_features, in_features=in_features)
    if packed.dtype != torch.int32:
        raise DTypeError(f"packed has dtype {packed.dtype}: expected int32")
    shape = LAYOUTS[activation].packed_shape(out_features, in_features)
    if tuple(packed.shape) != shape or not packed.is_contiguous():
        raise ShapeError(
            f"packed has shape {tuple(packed.shape)}: {out_features} out and {in_features} in features need {shape}, "
            "contiguous"
        )
    check_group_size(group_size, in_features)
    expected = LAYOUTS[activation].scale_shape(out_features, in_features, group_size)
    if tuple(scale.shape) != expected or not scale.is_contiguous():
        raise ShapeError(
            f"scale has shape {tuple(scale.shape)}: expected {expected} for group_size={group_size}, contiguous"
        )


def _check_rest(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_features: int) -> None:
    if scale.dtype not in ACTIVATIONS:
        raise DTypeError(f"scale has dtype {scale.dtype}: expected float16, bfloat16 or float32")
    check_devices(x, weight=weight, scale=scale, bias=bias)
    if bias is not None:
        check_bias(bias, out_features, x.dtype)
