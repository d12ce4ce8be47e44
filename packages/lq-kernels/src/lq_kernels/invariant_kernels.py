"""The kernels in their batch-invariant forms: row i of a result depends on row i of the activations and the weight alone.

Of an operation's kernels in the registry's order, the first that has a form here and can run the problem is taken for any
number of tokens; ``why_not`` may not look at ``m``. Launchers take what those in :mod:`lq_kernels.catalog` take.

- Hopper: the kernels for many tokens, with K cut alike for all tiles (:mod:`lq_kernels.cuda.invariant`).
- Triton: split K in one configuration for any number of tokens. Tensor cores treat the columns of a tile alike.
- ``cuda-mma``: as it is. Tiles of more tokens are more columns; each column's blocks are added in the same order.
- ``aten-cpu`` and ``dequant-blas``: token after token. What a vendor's product does with many tokens is not promised; the same
  call with the same sizes at equally aligned addresses gives the same bits (cuBLAS and MKL document so much).
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lq_kernels import (
    aten_cpu,
    cost,
    dequant_blas,
    dynamic_kernels,
    dynamic_reference,
    gated,
    ggml_kernels,
    hopper,
    q4_0,
)
from lq_kernels.cuda import constraints as cuda_constraints
from lq_kernels.dynamic_reference import Activation
from lq_kernels.plans import Plan
from lq_kernels.problem import Problem
from lq_kernels.registry import Kernel
from lq_kernels.triton import constraints as triton_constraints


def each_token(product: Callable[[Tensor], Tensor], x: Tensor, dim: int = 0) -> Tensor:
    """Return ``product(x)`` of ``x (M, ...)``, one token at a time, joined in ``dim``; every call gets memory of its own."""
    tokens = (token.clone(memory_format=torch.contiguous_format) for token in torch.split(x, 1))
    return torch.cat([product(token) for token in tokens], dim)


def _each_us(predict_us: Callable[[Problem], float]) -> Callable[[Problem], float]:
    return lambda problem: problem.m * predict_us(replace(problem, m=1))


def _why_not_aten_int4(problem: Problem) -> str | None:
    if problem.dtype == torch.float32:
        return "is slower in float32 than dequantizing the weight"
    return aten_cpu.why_not_int4(problem)


def _aten_int4(x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    return each_token(aten_cpu.int4_product(x.shape[1], x.dtype, qweight, scale, zero, group_size), x)


def _aten_int8(x: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
    return each_token(aten_cpu.int8_product(x.dtype, qweight, scale), x)


def _dense(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    return each_token(lambda token: linear(token, w, bias), x)


def _dense_int4(x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    return _dense(x, dequant_blas.int4_dequantize(qweight, scale, zero, group_size, x.shape[1], x.dtype))


def _dense_int8(x: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
    return _dense(x, dequant_blas.int8_dequantize(qweight, scale, x.dtype))


def _dense_preshuffled(
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
    sizes = (bits, group_size, out_features, x.shape[1])
    y = _dense(x, dequant_blas.preshuffled_dequantize(packed, scale, zero, *sizes, x.dtype), bias)
    return y if residual is None else y.add_(residual)


def _dense_minima(
    x: Tensor, packed: Tensor, scale: Tensor, minimum: Tensor, bias: Tensor | None, out_features: int, group_size: int
) -> Tensor:
    sizes = (group_size, out_features, x.shape[1])
    return _dense(x, dequant_blas.minima_dequantize(packed, scale, minimum, *sizes, x.dtype), bias)


def _dense_gated(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    bits: int,
) -> Tensor:
    interleaved = None if bias is None else gated.interleave_rows(bias)
    sizes = (bits, group_size, gated.interleaved_rows(out_features), x.shape[1])
    w = dequant_blas.preshuffled_dequantize(packed, scale, zero, *sizes, x.dtype)
    # A token at a time to the end: on a CPU, silu of a number depends on whether a vector register holds it.
    return each_token(lambda token: gated.silu_multiply(linear(token, w, interleaved), out_features, x.dtype), x)


def _dense_q4_0(weight_q: Tensor, activation_q: Tensor) -> Tensor:
    return each_token(dequant_blas.q4_0_product(weight_q), activation_q, 1)


def _dense_int8_dynamic(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    w = dynamic_reference.int8_dynamic_dequantize(weight, scale, x.dtype)
    return _dense(dynamic_kernels.fake_quantize(x, dynamic_kernels.activation_of(weight)), w, bias)


def _dense_int4_dynamic(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
    activation: Activation,
    lowest: bool,
) -> Tensor:
    sizes = (group_size, out_features, x.shape[1], activation)
    w = dynamic_reference.int4_dynamic_dequantize(packed, scale, *sizes, x.dtype)
    return _dense(dynamic_kernels.fake_quantize(x, activation), w, bias)


def _dense_ggml(
    x: Tensor, codes: Tensor, high: Tensor | None, scale: Tensor, bias: Tensor | None, ggml_type: str
) -> Tensor:
    return _dense(x, ggml_kernels.dequantize(codes, high, scale, ggml_type, x.shape[1], x.dtype), bias)


def _triton(module: str) -> Callable[..., Tensor]:
    def run(*arguments: Any) -> Tensor:
        import importlib

        result: Tensor = importlib.import_module(f"lq_kernels.triton.{module}").invariant(*arguments)
        return result

    return run


def _cuda_q4_0(weight_q: Tensor, activation_q: Tensor) -> Tensor:
    from lq_kernels.cuda.gemm_q4_0_q8_1 import gemm_q4_0_q8_1

    result: Tensor = gemm_q4_0_q8_1(weight_q, activation_q)
    return result


def _plan_prefill(problem: Problem) -> Plan:
    from lq_kernels.cuda import invariant

    return invariant.plan_prefill(problem)


def _plan_a8(problem: Problem) -> Plan:
    from lq_kernels.cuda import invariant

    return invariant.plan_a8(problem)


def _prefill_us(problem: Problem) -> float:
    return _plan_prefill(problem).us


def _a8_us(problem: Problem) -> float:
    return _plan_a8(problem).us


_WHY_NOT_PREFILL = cuda_constraints.why_not_prefill
_Q4_0 = q4_0.OnQ4_0("invariant", _plan_prefill, _WHY_NOT_PREFILL, "prefill")
_DENSE = (dequant_blas.why_not, _each_us(dequant_blas.predict_us))
_A8_DENSE = (dequant_blas.why_not, _each_us(dynamic_kernels.predict_dense_us))
_ATEN_US = _each_us(aten_cpu.predict_us)


def _prefill(op: Any, run: Callable[..., Tensor]) -> Kernel:
    return Kernel("cuda-prefill", op, _WHY_NOT_PREFILL, _prefill_us, run, _plan_prefill)


def _a8(op: Any, run: Callable[..., Tensor]) -> Kernel:
    batch_invariant = functools.partial(run, batch_invariant=True)
    return Kernel("cuda-a8", op, dynamic_kernels.why_not_cuda, _a8_us, batch_invariant, _plan_a8)


KERNELS: tuple[Kernel, ...] = (
    _prefill("int4", hopper.OnCanonicalInt4(hopper.invariant_prefill)),
    Kernel("triton-splitk", "int4", triton_constraints.why_not_int4, cost.splitk_us, _triton("int4")),
    Kernel("aten-cpu", "int4", _why_not_aten_int4, _ATEN_US, _aten_int4),
    Kernel("dequant-blas", "int4", *_DENSE, _dense_int4),
    _prefill("int8", hopper.OnCanonicalInt8(hopper.invariant_prefill)),
    Kernel("triton-splitk", "int8", triton_constraints.why_not_int8, cost.splitk_us, _triton("int8")),
    Kernel("aten-cpu", "int8", aten_cpu.why_not_int8, _ATEN_US, _aten_int8),
    Kernel("dequant-blas", "int8", *_DENSE, _dense_int8),
    _prefill("preshuffled", hopper.invariant_prefill),
    Kernel("dequant-blas", "preshuffled", *_DENSE, _dense_preshuffled),
    _prefill("preshuffled_minima", hopper.minima_invariant_prefill),
    Kernel("dequant-blas", "preshuffled_minima", *_DENSE, _dense_minima),
    _prefill("preshuffled_gated", hopper.gated_invariant_prefill),
    Kernel("dequant-blas", "preshuffled_gated", *_DENSE, _dense_gated),
    Kernel("cuda-prefill", "q4_0", _Q4_0.why_not, lambda problem: _Q4_0.plan(problem).us, _Q4_0, _Q4_0.plan),
    Kernel("cuda-mma", "q4_0", cuda_constraints.why_not_q4_0, cost.q4_0_us, q4_0.quantized(_cuda_q4_0)),
    Kernel("dequant-blas", "q4_0", *_DENSE, q4_0.quantized(_dense_q4_0)),
    Kernel(
        "cuda-prefill",
        "q4_0_q8_1",
        _Q4_0.why_not,
        lambda problem: _Q4_0.plan_of_blocks(problem).us,
        _Q4_0.of_q8_1,
        _Q4_0.plan_of_blocks,
    ),
    Kernel("cuda-mma", "q4_0_q8_1", cuda_constraints.why_not_q4_0, cost.q4_0_us, q4_0.quantizing(_cuda_q4_0)),
    Kernel("dequant-blas", "q4_0_q8_1", *_DENSE, q4_0.quantizing(_dense_q4_0)),
    _a8("int8_dynamic", dynamic_kernels.int8_cuda),
    Kernel("dequant-blas", "int8_dynamic", *_A8_DENSE, _dense_int8_dynamic),
    _a8("int4_dynamic", dynamic_kernels.int4_cuda),
    Kernel("dequant-blas", "int4_dynamic", *_A8_DENSE, _dense_int4_dynamic),
    Kernel("triton-splitk", "ggml", triton_constraints.why_not_ggml, ggml_kernels.predict_splitk_us, _triton("ggml")),
    Kernel("dequant-blas", "ggml", *_DENSE, _dense_ggml),
)
