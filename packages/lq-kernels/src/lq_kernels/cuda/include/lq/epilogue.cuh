// What becomes of fp32 sums on their way out, and the moves of 8 x 8 matrices that it takes.
//
// The rows of a gate and an up projection that make one product, silu(gate) * up, alternate by eights: of a block of 16 rows, 0 to 7
// are gates and 8 to 15 the ups of the same out features (lq_kernels.gated). A lane's rows g and g + 8 are then such a pair.
#pragma once

#include "lq/dequantize.cuh"

namespace lq {

// silu(gate) * up. A few units in the last place of fp32 off; NaN where PyTorch's silu has it (gate = -infinity).
__device__ __forceinline__ float silu_multiply(float gate, float up) { return __fdividef(gate, 1.0f + __expf(-gate)) * up; }

// store_matrix_x4_transposed for two matrices; lanes 0 to 15 give the addresses.
__device__ __forceinline__ void store_matrix_x2_transposed(u32 address, const u32 (&r)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(address), "r"(r[0]), "r"(r[1]) : "memory");
}

// The inverse of store_matrix_x4_transposed, in place: the compiler does not move it.
__device__ __forceinline__ void load_matrix_x4_transposed(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Two 16-bit floats of a register as fp32.
template <typename T>
__device__ __forceinline__ float2 to_floats(T, u32 pair) {
  return {to_float(T{}, static_cast<u16>(pair)), to_float(T{}, static_cast<u16>(pair >> 16))};
}

}  // namespace lq
