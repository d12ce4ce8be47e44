"""Affine integer quantization: choose scales and zeros, turn floats into codes, and codes into floats.

The one formula of this module is ``w ~= (u - zero) * scale`` with unsigned codes ``u`` (see
:class:`lq_formats.QuantSpec`). Round-to-nearest is done in float32 (float64 for float64 weights) with ties to even.

Scales are rounded to ``spec.scale_dtype`` *before* codes are computed, so codes are the nearest ones for the scale that
is stored. Error bound: for every weight inside the representable range, ``|w - dequantized| <= scale / 2``.
"""

import torch
from torch import Tensor

from lq_formats.division import divide
from lq_formats.errors import DTypeError, NonFiniteError, ShapeError
from lq_formats.spec import QuantSpec
from lq_formats.validation import check_device, check_finite, check_float, check_matrix, check_scale, check_tensor


def choose_qparams(w: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Choose scales (and zeros) from the range of the weights: round-to-nearest, no search.

    Symmetric: ``scale = max|w| / (2**(bits - 1) - 1)``. Asymmetric: the range is widened to include 0, then
    ``scale = (max - min) / (2**bits - 1)`` and ``zero = round(-min / scale)``, so that 0 is exact.

    Args:
        w: ``(N, K)`` floating point weights.
        spec: What to choose parameters for.

    Returns:
        ``scale: (N, K // group_size)`` in ``spec.scale_dtype``, positive and finite, and
        ``zero: (N, K // group_size) uint8``, or None if symmetric. Per tensor both are ``(1, 1)``.

    Raises:
        ShapeError, GroupSizeError, DTypeError: If ``w`` does not fit ``spec``.
        NonFiniteError: If ``w`` holds NaN or infinity, or a scale is too large for ``spec.scale_dtype``.
    """
    check_float(w)
    check_matrix(w)
    check_finite(w)
    groups = _grouped(_compute(w), spec)
    if groups.shape[0] == 0:
        empty = spec.scale_shape(*w.shape)
        scale = torch.ones(empty, dtype=spec.scale_dtype, device=w.device)
        return scale, None if spec.symmetric else torch.zeros(empty, dtype=torch.uint8, device=w.device)
    low, high = torch.aminmax(groups, dim=-1)
    if spec.symmetric:
        scale = _store_scale(divide(torch.maximum(-low, high), spec.midpoint - 1), spec)
        return scale, None
    low, high = low.clamp(max=0), high.clamp(min=0)
    span = high - low
    # The span of two huge values of opposite sign overflows although the scale does not; its half does not either.
    half = divide(high / 2 - low / 2, spec.max_code)
    scale = torch.where(torch.isinf(span), half * 2, divide(span, spec.max_code))
    scale = _store_scale(scale, spec)
    zero = torch.round(-low / scale.to(low.dtype)).clamp_(0, spec.max_code).to(torch.uint8)
    return scale, zero


def quantize_affine(w: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    """Quantize weights with given parameters.

    Args:
        w: ``(N, K)`` floating point weights.
        scale: ``(N, K // group_size)`` (``(1, 1)`` per tensor).
        zero: Same shape as ``scale``; None if and only if ``spec.symmetric``.
        spec: How ``w`` is quantized.

    Returns:
        ``(N, K) uint8`` codes in ``[0, 2**bits - 1]``.

    Raises:
        ShapeError, GroupSizeError, DTypeError, DeviceError: If the tensors do not fit each other or ``spec``.
        NonFiniteError: If ``w`` holds NaN or infinity, or ``scale`` holds those or zero.
    """
    check_float(w)
    check_matrix(w)
    check_finite(w)
    _check_params(w, "weight", scale, zero, spec)
    check_scale(scale)
    groups = _grouped(_compute(w), spec)
    codes = groups / scale.to(groups.dtype).unsqueeze(-1)
    if zero is None:
        codes = codes.round_() + spec.midpoint
    elif zero.dtype == torch.uint8:
        codes = codes.round_() + zero.to(groups.dtype).unsqueeze(-1)
    else:
        codes = (codes + zero.to(groups.dtype).unsqueeze(-1)).round_()
    return codes.clamp_(0, spec.max_code).to(torch.uint8).reshape(w.shape).contiguous()


def dequantize_affine(
    codes: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return ``(codes - zero) * scale``, computed in float32 (float64 if asked for) and rounded once to ``dtype``.

    Args:
        codes: ``(N, K) uint8``.
        scale: ``(N, K // group_size)`` (``(1, 1)`` per tensor).
        zero: Same shape as ``scale``, uint8 or floating; None if and only if ``spec.symmetric``.
        spec: How the codes were made.
        dtype: dtype of the result.

    Returns:
        ``(N, K)`` weights.

    Raises:
        ShapeError, GroupSizeError, DTypeError, DeviceError: If the tensors do not fit each other or ``spec``.
    """
    check_matrix(codes, "codes")
    if codes.dtype != torch.uint8:
        raise DTypeError(f"codes have dtype {codes.dtype}: expected uint8 codes in [0, {spec.max_code}]")
    check_float(torch.empty(0, dtype=dtype), "the result")
    _check_params(codes, "codes", scale, zero, spec)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    groups = _grouped(codes, spec).to(compute)
    groups -= spec.midpoint if zero is None else zero.to(compute).unsqueeze(-1)
    groups *= scale.to(compute).unsqueeze(-1)
    return groups.reshape(codes.shape).to(dtype).contiguous()


def smallest_scale(scale_dtype: torch.dtype) -> float:
    """Return the smallest positive scale that is stored in ``scale_dtype``.

    fp16 goes down to its subnormals (2**-24), which every GPU converts exactly; its normals end at 6.1e-5, in the middle
    of the scales of real layers. fp32 and bf16 stop at 2**-126, because GPUs flush their subnormals to zero.
    """
    info = torch.finfo(scale_dtype)
    return float(info.smallest_normal * info.eps if scale_dtype == torch.float16 else info.smallest_normal)


def _compute(w: Tensor) -> Tensor:
    return w.detach().to(torch.float64 if w.dtype == torch.float64 else torch.float32)


def _grouped(matrix: Tensor, spec: QuantSpec) -> Tensor:
    """View ``(N, K)`` as ``(N, groups, group_size)``; per tensor as ``(1, 1, N * K)``."""
    rows, columns = matrix.shape
    if spec.granularity == "tensor":
        return matrix.reshape(1, 1, rows * columns) if rows else matrix.reshape(0, 1, columns)
    group_size = spec.resolve_group_size(columns)
    return matrix.reshape(rows, columns // group_size, group_size)


def _store_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Round scales to the dtype they are stored in; keep them positive, refuse to lose them to infinity."""
    stored = scale.to(spec.scale_dtype)
    if bool(torch.isinf(stored).any()):
        raise NonFiniteError(
            f"a scale of {float(scale.max()):.4g} is beyond {spec.scale_dtype}; use a scale dtype with a larger range "
            "(bfloat16 or float32)"
        )
    # A group of zeros needs any positive scale: its codes are exactly the zero point. A scale that underflows becomes
    # the smallest usable number of its dtype: the codes stay finite, the error stays below that number.
    return torch.where(scale > 0, stored.clamp(min=smallest_scale(spec.scale_dtype)), torch.ones_like(stored))


def _check_params(matrix: Tensor, name: str, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> None:
    shape = tuple(matrix.shape)
    expected = spec.scale_shape(shape[0], shape[1])
    check_device(scale, "scale", matrix, name)
    if tuple(scale.shape) != expected:
        raise ShapeError(f"scale has shape {tuple(scale.shape)}: a weight of shape {shape} needs {expected}")
    check_float(scale, "scale")
    if (zero is None) != spec.symmetric:
        came = "no zero" if zero is None else "a zero"
        raise ShapeError(f"got {came} with symmetric={spec.symmetric}: zeros go with asymmetric quantization only")
    if zero is not None:
        check_tensor(zero, "zero")
        if tuple(zero.shape) != expected:
            raise ShapeError(f"zero has shape {tuple(zero.shape)}: a weight of shape {shape} needs {expected}")
        if zero.dtype != torch.uint8:
            check_float(zero, "zero")
        check_device(zero, "zero", matrix, name)
