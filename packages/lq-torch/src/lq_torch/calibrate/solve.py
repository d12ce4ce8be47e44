"""Choosing codes so that a layer's *outputs* change least: GPTQ, then descent on codes, scales and zeros.

The error of a quantized weight D for w is ``tr((D - w) H (D - w)^T)``: the squared change of the outputs over the
calibration tokens, row by row independent of each other. All functions work on ``(K, N)``, columns of the weight as
contiguous rows.
"""

from dataclasses import dataclass

import torch
from lq_formats import QuantSpec
from lq_kernels.triton.constraints import COLUMNS
from torch import Tensor

from lq_torch.calibrate.columns import fix_columns, improve_columns


@dataclass
class Quantized:
    """A weight ``(N, K)`` as codes and parameters.

    Attributes:
        codes: ``(N, K)`` float32, whole numbers in ``[0, max_code]``.
        scale: ``(N, G)`` float32, values that the stored dtype holds.
        zero: ``(N, G)`` float32; the midpoint throughout for symmetric weights.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def stored(self, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return codes as uint8, scale and zero (None if symmetric) in the dtype in which they are stored."""
        zero = None if spec.symmetric else self.zero.to(spec.scale_dtype)
        return self.codes.to(torch.uint8), self.scale.to(spec.scale_dtype), zero

    def values(self) -> Tensor:
        """Return the dequantized weight ``(N, K)`` in float32."""
        rows, groups = self.scale.shape
        codes = self.codes.view(rows, groups, -1)
        return ((codes - self.zero.unsqueeze(-1)) * self.scale.unsqueeze(-1)).view(rows, -1)


def output_error(values: Tensor, w: Tensor, hessian: Tensor) -> Tensor:
    """Return ``(N,)``: the squared output error of every row of ``values: (N, K)`` against ``w``."""
    error = values - w
    return ((error @ hessian) * error).sum(-1)


def nearest_codes(w: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Quantized:
    """Round ``w: (N, K)`` to the nearest codes for ``scale`` and ``zero`` ``(N, G)``, all float32."""
    groups = w.view(*scale.shape, -1)
    codes = groups.div(scale.unsqueeze(-1)).add_(zero.unsqueeze(-1)).round_().clamp_(0, spec.max_code)
    return Quantized(codes.view(w.shape), scale, zero)


def gptq_codes(w: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec, factor: Tensor, order: Tensor) -> Quantized:
    """Quantize column by column, each time moving the rounding error to the columns that are still free.

    Args:
        w: ``(N, K)`` float32.
        scale: ``(N, G)`` float32; group g holds columns ``g K / G`` to ``(g + 1) K / G``.
        zero: ``(N, G)`` float32.
        spec: Bits.
        factor: ``(K, K)`` float32, U of :func:`factor_inverse` for the Hessian in this order.
        order: ``(K,) int64``, the columns in the order in which they are fixed. The stored layout does not depend on it.
    """
    size = w.shape[1] // scale.shape[1]
    free = w.t()[order].contiguous()
    scales = scale.t().contiguous()
    zeros = zero.t().contiguous()
    groups = order // size
    codes = torch.empty_like(free)
    for start in range(0, len(free), COLUMNS):
        here, behind = slice(start, start + COLUMNS), slice(start + COLUMNS, None)
        fix_columns(free[here], codes[here], scales, zeros, groups[here], factor[here, here], spec.max_code)
        free[behind].addmm_(factor[here, behind].t(), free[here], alpha=-1)
    back = torch.empty_like(codes)
    back[order] = codes
    return Quantized(back.t().contiguous(), scale, zero)


def descend(found: Quantized, w: Tensor, hessian: Tensor, spec: QuantSpec, *, sweeps: int) -> Quantized:
    """Lower the output error group by group; it never rises.

    A sweep visits every group: its scale (and zero) are refitted by least squares for the codes it has, then its codes,
    one column after another, become the best ones given all other columns. What is stored rounded is rounded here, and
    a refit that does not survive the rounding is dropped.

    Args:
        found: Where to start.
        w: ``(N, K)`` float32.
        hessian: ``(K, K)`` float32, damped.
        spec: Bits, symmetry and the dtype of scales.
        sweeps: Times through the weight.
    """
    groups = found.scale.shape[1]
    size = w.shape[1] // groups
    codes, scales, zeros = (
        each.t().clone(memory_format=torch.contiguous_format) for each in (found.codes, found.scale, found.zero)
    )
    gradient = hessian @ (found.values() - w).t()
    for _ in range(sweeps):
        for g in range(groups):
            part = slice(g * size, (g + 1) * size)
            corner = hessian[part, part]
            code, local = codes[part], gradient[part].clone()
            old = (code - zeros[g]) * scales[g]
            scales[g], zeros[g] = _refitted(code, scales[g], zeros[g], local, corner, spec)
            s = scales[g]
            local.addmm_(corner, (code - zeros[g]) * s - old)
            for start in range(0, size, COLUMNS):
                here, behind = slice(start, start + COLUMNS), slice(start + COLUMNS, None)
                improve_columns(local[here], code[here], s, corner[here, here], spec.max_code)
                local[behind].addmm_(corner[here, behind].t(), local[here])
            gradient.addmm_(hessian[:, part], (code - zeros[g]) * s - old)
    return Quantized(codes.t().contiguous(), scales.t().contiguous(), zeros.t().contiguous())


def _refitted(
    code: Tensor, scale: Tensor, zero: Tensor, gradient: Tensor, corner: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Return the scale and zero ``(N,)`` of a group that lower the output error most for its codes.

    With u = code - zero, values move by ``a u + b`` for a change a of the scale and an offset b; the error changes by the
    quadratic form below. Both are solved for together, rounded as they are stored, and kept where the error falls.
    """
    u = code - zero
    hu = corner @ u
    linear_a, aa = (u * gradient).sum(0), (u * hu).sum(0)
    if spec.symmetric:
        new = (scale - linear_a / aa).to(spec.scale_dtype).float()
        a = new - scale
        change = a * (2 * linear_a + a * aa)
        better = (change < 0) & (new != 0) & new.isfinite()
        return torch.where(better, new, scale), zero
    linear_b, ab, bb = gradient.sum(0), hu.sum(0), corner.sum()
    determinant = aa * bb - ab * ab
    a = (ab * linear_b - bb * linear_a) / determinant
    b = (ab * linear_a - aa * linear_b) / determinant
    new = (scale + a).to(spec.scale_dtype).float()
    moved = (zero - b / new).to(spec.scale_dtype).float()
    a, b = new - scale, new * (zero - moved)
    change = a * (2 * linear_a + a * aa + 2 * b * ab) + b * (2 * linear_b + b * bb)
    better = (change < 0) & (new != 0) & new.isfinite() & moved.isfinite()
    return torch.where(better, new, scale), torch.where(better, moved, zero)
