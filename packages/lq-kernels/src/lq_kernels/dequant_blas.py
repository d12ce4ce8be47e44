"""dequant-blas: unpack the weight into a temporary, then call the vendor's dense matrix product.

Costs one write and one read of the dense weight, whatever the number of tokens: the fastest way where arithmetic decides
(large M), and what bounds a packed layer's cost from above on any device. Deterministic as far as the vendor's product is.

Error: the weight is rounded once to x's dtype (relative 2**-9 for bf16, 2**-12 for fp16), sums are the vendor's.
"""

from collections.abc import Callable

import torch
from lq_formats.layouts import FRAGMENT_INT4
from torch import Tensor

from lq_kernels import cost
from lq_kernels.cuda.constraints import why_not_compile
from lq_kernels.hopper import int4_fragments, int8_fragments
from lq_kernels.problem import Arch, Problem
from lq_kernels.reference import (
    int4_dequantize_reference,
    minima_dequantize_reference,
    preshuffled_dequantize_reference,
)
from lq_kernels.triton.constraints import why_not_dequantize


def int4_dequantize(
    qweight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Return the ``(N, K)`` weight of canonical int4 bits, by the fastest kernel of the device."""
    if why_not_dequantize(qweight.device, dtype) is None:
        from lq_kernels.triton.int4 import dequantize_int4

        w: Tensor = dequantize_int4(qweight, scale, zero, group_size, in_features, dtype)
        return w
    return int4_dequantize_reference(qweight, scale, zero, group_size, in_features, dtype)


def int8_dequantize(qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the ``(N, K)`` weight ``q * scale``, by the fastest kernel of the device."""
    if why_not_dequantize(qweight.device, dtype) is None:
        from lq_kernels.triton.int8 import dequantize_int8

        w: Tensor = dequantize_int8(qweight, scale, dtype)
        return w
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return (qweight.to(compute) * scale.to(compute).reshape(-1, 1)).to(dtype)


def preshuffled_dequantize(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the ``(N, K)`` weight of bits in fragment order, by the fastest kernel of the device."""
    if _compiled(packed, group_size, out_features, in_features, dtype):
        from lq_kernels.cuda.dequantize_fragment import dequantize

        w: Tensor = dequantize(packed, scale, zero, out_features, in_features, group_size, bits, dtype)
        return w
    return preshuffled_dequantize_reference(packed, scale, zero, bits, group_size, out_features, in_features, dtype)


def minima_dequantize(
    packed: Tensor,
    scale: Tensor,
    minimum: Tensor,
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the ``(N, K)`` weight of int4 bits in fragment order with minima, by the fastest kernel of the device."""
    if _compiled(packed, group_size, out_features, in_features, dtype):
        from lq_kernels.cuda.dequantize_fragment import dequantize

        w: Tensor = dequantize(packed, scale, minimum, out_features, in_features, group_size, 4, dtype, minimum=True)
        return w
    return minima_dequantize_reference(packed, scale, minimum, group_size, out_features, in_features, dtype)


def _compiled(packed: Tensor, group_size: int, out_features: int, in_features: int, dtype: torch.dtype) -> bool:
    """Return whether the CUDA kernel unpacks such a weight in fragment order."""
    size, step = group_size, FRAGMENT_INT4.step
    whole = size == in_features or size in (32, 64) or size % step == 0
    narrow = dtype in (torch.float16, torch.bfloat16, torch.float32)
    on_gpu = Arch.of(packed.device).kind == "cuda" and why_not_compile() is None
    return on_gpu and whole and narrow and out_features > 0


def minima_linear(
    x: Tensor, packed: Tensor, scale: Tensor, minimum: Tensor, bias: Tensor | None, out_features: int, group_size: int
) -> Tensor:
    """Return ``x (M, K) @ w.T + bias`` in x's dtype."""
    w = minima_dequantize(packed, scale, minimum, group_size, out_features, x.shape[1], x.dtype)
    return torch.nn.functional.linear(x, w, bias)


def preshuffled_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    bits: int,
    residual: Tensor | None = None,
) -> Tensor:
    """Return ``x (M, K) @ w.T + bias`` in x's dtype; a residual is added to the rounded result."""
    w = preshuffled_dequantize(packed, scale, zero, bits, group_size, out_features, x.shape[1], x.dtype)
    y = torch.nn.functional.linear(x, w, bias)
    return y if residual is None else y.add_(residual)


def int4_linear(x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    """Return ``x (M, K) @ w.T`` in x's dtype."""
    n, k = qweight.shape[0], x.shape[1]
    if _fragments_serve(x, group_size):
        packed, scales, zeros = int4_fragments(k, qweight, scale, zero, group_size)
        return x @ preshuffled_dequantize(packed, scales, zeros, 4, group_size, n, k, x.dtype).t()
    return x @ int4_dequantize(qweight, scale, zero, group_size, k, x.dtype).t()


def int8_linear(x: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
    """Return ``x (M, K) @ (q * scale).T`` in x's dtype."""
    n, k = qweight.shape
    if _fragments_serve(x, k):
        packed, scales = int8_fragments(qweight, scale)
        return x @ preshuffled_dequantize(packed, scales, None, 8, k, n, k, x.dtype).t()
    return x @ int8_dequantize(qweight, scale, x.dtype).t()


def _fragments_serve(x: Tensor, group_size: int) -> bool:
    """Return whether the Hopper kernels run such a weight: then it is in fragment order beside the canonical bits."""
    arch, k = Arch.of(x.device), x.shape[1]
    whole = group_size == k or group_size in (32, 64) or group_size % FRAGMENT_INT4.step == 0
    hopper = arch.kind == "cuda" and arch.capability == (9, 0) and why_not_compile() is None
    return hopper and whole and k % 8 == 0 and x.dtype in (torch.float16, torch.bfloat16)


def gemm_q4_0_q8_1(weight_q: Tensor, activation_q: Tensor) -> Tensor:
    """Return the ``(M, N) float32`` product of Q4_0 and Q8_1 blocks as one dense float32 product of scaled codes."""
    return q4_0_product(weight_q)(activation_q)


def q4_0_product(weight_q: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the product of Q4_0 blocks with Q8_1 blocks, with the former unpacked."""
    d4 = _halves(weight_q, 0)
    q4 = torch.cat((weight_q[..., 2:] & 0x0F, weight_q[..., 2:] >> 4), dim=-1).to(torch.float32)
    w, rows_d4 = (q4 * d4).view(weight_q.shape[0], -1), d4.squeeze(-1)

    def multiply(activation_q: Tensor) -> Tensor:
        d8, s8 = _halves(activation_q, 0), _halves(activation_q, 2)
        q8 = activation_q[..., 4:].contiguous().view(torch.int8).to(torch.float32)
        out = w @ (q8 * d8).view(activation_q.shape[0], -1).t()
        return out.addmm_(rows_d4, s8.squeeze(-1).t(), alpha=-8)

    return multiply


def _halves(blocks: Tensor, at: int) -> Tensor:
    return blocks[..., at : at + 2].contiguous().view(torch.float16).to(torch.float32)


def why_not(problem: Problem) -> str | None:
    """Return None: this always works."""
    return None


def predict_us(problem: Problem) -> float:
    """Predict microseconds: unpack, then the dense product."""
    return cost.dequantize_us(problem) + cost.dense_us(problem)
