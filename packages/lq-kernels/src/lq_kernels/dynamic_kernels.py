"""The kernels for dynamically quantized activations as the registry runs them, and what they can run.

Launchers take ``(x, weight, scale, bias)`` for 8-bit weights and ``(x, packed, scale, bias, group_size, out_features,
activation, lowest)`` for int4: all tensors valid and not empty, x ``(M, K)``.
"""

from typing import cast

import torch
from torch import Tensor

from lq_kernels import cost
from lq_kernels.cuda import constraints
from lq_kernels.dynamic_reference import (
    Activation,
    dequantize_tokens_reference,
    int4_dynamic_dequantize,
    int8_dynamic_dequantize,
    linear_reference,
    quantize_tokens_reference,
)
from lq_kernels.problem import Arch, Problem

MAX_FEATURES = 65536
"""In features that one CTA of the quantizer holds; sums of int8 fit 32 bits up to twice as many."""
_STEP = 128


def why_not_cuda(problem: Problem) -> str | None:
    """Return why the Hopper kernel cannot run ``problem``, or None."""
    if problem.arch.kind != "cuda" or problem.arch.capability != (9, 0):
        return "needs a Hopper GPU (compute capability 9.0)"
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {problem.dtype}"
    if not problem.spec.symmetric:
        return "takes symmetric weights"
    divisor = 8 if problem.spec.bits == 4 else 16
    if problem.k % divisor:
        return f"needs in features divisible by {divisor}, got {problem.k}"
    if problem.k > MAX_FEATURES:
        return f"takes up to {MAX_FEATURES} in features, got {problem.k}"
    if problem.group_size != problem.k and problem.group_size % _STEP:
        return f"takes groups of multiples of {_STEP}, or one scale a row, not groups of {problem.group_size}"
    return constraints.why_not_compile()


def predict_dense_us(problem: Problem) -> float:
    """Predict quantizing and dequantizing the tokens, dequantizing the weight, and the dense product."""
    tokens = 6 * problem.dtype.itemsize * problem.m * problem.k / cost.machine(problem.arch).bandwidth
    return tokens + cost.dequantize_us(problem) + cost.dense_us(problem)


def quantize(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Quantize tokens ``(M, K)`` by the fastest kernel of the device; the same bytes everywhere."""
    arch = Arch.of(x.device)
    fused = arch.kind == "cuda" and arch.capability >= (9, 0) and x.dtype in (torch.bfloat16, torch.float16)
    m, k = x.shape
    if fused and m and k % 8 == 0 and k <= MAX_FEATURES and constraints.why_not_compile() is None:
        from lq_kernels.cuda.quantize_tokens import quantize_tokens

        return quantize_tokens(x, cast(Activation, activation))
    return quantize_tokens_reference(x, cast(Activation, activation))


def int8_cuda(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, *, batch_invariant: bool = False
) -> Tensor:
    """Run the Hopper kernel; see :func:`lq_kernels.cuda.linear_a8.linear`."""
    from lq_kernels.cuda import invariant, linear_a8
    from lq_kernels.cuda.quantize_tokens import quantize_tokens

    codes, token_scale = quantize_tokens(x, activation_of(weight))
    linear = invariant.a8 if batch_invariant else linear_a8.linear
    y: Tensor = linear(codes, token_scale, _aligned(weight), scale, bias, weight.shape[0], x.shape[1], x.dtype)
    return y


def int4_cuda(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
    activation: Activation,
    lowest: bool,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """Run the Hopper kernel; see :func:`lq_kernels.cuda.linear_a8.linear`."""
    from lq_kernels.cuda import invariant, linear_a8
    from lq_kernels.cuda.quantize_tokens import quantize_tokens

    codes, token_scale = quantize_tokens(x, activation)
    linear = invariant.a8 if batch_invariant else linear_a8.linear
    y: Tensor = linear(codes, token_scale, packed, scale, bias, out_features, group_size, x.dtype, lowest=lowest)
    return y


def int8_dense(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Dequantize both operands to x's dtype and multiply; 2**-9 (bf16) or 2**-12 (fp16) of each is rounded away."""
    w = int8_dynamic_dequantize(weight, scale, x.dtype)
    return torch.nn.functional.linear(fake_quantize(x, activation_of(weight)), w, bias)


def int4_dense(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
    activation: Activation,
    lowest: bool,
) -> Tensor:
    """Dequantize both operands to x's dtype and multiply."""
    w = int4_dynamic_dequantize(packed, scale, group_size, out_features, x.shape[1], activation, x.dtype)
    return torch.nn.functional.linear(fake_quantize(x, activation), w, bias)


def int8_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply in float64; see :mod:`lq_kernels.dynamic_reference`."""
    w = int8_dynamic_dequantize(weight, scale, torch.float64)
    return linear_reference(x, w, bias, activation_of(weight))


def int4_reference(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
    activation: Activation,
    lowest: bool,
) -> Tensor:
    """Multiply in float64; see :mod:`lq_kernels.dynamic_reference`."""
    w = int4_dynamic_dequantize(packed, scale, group_size, out_features, x.shape[1], activation, torch.float64)
    return linear_reference(x, w, bias, activation)


def activation_of(weight: Tensor) -> Activation:
    """Return what tokens are quantized to for an 8-bit weight."""
    return "int8" if weight.dtype == torch.int8 else "fp8"


def fake_quantize(x: Tensor, activation: Activation) -> Tensor:
    """Return ``x (M, K)`` quantized and dequantized, in its dtype."""
    return dequantize_tokens_reference(*quantize(x, activation), x.dtype)


def _aligned(weight: Tensor) -> Tensor:
    return weight if weight.data_ptr() % 16 == 0 else weight.clone()
