"""The kernels for ggml weights in planes as the registry runs them, and their cost.

Launchers take ``(x, codes, high, scale, bias, ggml_type)``: the planes of :data:`lq_formats.layouts.GGML_PLANES`, all tensors
valid and not empty, x ``(M, K)``; they return ``(M, N)`` in x's dtype.

The models below are within 15% of what was measured on an H200 for Q4_1, Q5_0, Q8_0, Q4_K and Q6_K with 4096 x 4096 and
4096 x 14336 weights and 1 to 64 tokens (``benchmarks/results/h200/ggml-sweep.jsonl``).
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
from lq_kernels.triton.ggml_config import tile_m


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
    """Predict the Triton GEMV: 2.3 us and a time a million weights and token, 0.36 us (Q8_0) to 0.56 us (Q6_K) on an H200."""
    millions = problem.n * problem.k / 1e6
    work = (_us_per_million(problem) + 0.03) * millions * problem.m
    return cost.machine(problem.arch).launch + 0.8 + work * _slower_than_h200(problem)


def predict_splitk_us(problem: Problem) -> float:
    """Predict the Triton split-K kernel: 5.2 us for two launches and a time a million weights and tile of tokens on an H200.

    0.33 us (Q8_0) to 0.53 us (Q6_K) with 8 tokens; scales multiply sums, so larger tiles take longer. More than 64 tokens read
    the weight again.
    """
    millions = problem.n * problem.k / 1e6
    tile = _us_per_million(problem) + _TILE_US[tile_m(problem.m)]
    exact = 8.0 if problem.dtype == torch.float32 else 1.0  # not measured
    work = tile * millions * -(-problem.m // 64) * exact
    return cost.machine(problem.arch).launch + 3.7 + work * _slower_than_h200(problem)


_TILE_US = {8: 0.0, 16: 0.07, 32: 0.17, 64: 0.42}
"""Microseconds a million weights that a tile of so many tokens takes longer than one of 8 (H200)."""


def _us_per_million(problem: Problem) -> float:
    """Return the microseconds in which an H200 unpacks a million weights: 8 bits need no masks, 3, 5 and 6 have two planes."""
    bits = problem.spec.bits
    planes = 0.05 if bits in (3, 5, 6) else 0.0
    return (0.33 if bits == 8 else 0.38) + planes + (0.10 if problem.group_size == 16 else 0.0)


def _slower_than_h200(problem: Problem) -> float:
    """Return how many times slower than an H200 instructions are issued: each multiprocessor issues as many, older ones 2/3."""
    share = problem.arch.sm_count / 132 if problem.arch.sm_count else 1.0
    return 1 / (share if problem.arch.capability >= (9, 0) else share * 2 / 3)


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
