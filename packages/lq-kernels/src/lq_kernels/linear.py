"""The public matrix products: each validates its arguments, then calls one operator of :mod:`lq_kernels.ops`.

Validation costs a few comparisons; messages are built only on failure. Every function takes activations with any
leading dimensions, returns an empty result for no tokens, is differentiable in the activations and can be compiled.
"""

import torch
from lq_formats import DTypeError, ShapeError, check_tensors, dequantize_q4_0
from torch import Tensor

from lq_kernels import ops as _ops  # noqa: F401  (registers the operators)
from lq_kernels.derivatives import differentiable
from lq_kernels.eager import invisible, recall, remember
from lq_kernels.invariance import ask
from lq_kernels.problem import Q4_0_SPEC
from lq_kernels.reference import int4_spec, int8_spec
from lq_kernels.validation import (
    ACTIVATIONS,
    INTEGERS,
    check_activations,
    check_bias,
    check_dense_dtype,
    check_devices,
    check_int4,
)


def int4_linear(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    group_size: int,
    bias: Tensor | None = None,
    kernel: str | None = None,
) -> Tensor:
    """Multiply activations with a canonical int4 weight: ``y = x @ ((u - zero) * scale).T + bias``.

    Args:
        x: ``(..., K)`` fp16, bf16 or fp32.
        qweight: ``(N, ceil(K / 8)) int32``, the packing of :func:`lq_formats.pack_int4`.
        scale: ``(N, K // group_size)`` fp16, bf16 or fp32.
        zero: ``(N, K // group_size)``, uint8 or of scale's dtype; None for symmetric weights (zero 8).
        group_size: In features per scale, at least 8; K for one scale a row.
        bias: ``(N,)`` in x's dtype.
        kernel: Force a kernel by name; see :func:`lq_kernels.kernel_names`.

    Returns:
        ``(..., N)`` in x's dtype.

    Raises:
        ShapeError, GroupSizeError, DTypeError, DeviceError: If the arguments do not fit each other.
        NoKernelError: If the forced kernel cannot run this problem.
    """
    direct = kernel is None and invisible(x)
    if direct and (y := recall(x, qweight, (scale, zero), (group_size,))) is not None:
        return y if bias is None else _add_bias(y, x, bias)
    k = check_activations(x)
    check_int4(qweight, scale, zero, group_size, k)
    check_devices(x, qweight=qweight, scale=scale, zero=zero, bias=bias)
    y = differentiable(
        lambda x: torch.ops.lq.int4_linear(x, qweight, scale, zero, group_size, ask(kernel)),
        lambda x: x @ torch.ops.lq.int4_dequantize(qweight, scale, zero, group_size, k, x.dtype).t(),
        x.reshape(-1, k),
    )
    if direct:
        spec = int4_spec(group_size, k, zero is None, scale.dtype)
        remember("int4", (qweight, scale, zero), (group_size,), qweight.shape[0], k, spec, x.dtype)
    return _finish(y, x, bias)


