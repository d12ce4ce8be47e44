"""int8: symmetric signed weights with one scale a row (out feature) or one for the whole tensor.

``w ~= q * scale`` with ``q`` in [-127, 127] and ``scale = max|w| / 127`` in float32. Ties round to even. A row of
zeros gets scale 1 and stays exactly zero.
"""

import torch
from torch import Tensor

from lq_formats.affine import smallest_scale
from lq_formats.division import divide
from lq_formats.errors import DTypeError, NonFiniteError, ShapeError
from lq_formats.validation import check_device, check_finite, check_float, check_matrix

_MAX = 127


def quantize_weight_per_channel(w: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize with one scale per out feature.

    Args:
        w: ``(N, K)`` weights, fp16, bf16, fp32 or fp64.

    Returns:
        ``q: (N, K) int8`` and ``scale: (N,) float32``.

    Raises:
        ShapeError, DTypeError: If ``w`` is not a floating point matrix.
        NonFiniteError: If ``w`` holds NaN or infinity, or (float64 only) a scale is too large for float32.
    """
    values = _checked(w)
    return _quantize(values, values.abs().amax(dim=1))


def quantize_weight_per_tensor(w: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize with one scale for the whole weight.

    Args:
        w: ``(N, K)`` weights, fp16, bf16, fp32 or fp64.

    Returns:
        ``q: (N, K) int8`` and ``scale: () float32``.

    Raises:
        ShapeError, DTypeError: If ``w`` is not a floating point matrix.
        NonFiniteError: If ``w`` holds NaN or infinity, or (float64 only) a scale is too large for float32.
    """
    values = _checked(w)
    return _quantize(values, values.abs().amax() if values.numel() else values.new_zeros(()))


def dequantize_weight_int8(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``q * scale``, computed in float32 (float64 if asked for) and rounded once to ``dtype``.

    Args:
        q: ``(N, K) int8``.
        scale: ``(N,)`` or ``()``.
        dtype: dtype of the result.

    Raises:
        ShapeError, DTypeError, DeviceError: If the tensors do not fit each other.
    """
    rows, _ = check_matrix(q, "q")
    if q.dtype != torch.int8:
        raise DTypeError(f"q has dtype {q.dtype}: expected int8")
    check_float(scale, "scale")
    check_float(torch.empty(0, dtype=dtype), "the result")
    check_device(scale, "scale", q, "q")
    if scale.dim() > 0 and tuple(scale.shape) != (rows,):
        raise ShapeError(f"scale has shape {tuple(scale.shape)}: expected ({rows},) per row or () per tensor")
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return (q.to(compute) * scale.to(compute).reshape(-1, 1)).to(dtype)


def _checked(w: Tensor) -> Tensor:
    check_float(w)
    check_matrix(w)
    check_finite(w)
    return w.detach().to(torch.float64 if w.dtype == torch.float64 else torch.float32)


def _quantize(values: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    scale = divide(amax, _MAX).to(torch.float32)
    if bool(torch.isinf(scale).any()):  # only float64 weights get here
        raise NonFiniteError(f"a scale of {float(amax.max()) / _MAX:.4g} is beyond float32; rescale this weight")
    tiny = smallest_scale(torch.float32)
    scale = torch.where(amax > 0, scale.clamp(min=tiny), torch.ones_like(scale))
    codes = torch.round(values / scale.to(values.dtype).reshape(-1, 1)).clamp_(-_MAX, _MAX)
    return codes.to(torch.int8), scale
