"""Products with weights of any ggml type, kept packed: the planes of :data:`lq_formats.layouts.GGML_PLANES`.

Activations are not quantized (:func:`lq_kernels.q4_0_linear` does that, as llama.cpp), and on a GPU no dense copy of the weight
is made for up to 64 tokens.
"""

import torch
from lq_formats import DTypeError, ShapeError
from lq_formats.layouts import GGMLPlanes, ggml_planes
from torch import Tensor
from torch.nn.functional import linear

from lq_kernels import ops as _ops  # noqa: F401  (registers the operators)
from lq_kernels.derivatives import differentiable
from lq_kernels.invariance import ask
from lq_kernels.validation import ACTIVATIONS, INTEGERS, check_activations, check_bias, check_devices


def ggml_linear(
    x: Tensor, planes: GGMLPlanes, *, ggml_type: str, bias: Tensor | None = None, kernel: str | None = None
) -> Tensor:
    """Multiply activations with a ggml weight: ``y = x @ w.T + bias``.

    Differentiable in ``x`` and ``bias``; runs under ``torch.compile(fullgraph=True)``.

    Args:
        x: ``(..., K)`` fp16, bf16 or fp32.
        planes: The weight ``(N, K)``: ``ggml_planes(ggml_type).pack(blocks)``.
        ggml_type: Its type, for example ``"q4_k"``.
        bias: ``(N,)`` in x's dtype; the Triton kernels add it in fp32 before the result is rounded.
        kernel: Force a kernel by name; see :func:`lq_kernels.kernel_names`.

    Returns:
        ``(..., N)`` in x's dtype. The Triton kernels round no weight and sum in fp32; ``dequant-blas`` rounds weights to x's
        dtype.

    Raises:
        SpecError: If there is no such type.
        ShapeError, DTypeError, DeviceError: If the arguments do not fit each other.
        NoKernelError: If the forced kernel cannot run this problem.
    """
    k = check_activations(x)
    layout = ggml_planes(ggml_type)
    layout.check(planes, k)
    check_devices(x, codes=planes.codes, high=planes.high, scale=planes.scale, bias=bias)
    rows = planes.codes.shape[0]
    if bias is not None:
        check_bias(bias, rows, x.dtype)
    y = differentiable(
        lambda x, bias: torch.ops.lq.ggml_linear(x, *planes, bias, layout.name, ask(kernel)),
        lambda x, bias: linear(x, torch.ops.lq.ggml_dequantize(*planes, layout.name, k, x.dtype), bias),
        x.reshape(-1, k),
        bias,
    )
    return y.view(*x.shape[:-1], rows)


def ggml_dequantize(
    planes: GGMLPlanes, *, ggml_type: str, in_features: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the ``(N, in_features)`` weight: ggml's float32 values, rounded once to ``dtype``, on the planes' device.

    Raises:
        SpecError: If there is no such type.
        ShapeError, DTypeError, DeviceError: If the arguments do not fit each other.
    """
    if not isinstance(in_features, INTEGERS) or in_features < 1:
        raise ShapeError(f"in_features={in_features!r}: expected a positive integer")
    if dtype not in (*ACTIVATIONS, torch.float64):
        raise DTypeError(f"dtype={dtype}: expected float16, bfloat16, float32 or float64")
    layout = ggml_planes(ggml_type)
    layout.check(planes, in_features)
    check_devices(planes.codes, high=planes.high, scale=planes.scale)
    w: Tensor = torch.ops.lq.ggml_dequantize(*planes, layout.name, in_features, dtype)
    return w
