"""Scales and zeros by search, without data: which range of a group to represent, and what to clip.

Round-to-nearest represents the whole range of a group, so one outlier makes all other codes coarse. A search tries
ranges and keeps the one with the least error. What it returns goes where :func:`lq_formats.choose_qparams` puts its
result: the formula, the codes and their bits are the same.

- ``"rtn"``: no search, :func:`lq_formats.choose_qparams`.
- ``"mse"``: the error of a group is the sum of ``|error|**p``, and p grows with the group from 2 (32 in features) to 4
  (512). Symmetric: 42 scales of either sign, because codes reach one further down than up. Asymmetric: both ends of
  the range, coarsely and then twice finer; zeros are floating point, so no range is moved to make its zero an integer.
- ``"hqq"``: half-quadratic splitting (Badri and Shaji, 2023): the error's p-norm with p = 0.7, which forgives outliers;
  the range stays, the zero (symmetric: the scale) is refitted twenty times.

Why p grows: squares clip what is rare, and the larger a group, the rarer is its largest weight, though it may matter
most. On a trained model, by Kullback-Leibler divergence on a text apart from the one that results are reported on, 2 to 2.6
was best for groups of 32 and 64, 2.6 to 3.2 for 128, 3.5 to 4.5 for 256 and rows; documentation page "How good is it".
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lq_formats.affine import _compute, _grouped, choose_qparams, smallest_scale
from lq_formats.errors import NonFiniteError, ShapeError, SpecError
from lq_formats.spec import QuantSpec
from lq_formats.validation import check_device, check_finite, check_float, check_matrix

Algorithm: TypeAlias = Literal["rtn", "mse", "hqq"]
ALGORITHMS: tuple[str, ...] = get_args(Algorithm)

_LEAST = 0.6  # of a range is always represented
_SCALES = 30  # from there to the whole range, and _BEYOND to where the largest weight has the last code on either side
_BEYOND = 12
_COARSE = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6)
_FINER = (0.04, 0.02)
_HQQ_STEPS = 20
_HQQ_NORM = 0.7
_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 23}  # weights at once: what the caches hold, several times over


def search_qparams(
    w: Tensor,
    spec: QuantSpec,
    algorithm: str = "mse",
    column_weight: Tensor | None = None,
    *,
    integer_zero: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Choose scales (and zeros) with little error.

    Args:
        w: ``(N, K)`` floating point weights, on any device.
        spec: What to choose parameters for.
        algorithm: ``"rtn"``, ``"mse"`` or ``"hqq"``; see the module.
        column_weight: ``(K,)``, not negative: how much an error in a column counts (for example the mean square of what
            enters it). Not for ``"rtn"``, which ignores errors.
        integer_zero: Zeros are uint8, for formats that know no other.

    Returns:
        ``scale: (N, K // group_size)`` in ``spec.scale_dtype``, finite and not zero, perhaps negative, and ``zero`` of the
        same shape in the same dtype (uint8 if integer, and with "rtn"), or None if symmetric. Per tensor both are
        ``(1, 1)``.

    Raises:
        SpecError: If the algorithm is none of the three, "rtn" is given a column weight, or that is negative.
        ShapeError, GroupSizeError, DTypeError, DeviceError: If ``w`` or ``column_weight`` do not fit ``spec``.
        NonFiniteError: If they hold NaN or infinity, or a scale is too large for ``spec.scale_dtype``.
    """
    if algorithm not in ALGORITHMS:
        raise SpecError(f"algorithm={algorithm!r}: expected one of {', '.join(ALGORITHMS)}")
    if algorithm == "rtn":
        if column_weight is not None:
            raise SpecError('algorithm="rtn" minimises no error: column_weight goes with "mse" and "hqq"')
        return choose_qparams(w, spec)
    check_float(w)
    check_matrix(w)
    check_finite(w)
    importance = None if column_weight is None else _importance(column_weight, w, spec)
    if w.shape[0] == 0:
        scale, zero = choose_qparams(w, spec)
        return scale, zero if zero is None or integer_zero else zero.to(scale.dtype)
    search: Callable[..., tuple[Tensor, Tensor | None]] = {
        ("mse", True): _clip_symmetric,
        ("mse", False): _clip_asymmetric,
        ("hqq", True): _hqq_symmetric,
        ("hqq", False): _hqq_asymmetric,
    }[algorithm, spec.symmetric]
    rows = max(1, _CHUNK.get(w.device.type, _CHUNK["cpu"]) // w.shape[1])
    chunks: tuple[Tensor, ...] = (w,) if spec.granularity == "tensor" else torch.split(w, rows)
    grouped = (_grouped(_compute(chunk), spec) for chunk in chunks)
    found = [search(_Groups(values, importance, spec, integer_zero, algorithm)) for values in grouped]
    scale = torch.cat([part for part, _ in found])
    zeros = [part for _, part in found if part is not None]
    # Checked here, once: a check of every candidate would make a GPU wait for the CPU each time.
    if not bool(torch.isfinite(scale).all()):
        raise NonFiniteError(
            f"weights up to {float(w.detach().abs().max()):.4g} need a scale beyond {spec.scale_dtype}; use a scale "
            "dtype with a larger range (bfloat16 or float32)"
        )
    return scale, torch.cat(zeros) if zeros else None


class _Groups:
    """Groups of weights ``(rows, groups, group_size)``, what their errors count, and how parameters are stored."""

    def __init__(
        self, values: Tensor, importance: Tensor | None, spec: QuantSpec, integer_zero: bool, algorithm: str
    ) -> None:
        self.values = values
        self.negative = -values
        self.exponent = _clip_exponent(values.shape[-1]) if algorithm == "mse" else _HQQ_NORM
        # What multiplies an error, so that its power is multiplied by the importance.
        self.factor = None if importance is None else importance.pow(1 / self.exponent)
        self.spec = spec
        self.integer_zero = integer_zero
        self.buffer = torch.empty_like(values)

    def store_scale(self, scale: Tensor) -> Tensor:
        """Round scales as they are stored, and keep them away from zero; one too large becomes infinity."""
        stored = scale.to(self.spec.scale_dtype)
        least = smallest_scale(self.spec.scale_dtype)
        tiny = stored.abs() < least
        # A group of zeros needs any scale; one that underflows gets the smallest.
        stored = torch.where(tiny, torch.full_like(stored, least).copysign(stored), stored)
        return torch.where(scale == 0, torch.ones_like(stored), stored)

    def store_zero(self, zero: Tensor) -> Tensor:
        """Round zeros as they are stored; finite, because a range is at most as far from zero as it is wide."""
        if self.integer_zero:
            return zero.round().clamp(0, self.spec.max_code).to(torch.uint8)
        return zero.to(self.spec.scale_dtype)

    def errors(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Return the p-norms of the errors, or powers of them, ``(rows, groups)`` with parameters of that shape."""
        wide = scale.to(self.values.dtype).unsqueeze(-1)
        most = self.spec.max_code
        error = torch.div(self.values, wide, out=self.buffer)
        if zero is None:
            error.round_().clamp_(-self.spec.midpoint, most - self.spec.midpoint)
        else:
            middle = zero.to(self.values.dtype).unsqueeze(-1)
            error.add_(middle).round_().clamp_(0, most).sub_(middle)
        torch.addcmul(self.negative, error, wide, out=error)
        if self.factor is not None:
            error.mul_(self.factor)
        if error.is_cuda:  # one read; on a CPU it is several times slower than the powers
            norms: Tensor = torch.linalg.vector_norm(error, self.exponent, dim=-1)
            return norms
        return error.abs_().pow_(self.exponent).sum(-1)


class _Best:
    """The best parameters so far, group by group."""

    def __init__(self, groups: _Groups) -> None:
        self._groups = groups
        self._error: Tensor | None = None
        self._parameters: tuple[Tensor, ...] = ()

    def offer(self, scale: Tensor, zero: Tensor | None, *labels: Tensor) -> None:
        """Keep the parameters, and the labels with them, where they are better."""
        error = self._groups.errors(scale, zero)
        offered = (scale, *(() if zero is None else (zero,)), *labels)
        if self._error is None:
            self._error, self._parameters = error, offered
            return
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self._parameters = tuple(
            torch.where(better, new, old) for new, old in zip(offered, self._parameters, strict=True)
        )

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._parameters)


def _clip_exponent(group_size: int) -> float:
    return min(max(2 + math.log2(group_size / 32) / 2, 2.0), 4.0)


def _clip_symmetric(groups: _Groups) -> tuple[Tensor, None]:
    spec, most = groups.spec, groups.values.abs().amax(-1)
    best = _Best(groups)
    scale = groups.store_scale(most / max(spec.midpoint - 1, 1))
    best.offer(scale, None)  # round-to-nearest: nothing found is worse
    most_share = spec.midpoint / max(spec.midpoint - 1, 1)
    shares = [
        *torch.linspace(_LEAST, 1.0, _SCALES).tolist(),
        *torch.linspace(1.0, most_share, _BEYOND + 1).tolist()[1:],
    ]
    for share in shares:
        scale = groups.store_scale(most * (share / spec.midpoint))
        best.offer(scale, None)
        best.offer(-scale, None)
    (scale,) = best
    return scale, None


def _clip_asymmetric(groups: _Groups) -> tuple[Tensor, Tensor]:
    low, high = torch.aminmax(groups.values, dim=-1)
    best = _Best(groups)

    def offer(below: Tensor, above: Tensor) -> None:
        scale, zero = _of_range(groups, low * below, high * above)
        best.offer(scale, zero, below, above)

    ones = torch.ones_like(low)
    best.offer(*_nearest(groups, low, high), ones, ones)
    for down in _COARSE:
        for up in _COARSE:
            offer(ones * down, ones * up)
    for step in _FINER:
        _, _, below, above = best
        for down in (-step, 0.0, step):
            for up in (-step, 0.0, step):
                if down or up:
                    offer(below + down, above + up)
    scale, zero, *_ = best
    return scale, zero


def _of_range(groups: _Groups, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and zero that represent ``low`` to ``high`` (for an integer zero: and 0)."""
    if groups.integer_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    # A group of equal values still has a scale: the largest that makes its value a code.
    flat = torch.maximum(low.abs(), high.abs()) / groups.spec.max_code
    half = (high / 2 - low / 2) / groups.spec.max_code  # the span of two huge values overflows
    scale = groups.store_scale(torch.where(half > flat * 1e-6, half * 2, flat))
    return scale, groups.store_zero(-low / scale.to(low.dtype))


def _nearest(groups: _Groups, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return round-to-nearest's parameters, so that nothing found is worse."""
    scale, zero = _of_range(groups, low.clamp(max=0), high.clamp(min=0))
    return scale, groups.store_zero(zero.to(low.dtype).round())


def _hqq_symmetric(groups: _Groups) -> tuple[Tensor, None]:
    spec, values = groups.spec, groups.values
    scale = groups.store_scale(values.abs().amax(-1) / max(spec.midpoint - 1, 1))
    best = _Best(groups)
    best.offer(scale, None)
    for step in range(_HQQ_STEPS):
        wide = scale.to(values.dtype).unsqueeze(-1)
        codes = (values / wide).round_().clamp_(-spec.midpoint, spec.midpoint - 1)
        codes_squared = codes.square().sum(-1).clamp_(min=1.0)
        explained = values - _shrink(values - codes * wide, step)
        scale = groups.store_scale((codes * explained).sum(-1) / codes_squared)
        best.offer(scale, None)
    (scale,) = best
    return scale, None


def _hqq_asymmetric(groups: _Groups) -> tuple[Tensor, Tensor]:
    values = groups.values
    low, high = torch.aminmax(values, dim=-1)
    scale, zero = _of_range(groups, low, high)
    best = _Best(groups)
    best.offer(*_nearest(groups, low, high))
    best.offer(scale, zero)
    wide = scale.to(values.dtype).unsqueeze(-1)
    for step in range(_HQQ_STEPS):
        middle = zero.to(values.dtype).unsqueeze(-1)
        codes = (values / wide + middle).round_().clamp_(0, groups.spec.max_code)
        explained = values - _shrink(values - (codes - middle) * wide, step)
        zero = groups.store_zero((codes - explained / wide).mean(-1))
        best.offer(scale, zero)
    scale, zero = best
    return scale, zero


def _shrink(error: Tensor, step: int) -> Tensor:
    """Return the outliers among the errors: the proximal operator of the p-norm, with a weight that grows by 1.01 a step."""
    beta = 10.0 * 1.01**step
    magnitude = error.abs()
    return error.sign() * (magnitude - magnitude.clamp(min=1e-8).pow(_HQQ_NORM - 1) / beta).clamp_(min=0)


def _importance(column_weight: Tensor, w: Tensor, spec: QuantSpec) -> Tensor:
    """Return column weights as they go with groups."""
    check_float(column_weight, "column_weight")
    check_device(column_weight, "column_weight", w, "weight")
    if tuple(column_weight.shape) != (w.shape[1],):
        raise ShapeError(
            f"column_weight has shape {tuple(column_weight.shape)}: expected ({w.shape[1]},), one a column"
        )
    if not bool(torch.isfinite(column_weight).all()):
        raise NonFiniteError("column_weight holds NaN or infinity")
    if bool((column_weight < 0).any()):
        raise SpecError("column_weight holds negative numbers: it says how much an error counts")
    weights = column_weight.to(_compute(w).dtype)
    rows = weights.expand(w.shape) if spec.granularity == "tensor" else weights.unsqueeze(0)
    return _grouped(rows, spec)