def matmul_bf16_i4(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    group_size: int = 256,
    *,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    kernel: str | None = None,
) -> Tensor:
    """Multiply activations with a weight of :func:`lq_formats.quantize_i4_pack8`.

    Args:
        x: ``(..., K)`` bf16 (fp16 and fp32 work as well).
        packed: ``(N, K // 8) int32`` or ``(N, K // 2) int8``.
        scales: ``(N, K // group_size)`` fp16, bf16 or fp32.
        group_size: In features per scale; -1 for one scale a row.
        zeros: As ``zero`` of :func:`int4_linear`.
        bias: ``(N,)`` in x's dtype.
        kernel: Force a kernel by name.

    Returns:
        ``(..., N)`` in x's dtype.

    Raises:
        ShapeError, GroupSizeError, DTypeError, DeviceError: If the arguments do not fit each other.
        NoKernelError: If the forced kernel cannot run this problem.
    """
    check_tensors(x=x, packed=packed)
    if packed.dtype == torch.int8:
        if packed.dim() != 2 or packed.shape[1] % 4:
            raise ShapeError(
                f"packed has shape {tuple(packed.shape)} int8: expected (N, K // 2) with K divisible by 8; pack with "
                "pack_dtype=torch.int32 otherwise"
            )
        packed = packed.contiguous()
        # No words begin where a slice of a larger buffer may. Compilers ask for neither, and refuse the view.
        if not torch.compiler.is_compiling() and (
            packed.storage_offset() % 4 or (invisible(x) and packed.data_ptr() % 4)
        ):
            packed = packed.clone()
        # In a row first: of one row contiguous() leaves any stride.
        packed = packed.view(-1).view(torch.int32).view(packed.shape[0], packed.shape[1] // 4)
    group_size = x.shape[-1] if group_size == -1 and x.dim() else group_size
    return int4_linear(x, packed, scales, zeros, group_size=group_size, bias=bias, kernel=kernel)


def int8_gemm(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, kernel: str | None = None
) -> Tensor:
    """Multiply activations with an int8 weight (W8A16): ``y = x @ (weight * scale).T + bias``.

    Args:
        x: ``(..., K)`` fp16, bf16 or fp32.
        weight: ``(N, K) int8``.
        scale: ``(N,)`` per row or ``()`` per tensor; fp16, bf16 or fp32.
        bias: ``(N,)`` in x's dtype.
        kernel: Force a kernel by name; see :func:`lq_kernels.kernel_names`.

    Returns:
        ``(..., N)`` in x's dtype.

    Raises:
        ShapeError, DTypeError, DeviceError: If the arguments do not fit each other.
        NoKernelError: If the forced kernel cannot run this problem.
    """
    direct = kernel is None and invisible(x)
    if direct and (y := recall(x, weight, (scale,), ())) is not None:
        return y if bias is None else _add_bias(y, x, bias)
    k = check_activations(x)
    check_tensors(weight=weight, scale=scale)
    if weight.dtype != torch.int8:
        raise DTypeError(f"weight has dtype {weight.dtype}: expected int8")
    if weight.dim() != 2 or weight.shape[1] != k:
        raise ShapeError(f"weight has shape {tuple(weight.shape)}: x with {k} in features needs (N, {k})")
    if scale.dtype not in ACTIVATIONS:
        raise DTypeError(f"scale has dtype {scale.dtype}: expected float16, bfloat16 or float32")
    if scale.dim() > 1 or (scale.dim() == 1 and scale.shape[0] != weight.shape[0]):
        raise ShapeError(
            f"scale has shape {tuple(scale.shape)}: expected ({weight.shape[0]},) per row or () per tensor"
        )
    check_devices(x, weight=weight, scale=scale, bias=bias)
    y = differentiable(
        lambda x: torch.ops.lq.int8_linear(x, weight, scale, ask(kernel)),
        lambda x: x @ torch.ops.lq.int8_dequantize(weight, scale, x.dtype).t(),
        x.reshape(-1, k),
    )
    if direct:
        spec = int8_spec(scale)
        remember("int8", (weight, scale), (), weight.shape[0], k, spec, x.dtype)
    return _finish(y, x, bias)


def int4_dequantize(
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    group_size: int,
    in_features: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the ``(N, in_features)`` weight of canonical int4 bits in ``dtype``, on its device.

    Arguments and errors are those of :func:`int4_linear`.
    """
    if not isinstance(in_features, INTEGERS) or in_features < 1:
        raise ShapeError(f"in_features={in_features!r}: expected a positive integer")
    check_int4(qweight, scale, zero, group_size, in_features)
    check_devices(qweight, scale=scale, zero=zero)
    check_dense_dtype(dtype)
    w: Tensor = torch.ops.lq.int4_dequantize(qweight, scale, zero, group_size, in_features, dtype)
    return w


def gemm_q4_0_q8_1(
    weight_q: Tensor, activation_q: Tensor, M: int, N: int, K: int, *, kernel: str | None = None
) -> Tensor:
    """Multiply Q4_0 weights with Q8_1 activations, as llama.cpp does, from raw blocks.

    Args:
        weight_q: ``(M, K // 32, 18) uint8`` Q4_0 blocks, or the same bytes in any shape.
        activation_q: ``(N, K // 32, 36) uint8`` Q8_1 blocks, or the same bytes in any shape.
        M: Weight rows (out features).
        N: Tokens.
        K: In features, a multiple of 32.
        kernel: Force a kernel by name; see :func:`lq_kernels.kernel_names`.

    Returns:
        ``(M, N) float32``: ``sum over blocks of d4 * (d8 * sum(q4 * q8) - 8 * s8)``.

    Raises:
        ShapeError, DTypeError, DeviceError: If bytes and sizes do not agree.
        NoKernelError: If the forced kernel cannot run this problem.
    """
    # A bool is an int to Python; here it is a mistake.
    if not all(isinstance(size, INTEGERS) and not isinstance(size, bool) for size in (M, N, K)):
        raise ShapeError(f"M={M!r}, N={N!r}, K={K!r}: expected integers")
    if M < 0 or N < 0 or K <= 0 or K % 32:
        raise ShapeError(f"M={M}, N={N}, K={K}: expected M, N >= 0 and K a positive multiple of 32")
    for name, tensor, rows, size in (("weight_q", weight_q, M, 18), ("activation_q", activation_q, N, 36)):
        check_tensors(**{name: tensor})
        if tensor.dtype != torch.uint8:
            raise DTypeError(f"{name} has dtype {tensor.dtype}: expected uint8 blocks")
        if tensor.numel() != rows * (K // 32) * size:
            raise ShapeError(
                f"{name} has {tensor.numel()} bytes: {rows} rows of K={K} need {rows * (K // 32) * size} "
                f"({size} bytes for 32 elements)"
            )
    check_devices(weight_q, activation_q=activation_q)
    y: Tensor = torch.ops.lq.gemm_q4_0_q8_1(
        weight_q.reshape(M, K // 32, 18).contiguous(), activation_q.reshape(N, K // 32, 36).contiguous(), ask(kernel)
    )
    return y


def quantize_gemm_q4_0_q8_1(weight_q: Tensor, x: Tensor, *, kernel: str | None = None) -> Tensor:
    """Quantize activations to Q8_1 and multiply, without the blocks between the two steps.

    The two steps are ``gemm_q4_0_q8_1(weight_q, quantize_activation_q8_1(x), M, N, K)``. On Hopper a kernel makes of x what the
    product's reads, which is a launch less, or with few tokens the product's does so itself. The same numbers are multiplied;
    then they may be added up in another order. Elsewhere the result is that of the steps to the bit.
    Differentiable in ``x``, as :func:`q4_0_linear` is.

    Args:
        weight_q: ``(M, K // 32, 18) uint8`` Q4_0 blocks.
        x: ``(..., K)`` fp16, bf16 or fp32: N tokens.
        kernel: Force a kernel of :func:`gemm_q4_0_q8_1` by name.

    Returns:
        ``(M, N) float32``.

    Raises:
        ShapeError, DTypeError, DeviceError: If the arguments do not fit each other.
        NoKernelError: If the forced kernel cannot run this problem.
    """
    k = _check_q4_0(x, weight_q)
    check_devices(x, weight_q=weight_q)
    blocks = weight_q.contiguous()
    return differentiable(
        lambda x: torch.ops.lq.quantize_gemm_q4_0_q8_1(blocks, x, ask(kernel)),
        lambda x: (dequantize_q4_0(blocks, x.dtype) @ x.t()).to(torch.float32),
        x.reshape(-1, k),
    )


def quantize_activation_q8_1(x: Tensor) -> Tensor:
    """Quantize activations to Q8_1 blocks, in one fused kernel on an NVIDIA GPU.

    NaN and infinity are not looked for (that would synchronize): a block that holds one gives a product that is not
    finite.

    Args:
        x: ``(..., K)`` fp16, bf16 or fp32, K a multiple of 32.

    Returns:
        ``(..., K // 32, 36) uint8``, the bytes of :func:`lq_formats.quantize_q8_1`.

    Raises:
        ShapeError, DTypeError: If ``x`` is not floats with K a multiple of 32.
    """
    k = check_activations(x)
    if k % 32:
        raise ShapeError(f"x has {k} in features: Q8_1 needs a multiple of 32")
    blocks: Tensor = torch.ops.lq.quantize_q8_1(x)
    return blocks


def q4_0_linear(x: Tensor, weight_q: Tensor, *, bias: Tensor | None = None, kernel: str | None = None) -> Tensor:
    """Multiply activations with Q4_0 weights: ``y = x @ w.T + bias``.

    On Hopper x of 16 bits is multiplied as it is. Elsewhere it is quantized to Q8_1 and blocks are multiplied, as
    llama.cpp does. Differentiable in ``x`` with the gradient of the dequantized weight (the rounding of x to 8 bits is passed
    through).

    Args:
        x: ``(..., K)`` fp16, bf16 or fp32.
        weight_q: ``(M, K // 32, 18) uint8`` Q4_0 blocks.
        bias: ``(M,)`` in x's dtype.
        kernel: Force a kernel by name.

    Returns:
        ``(..., M)`` in x's dtype.

    Raises:
        ShapeError, DTypeError, DeviceError: If the arguments do not fit each other.
    """
    direct = kernel is None and invisible(x)
    if direct and (y := recall(x, weight_q, (), ())) is not None:
        return y if bias is None else _add_bias(y, x, bias)
    k = _check_q4_0(x, weight_q)
    check_devices(x, weight_q=weight_q, bias=bias)
    y = differentiable(
        lambda x: torch.ops.lq.q4_0_linear(x, weight_q, ask(kernel)),
        lambda x: x @ dequantize_q4_0(weight_q, x.dtype).t(),
        x.reshape(-1, k),
    )
    if direct:
        remember("q4_0", (weight_q,), (), weight_q.shape[0], k, Q4_0_SPEC, x.dtype)
    return _finish(y, x, bias)


def _check_q4_0(x: Tensor, weight_q: Tensor) -> int:
    """Return x's in features; raise unless ``weight_q`` holds Q4_0 blocks of as many."""
    k = check_activations(x)
    check_tensors(weight_q=weight_q)
    if weight_q.dtype != torch.uint8:
        raise DTypeError(f"weight_q has dtype {weight_q.dtype}: expected uint8 Q4_0 blocks")
    if weight_q.dim() != 3 or weight_q.shape[2] != 18 or weight_q.shape[1] * 32 != k:
        raise ShapeError(f"weight_q has shape {tuple(weight_q.shape)}: x with {k} in features needs (M, {k} / 32, 18)")
    return k


def _finish(y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if bias is None else _add_bias(y, x, bias)


def _add_bias(y: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    check_devices(x, bias=bias)
    check_bias(bias, y.shape[-1], x.dtype)
    return y + bias
