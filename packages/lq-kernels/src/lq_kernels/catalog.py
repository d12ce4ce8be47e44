"""The catalog: every kernel of this package, in the order that breaks ties.

Launchers import Triton or the CUDA runtime compiler when they first run, so reading the catalog needs neither.
"""

from typing import Any

from torch import Tensor

from lq_kernels import aten_cpu, cost, dequant_blas, dynamic_kernels, hopper, reference
from lq_kernels.cuda import constraints as cuda_constraints
from lq_kernels.problem import Problem
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


def _cuda_q4_0(weight_q: Tensor, activation_q: Tensor) -> Tensor:
    from lq_kernels.cuda.gemm_q4_0_q8_1 import gemm_q4_0_q8_1

    result: Tensor = gemm_q4_0_q8_1(weight_q, activation_q)
    return result


_DECODE = (cuda_constraints.why_not_decode, cost.decode_us)
_PREFILL = (cuda_constraints.why_not_prefill, cost.prefill_us)
_A8 = (dynamic_kernels.why_not_cuda, dynamic_kernels.predict_cuda_us)
_A8_DENSE = (_anything, dynamic_kernels.predict_dense_us)

KERNELS: tuple[Kernel, ...] = (
    Kernel("cuda-decode", "int4", *_DECODE, hopper.on_canonical_int4(hopper.decode)),
    Kernel("cuda-prefill", "int4", *_PREFILL, hopper.on_canonical_int4(hopper.prefill)),
    Kernel("triton-gemv", "int4", triton_constraints.why_not_int4, cost.gemv_us, _triton_int4("gemv")),
    Kernel("triton-splitk", "int4", triton_constraints.why_not_int4, cost.splitk_us, _triton_int4("splitk")),
    Kernel("triton-gemm", "int4", triton_constraints.why_not_int4, cost.gemm_us, _triton_int4("gemm")),
    Kernel("aten-cpu", "int4", aten_cpu.why_not_int4, aten_cpu.predict_us, aten_cpu.int4_linear),
    Kernel("dequant-blas", "int4", dequant_blas.why_not, dequant_blas.predict_us, dequant_blas.int4_linear),
    Kernel("reference", "int4", _anything, cost.reference_us, reference.int4_linear_reference),
    Kernel("cuda-decode", "int8", *_DECODE, hopper.on_canonical_int8(hopper.decode)),
    Kernel("cuda-prefill", "int8", *_PREFILL, hopper.on_canonical_int8(hopper.prefill)),
    Kernel("triton-gemv", "int8", triton_constraints.why_not_int8, cost.gemv_us, _triton_int8("gemv")),
    Kernel("triton-splitk", "int8", triton_constraints.why_not_int8, cost.splitk_us, _triton_int8("splitk")),
    Kernel("triton-gemm", "int8", triton_constraints.why_not_int8, cost.gemm_us, _triton_int8("gemm")),
    Kernel("aten-cpu", "int8", aten_cpu.why_not_int8, aten_cpu.predict_us, aten_cpu.int8_linear),
    Kernel("dequant-blas", "int8", dequant_blas.why_not, dequant_blas.predict_us, dequant_blas.int8_linear),
    Kernel("reference", "int8", _anything, cost.reference_us, reference.int8_linear_reference),
    Kernel("cuda-decode", "preshuffled", *_DECODE, hopper.decode),
    Kernel("cuda-prefill", "preshuffled", *_PREFILL, hopper.prefill),
    Kernel(
        "dequant-blas", "preshuffled", dequant_blas.why_not, dequant_blas.predict_us, dequant_blas.preshuffled_linear
    ),
    Kernel("reference", "preshuffled", _anything, cost.reference_us, reference.preshuffled_linear_reference),
    Kernel("cuda-mma", "q4_0_q8_1", cuda_constraints.why_not_q4_0, cost.q4_0_us, _cuda_q4_0),
    Kernel("dequant-blas", "q4_0_q8_1", dequant_blas.why_not, dequant_blas.predict_us, dequant_blas.gemm_q4_0_q8_1),
    Kernel("reference", "q4_0_q8_1", _anything, cost.reference_us, reference.gemm_q4_0_q8_1_reference),
    Kernel("cuda-a8", "int8_dynamic", *_A8, dynamic_kernels.int8_cuda),
    Kernel("dequant-blas", "int8_dynamic", *_A8_DENSE, dynamic_kernels.int8_dense),
    Kernel("reference", "int8_dynamic", _anything, cost.reference_us, dynamic_kernels.int8_reference),
    Kernel("cuda-a8", "int4_dynamic", *_A8, dynamic_kernels.int4_cuda),
    Kernel("dequant-blas", "int4_dynamic", *_A8_DENSE, dynamic_kernels.int4_dense),
    Kernel("reference", "int4_dynamic", _anything, cost.reference_us, dynamic_kernels.int4_reference),
)
