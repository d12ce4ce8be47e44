"""The kernels for ggml weights in planes as the registry runs them, and their cost.

Launchers take ``(x, codes, high, scale, bias, ggml_type)``: the planes of :data:`lq_formats.layouts.GGML_PLANES`, all tensors
valid and not empty, x ``(M, K)``; they return ``(M, N)`` in x's dtype.

The constants below come from counts of instructions in compiled kernels, not from measurements.
"""

import functools
from collections.abc import Callable

import torch
from lq_formats import QuantSpec
from lq_formats.layouts import GGML_PLANES, GGMLPlanes
from torch import Tensor

from lq_kernels import cost, dequant_blas
from lq_kernels.problem import Arch, Problem
from lq_kernels.registry import Kernel
from lq_kernels.triton.constraints import why_not_dequantize, why_not_ggml


@functools.lru_cache(maxsize=1024)
def make_problem(m: int, n: int, k: int, ggml_type: str, dtype: torch.dtype, arch: Arch) -> Problem:
    """Return the product in the registry's terms; minima count as zero points."""
    layout = GGML_PLANES[ggml_type]
    bits = layout.low.bits + (0 if layout.upper is None else layout.upper.bits)
    has_minima = ggml_type in ("q4_1", "q5_1", "q2_k", "q4_k", "q5_k")
    return Problem("ggml", m, n, k, QuantSpec(bits, "group", layout.group, not has_minima, torch.float16), dtype, arch)


def dequantize(
    codes: Tensor, high: Tensor | None, scale: Tensor, ggml_type: str, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Return the ``(N, in_features)`` weight: ggml's float32 values, rounded once to ``dtype``."""
    if why_not_dequantize(codes.device, dtype) is None:
        from lq_kernels.triton.ggml import dequantize_ggml

        w: Tensor = dequantize_ggml(codes, high, scale, ggml_type, in_features, dtype)
        return w
    layout = GGML_PLANES[ggml_type]
    dense: Tensor = layout.form.dequantize(layout.unpack(GGMLPlanes(codes, high, scale), in_features), dtype)
    return dense


def predict_gemv_us(problem: Problem) -> float:
    """Predict the Triton GEMV: 0.45 us a million weights and token on an H200 (8 to 12 instructions a weight)."""
    millions = problem.n * problem.k / 1e6
    return cost.machine(problem.arch).launch + 0.45 * millions * problem.m * _slower_than_h200(problem)


def predict_splitk_us(problem: Problem) -> float:
    """Predict the Triton split-K kernel: two launches and 0.38 us a million weights on an H200 (6 to 12 instructions a weight).

    Scales multiply sums, so a tile of 64 tokens costs about 1.6 times one of 16; more tokens read the weight again.
    """
    millions = problem.n * problem.k / 1e6
    tile = 1.0 + 0.6 * max(min(problem.m, 64) - 16, 0) / 48
    tiles = tile if problem.m <= 64 else 2.4 * -(-problem.m // 64)
    exact = 8.0 if problem.dtype == torch.float32 else 1.0
    return cost.machine(problem.arch).launch + 3.0 + 0.38 * millions * tiles * exact * _slower_than_h200(problem)


def _slower_than_h200(problem: Problem) -> float:
    return cost.machine(Arch("cuda", (9, 0), "NVIDIA H200", 132)).rate / cost.machine(problem.arch).rate


def _triton(name: str) -> Callable[..., Tensor]:
    def run(
        x: Tensor, codes: Tensor, high: Tensor | None, scale: Tensor, bias: Tensor | None, ggml_type: str
    ) -> Tensor:
        from lq_kernels.triton import ggml

        result: Tensor = getattr(ggml, name)(x, codes, high, scale, bias, ggml_type)
        return result

    return run


def _dense(x: Tensor, codes: Tensor, high: Tensor | None, scale: Tensor, bias: Tensor | None, ggml_type: str) -> Tensor:
    w = dequantize(codes, high, scale, ggml_type, x.shape[1], x.dtype)
    return torch.nn.functional.linear(x, w, bias)


def _reference(
    x: Tensor, codes: Tensor, high: Tensor | None, scale: Tensor, bias: Tensor | None, ggml_type: str
) -> Tensor:
    """Return the product in float64, rounded once to x's dtype."""
    layout = GGML_PLANES[ggml_type]
    blocks = layout.unpack(GGMLPlanes(codes, high, scale), x.shape[1])
    y = x.to(torch.float64) @ layout.form.dequantize(blocks, torch.float64).t()
    return (y if bias is None else y + bias.to(torch.float64)).to(x.dtype)


KERNELS: tuple[Kernel, ...] = (
    Kernel("triton-gemv", "ggml", why_not_ggml, predict_gemv_us, _triton("gemv")),
    Kernel("triton-splitk", "ggml", why_not_ggml, predict_splitk_us, _triton("splitk")),
    Kernel("dequant-blas", "ggml", dequant_blas.why_not, dequant_blas.predict_us, _dense),
    Kernel("reference", "ggml", dequant_blas.why_not, cost.reference_us, _reference),
)
