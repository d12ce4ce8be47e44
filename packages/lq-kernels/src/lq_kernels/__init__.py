"""lq-kernels: matrix products with low-bit weights.

Every function takes canonical bits (see :mod:`lq_formats`), chooses a kernel for the sizes and the processor at hand
(:func:`explain` says which and why) and runs on a CPU as well. Importing this package compiles and initialises nothing.
"""

from lq_kernels.dynamic import (
    int4_dynamic_dequantize,
    int4_dynamic_linear,
    int8_dynamic_linear,
    pack_int4_dynamic,
    quantize_tokens,
    restore_int4_dynamic,
)
from lq_kernels.gated import interleave_rows, separate_rows
from lq_kernels.ggml import ggml_dequantize, ggml_linear
from lq_kernels.invariance import batch_invariant, is_batch_invariant, set_batch_invariant
from lq_kernels.linear import (
    gemm_q4_0_q8_1,
    int4_dequantize,
    int4_linear,
    int8_gemm,
    matmul_bf16_i4,
    q4_0_linear,
    quantize_activation_q8_1,
    quantize_gemm_q4_0_q8_1,
)
from lq_kernels.minima import minima_dequantize, minima_linear
from lq_kernels.preshuffled import (
    preshuffle_int4,
    preshuffle_int8,
    preshuffle_q4_0,
    preshuffled_dequantize,
    preshuffled_gated_linear,
    preshuffled_linear,
    reads_fragments,
    restore_int4,
    restore_int8,
    restore_q4_0,
)
from lq_kernels.problem import Arch, Problem
from lq_kernels.reference import int8_gemm_torch
from lq_kernels.registry import Explanation, Kernel, explain, kernel_names, select

__all__ = [
    "Arch",
    "Explanation",
    "Kernel",
    "Problem",
    "batch_invariant",
    "explain",
    "gemm_q4_0_q8_1",
    "ggml_dequantize",
    "ggml_linear",
    "int4_dequantize",
    "int4_dynamic_dequantize",
    "int4_dynamic_linear",
    "int4_linear",
    "int8_dynamic_linear",
    "int8_gemm",
    "int8_gemm_torch",
    "interleave_rows",
    "is_batch_invariant",
    "kernel_names",
    "matmul_bf16_i4",
    "minima_dequantize",
    "minima_linear",
    "pack_int4_dynamic",
    "preshuffle_int4",
    "preshuffle_int8",
    "preshuffle_q4_0",
    "preshuffled_dequantize",
    "preshuffled_gated_linear",
    "preshuffled_linear",
    "q4_0_linear",
    "quantize_activation_q8_1",
    "quantize_gemm_q4_0_q8_1",
    "quantize_tokens",
    "reads_fragments",
    "restore_int4",
    "restore_int4_dynamic",
    "restore_int8",
    "restore_q4_0",
    "select",
    "separate_rows",
    "set_batch_invariant",
]
