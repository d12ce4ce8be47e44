"""The catalog: every kernel of this package, in the order that breaks ties.

Launchers import Triton or the CUDA runtime compiler when they first run, so reading the catalog needs neither.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lq_kernels import (
    aten_cpu,
    cost,
    dequant_blas,
    dynamic_kernels,
    gated,
    ggml_kernels,
    hopper,
    plans,
    q4_0,
    reference,
)
from lq_kernels.cuda import constraints as cuda_constraints
from lq_kernels.plans import Plan
from lq_kernels.problem import Op, Problem
from lq_kernels.registry import Kernel
from lq_kernels.triton import constraints as triton_constraints


def _anything(problem: Problem) -> str | None:
    return None


def _triton_int4(name: str) -> Any:
    def run(x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
        from lq_kernels.triton import int4

        result: Tensor = getattr(int4, name)(x, qweight, scale, zero, group_size)
        return result

    return run


def _triton_int8(name: str) -> Any:
    def run(x: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
        from lq_kernels.triton import int8

        result: Tensor = getattr(int8, name)(x, qweight, scale)
        return result

    return run


def _portable(predict_us: Callable[[Problem], float]) -> Callable[[Problem], float]:
    """Predict half as much again where Hopper's kernels run the same.

    None of these was measured to be faster there, and Triton compiles each for a second or more: a model's few per cent are
    no reason for that.
    """

    def predicted(problem: Problem) -> float:
        return predict_us(problem) * (1.5 if cuda_constraints.why_not_fragment(problem) is None else 1.0)

    return predicted


def _cuda_q4_0(weight_q: Tensor, activation_q: Tensor) -> Tensor:
    from lq_kernels.cuda.gemm_q4_0_q8_1 import gemm_q4_0_q8_1

    result: Tensor = gemm_q4_0_q8_1(weight_q, activation_q)
    return result


def _planned(
    name: str,
    why_not: Callable[[Problem], str | None],
    plan: Callable[[Problem], Plan],
    op: Op,
    run: Callable[..., Tensor],
) -> Kernel:
    return Kernel(name, op, why_not, lambda problem: plan(problem).us, run, plan)


_TRITON = {"gemv": _portable(cost.gemv_us), "splitk": _portable(cost.splitk_us), "gemm": _portable(cost.gemm_us)}
_DECODE = ("cuda-decode", cuda_constraints.why_not_decode, plans.decode)
_PREFILL = ("cuda-prefill", cuda_constraints.why_not_prefill, plans.prefill)
_A8 = ("cuda-a8", dynamic_kernels.why_not_cuda, plans.a8)
_Q4_0_DECODE = q4_0.OnQ4_0("decode_a16", plans.decode, cuda_constraints.why_not_decode, multiplies_int8=True)
_Q4_0_PREFILL = q4_0.OnQ4_0("prefill_a16", plans.prefill, cuda_constraints.why_not_prefill)
_DENSE = ("dequant-blas", dequant_blas.why_not, plans.dense)
_A8_DENSE = (_anything, dynamic_kernels.predict_dense_us)

KERNELS: tuple[Kernel, ...] = (
    _planned(*_DECODE, "int4", hopper.OnCanonicalInt4(hopper.decode)),
    _planned(*_PREFILL, "int4", hopper.OnCanonicalInt4(hopper.prefill)),
    *(
        Kernel(f"triton-{name}", "int4", triton_constraints.why_not_int4, predict_us, _triton_int4(name))
        for name, predict_us in _TRITON.items()
    ),
    Kernel("aten-cpu", "int4", aten_cpu.why_not_int4, aten_cpu.predict_us, aten_cpu.int4_linear),
    _planned(*_DENSE, "int4", dequant_blas.int4_linear),
    Kernel("reference", "int4", _anything, cost.reference_us, reference.int4_linear_reference),
    _planned(*_DECODE, "int8", hopper.OnCanonicalInt8(hopper.decode)),
    _planned(*_PREFILL, "int8", hopper.OnCanonicalInt8(hopper.prefill)),
    *(
        Kernel(f"triton-{name}", "int8", triton_constraints.why_not_int8, predict_us, _triton_int8(name))
        for name, predict_us in _TRITON.items()
    ),
    Kernel("aten-cpu", "int8", aten_cpu.why_not_int8, aten_cpu.predict_us, aten_cpu.int8_linear),
    _planned(*_DENSE, "int8", dequant_blas.int8_linear),
    Kernel("reference", "int8", _anything, cost.reference_us, reference.int8_linear_reference),
    _planned(*_DECODE, "preshuffled", hopper.decode),
    _planned(*_PREFILL, "preshuffled", hopper.prefill),
    _planned(*_DENSE, "preshuffled", dequant_blas.preshuffled_linear),
    Kernel("reference", "preshuffled", _anything, cost.reference_us, reference.preshuffled_linear_reference),
    _planned(*_DECODE, "preshuffled_minima", hopper.minima_decode),
    _planned(*_PREFILL, "preshuffled_minima", hopper.minima_prefill),
    _planned(*_DENSE, "preshuffled_minima", dequant_blas.minima_linear),
    Kernel("reference", "preshuffled_minima", _anything, cost.reference_us, reference.minima_linear_reference),
    _planned(*_DECODE, "preshuffled_gated", hopper.gated_decode),
    _planned(*_PREFILL, "preshuffled_gated", hopper.gated_prefill),
    _planned("dequant-blas", dequant_blas.why_not, gated.plan_dense, "preshuffled_gated", gated.dense),
    Kernel("reference", "preshuffled_gated", _anything, cost.reference_us, gated.reference),
    _planned("cuda-decode", _Q4_0_DECODE.why_not, _Q4_0_DECODE.plan, "q4_0", _Q4_0_DECODE),
    _planned("cuda-prefill", _Q4_0_PREFILL.why_not, _Q4_0_PREFILL.plan, "q4_0", _Q4_0_PREFILL),
    Kernel("cuda-mma", "q4_0", cuda_constraints.why_not_q4_0, cost.q4_0_us, q4_0.quantized(_cuda_q4_0)),
    Kernel(
        "dequant-blas",
        "q4_0",
        dequant_blas.why_not,
        dequant_blas.predict_us,
        q4_0.quantized(dequant_blas.gemm_q4_0_q8_1),
    ),
    Kernel("reference", "q4_0", _anything, cost.reference_us, q4_0.quantized(reference.gemm_q4_0_q8_1_reference)),
    _planned("cuda-decode", _Q4_0_DECODE.why_not, _Q4_0_DECODE.plan_of_blocks, "q4_0_q8_1", _Q4_0_DECODE.of_q8_1),
    _planned("cuda-prefill", _Q4_0_PREFILL.why_not, _Q4_0_PREFILL.plan_of_blocks, "q4_0_q8_1", _Q4_0_PREFILL.of_q8_1),
    Kernel("cuda-mma", "q4_0_q8_1", cuda_constraints.why_not_q4_0, cost.q4_0_us, q4_0.quantizing(_cuda_q4_0)),
    Kernel(
        "dequant-blas",
        "q4_0_q8_1",
        dequant_blas.why_not,
        dequant_blas.predict_us,
        q4_0.quantizing(dequant_blas.gemm_q4_0_q8_1),
    ),
    Kernel("reference", "q4_0_q8_1", _anything, cost.reference_us, q4_0.quantizing(reference.gemm_q4_0_q8_1_reference)),
    _planned(*_A8, "int8_dynamic", dynamic_kernels.int8_cuda),
    Kernel("dequant-blas", "int8_dynamic", *_A8_DENSE, dynamic_kernels.int8_dense),
    Kernel("reference", "int8_dynamic", _anything, cost.reference_us, dynamic_kernels.int8_reference),
    _planned(*_A8, "int4_dynamic", dynamic_kernels.int4_cuda),
    Kernel("dequant-blas", "int4_dynamic", *_A8_DENSE, dynamic_kernels.int4_dense),
    Kernel("reference", "int4_dynamic", _anything, cost.reference_us, dynamic_kernels.int4_reference),
    *ggml_kernels.KERNELS,
)
