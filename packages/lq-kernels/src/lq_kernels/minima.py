"""Int4 weights in fragment order with a minimum a group, ``u * scale + minimum``: Q4_1 and Q4_K as Hopper runs them.

A zero point says the same while the scale is not 0; a minimum does not need one. The Hopper kernels multiply codes about their
middle, and add (minimum + 8 scale) times the sum of x, so that a group costs what one with a zero point does.
"""

import torch
from lq_formats import ShapeError, check_tensors
from torch import Tensor
from torch.nn.functional import linear

from lq_kernels import ops as _ops  # noqa: F401  (registers the operators)
from lq_kernels.derivatives import differentiable
from lq_kernels.eager import invisible, recall, remember
from lq_kernels.invariance import ask
from lq_kernels.ops import preshuffled_spec
from lq_kernels.preshuffled import check_fragments
from lq_kernels.validation import (
    check_activations,
    check_bias,
    check_dense_dtype,
    check_devices,
    check_group_size,
    check_sizes,
)


def minima_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    minimum: Tensor,
    *,
    group_size: int,
    out_features: int,
    bias: Tensor | None = None,
    kernel: str | None = None,
) -> Tensor:
    """Multiply activations with such a weight: ``y = x @ (u * scale + minimum).T + bias``.

    Args:
        x: ``(..., K)`` fp16, bf16 or fp32.
        packed: Codes, :class:`lq_formats.layouts.FragmentLayout` of 4 bits.
        scale: Arranged alike (``scale_shape`` of the layout); see :data:`lq_formats.layouts.GGML_FRAGMENTS`.
        minimum: As ``scale``, in its dtype.
        group_size: In features per scale, less than K.
        out_features: N.
        bias: ``(N,)`` in x's dtype; added in fp32 before the result is rounded, by the Hopper kernels.
        kernel: Force a kernel by name; see :func:`lq_kernels.kernel_names` of ``"preshuffled_minima"``.

    Returns:
        ``(..., N)`` in x's dtype.

    Raises:
        ShapeError, DTypeError, DeviceError: If the arguments do not fit each other.
        NoKernelError: If the forced kernel cannot run this problem.
    """
    direct = kernel is None and invisible(x, bias)
    values = (out_features, group_size)
    if direct and (known := recall(x, packed, (scale, minimum, bias), values)) is not None:
        return known
    k = check_activations(x)
    _check(packed, scale, minimum, group_size, out_features, k)
    check_devices(x, packed=packed, scale=scale, minimum=minimum, bias=bias)
    if bias is not None:
        check_bias(bias, out_features, x.dtype)
    weight = (packed, scale, minimum, bias)
    sizes = (group_size, out_features)
    y = differentiable(
        lambda x, bias: torch.ops.lq.minima_linear(x, packed, scale, minimum, bias, *sizes, ask(kernel)),
        lambda x, bias: linear(x, torch.ops.lq.minima_dequantize(packed, scale, minimum, *sizes, k, x.dtype), bias),
        x.reshape(-1, k),
        bias,
    )
    if direct:
        spec = preshuffled_spec(4, group_size, k, False, scale.dtype)
        remember("preshuffled_minima", weight, values, out_features, k, spec, x.dtype)
    return y.view(*x.shape[:-1], out_features)


def minima_dequantize(
    packed: Tensor,
    scale: Tensor,
    minimum: Tensor,
    *,
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the ``(out_features, in_features)`` weight in ``dtype``, rounded once from fp32.

    Arguments and errors are those of :func:`minima_linear`.
    """
    _check(packed, scale, minimum, group_size, out_features, in_features)
    check_devices(packed, scale=scale, minimum=minimum)
    check_dense_dtype(dtype)
    sizes = (group_size, out_features, in_features)
    w: Tensor = torch.ops.lq.minima_dequantize(packed, scale, minimum, *sizes, dtype)
    return w


def _check(packed: Tensor, scale: Tensor, minimum: Tensor, group_size: int, out_features: int, k: int) -> None:
    check_sizes(out_features=out_features, in_features=k)
    check_group_size(group_size, k)
    if group_size >= k:
        raise ShapeError(f"group_size={group_size} with {k} in features: minima are of groups, not of whole rows")
    check_tensors(minimum=minimum)
    check_fragments(packed, scale, minimum, 4, group_size, out_features, k, "minimum")
