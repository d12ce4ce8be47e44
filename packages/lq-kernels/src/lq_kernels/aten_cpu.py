"""aten-cpu: the packed matrix products that ATen has for CPUs.

They beat a dense product for a few tokens where the machine has bf16 vector instructions (4096x4096 bf16 on two cores:
0.22 ms against 0.8 ms dense for one token, and slower than dense from about 12 tokens on), and are slow in float32,
where the cost model avoids them.

int4 is repacked once a weight (:mod:`lq_kernels.derived`); ATen computes ``(u - 8) * scale + offset``, so an integer zero
becomes ``offset = (8 - zero) * scale``, rounded to x's dtype. That rounding would add an error of up to ``2**-9 * 8``
scales to every weight in bf16: asymmetric weights are left to other kernels unless x is float32.
"""

from collections.abc import Callable

import torch
from lq_formats import unpack_int4
from torch import Tensor

from lq_kernels import cost
from lq_kernels.derived import derived
from lq_kernels.problem import Problem

_GROUPS = (32, 64, 128, 256)
_EXPONENT = 0x7F800000  # of a float32


def why_not_int4(problem: Problem) -> str | None:
    """Return why ATen cannot run this int4 problem, or None."""
    if problem.arch.kind != "cpu":
        return "runs on CPUs only"
    if problem.group_size not in _GROUPS:
        return f"takes groups of {', '.join(map(str, _GROUPS))}, not {problem.group_size}"
    if problem.n % 16:
        return f"needs out features divisible by 16, got {problem.n}"
    if problem.dtype != torch.float32:
        if problem.spec.scale_dtype != problem.dtype:
            return f"scales of {problem.spec.scale_dtype} would be rounded to {problem.dtype}"
        if not problem.spec.symmetric:
            return f"zeros would be rounded to {problem.dtype}"
    return None


def int4_linear(x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    """Return ``x (M, K) @ w.T`` in x's dtype."""
    return int4_product(x.shape[1], x.dtype, qweight, scale, zero, group_size)(x)


def int4_product(
    in_features: int, dtype: torch.dtype, qweight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int
) -> Callable[[Tensor], Tensor]:
    """Return the product of a weight with activations ``(M, in_features)`` of ``dtype``."""
    packed = derived(
        qweight,
        "aten-cpu",
        lambda: torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            unpack_int4(qweight, in_features).to(torch.int32), 1
        ),
    )
    scales = scale.to(dtype)
    offset = torch.zeros_like(scales) if zero is None else (8 - zero.to(torch.float32)).to(dtype) * scales
    scales_and_offsets = torch.stack((scales.t(), offset.t()), dim=-1).contiguous()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return lambda x: multiply(x.contiguous(), packed, group_size, scales_and_offsets)


def why_not_int8(problem: Problem) -> str | None:
    """Return why ATen cannot run this int8 problem, or None."""
    if problem.arch.kind != "cpu":
        return "runs on CPUs only"
    if problem.spec.granularity != "row":
        return f"needs one scale a row, not one a {problem.spec.granularity}"
    if problem.k % 32:
        # bf16, one token, K = 100: ATen (2.11 and 2.15) reads past the row and returns garbage.
        return f"is wrong for in features not divisible by 32, got {problem.k}"
    return None


def int8_linear(x: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
    """Return ``x (M, K) @ (q * scale).T`` in x's dtype."""
    return int8_product(x.dtype, qweight, scale)(x)


def int8_product(dtype: torch.dtype, qweight: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the product of a weight with activations ``(M, K)`` of ``dtype``.

    ATen takes scales in x's dtype. It is given the power of two in each scale, which the dtype holds exactly, and the
    rest (in [1, 2)) multiplies the result in float32: no scale is rounded, and nothing overflows float16 on the way. Of
    scales below ``2**-24`` the rest is less; their sums of fewer than ``2**17`` features do not overflow either.
    """
    wide = scale.to(torch.float32)
    least, most = (2.0**-24, 2.0**15) if dtype == torch.float16 else (2.0**-126, 2.0**127)
    power = (wide.view(torch.int32) & _EXPONENT).view(torch.float32).clamp(least, most)
    codes, powers, rest = qweight.contiguous(), power.to(dtype), wide / power

    def multiply(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int8pack_mm(x.contiguous(), codes, powers)
        return (y.to(torch.float32) * rest).to(dtype)

    return multiply


def predict_us(problem: Problem) -> float:
    """Predict microseconds; linear in the number of tokens (ATen unpacks again for each few of them)."""
    return cost.aten_cpu_us(problem)
