// Q8_1: 32 floats to `half d; half s; int8 q[32]`, the bytes of lq_formats.quantize_q8_1.
//
// One warp a block of 32, one lane an element. Division and multiplication are rounded one by one (__fdiv_rn, __fmul_rn):
// a fused or approximate operation would change bytes. roundf rounds half away from zero, as ggml does.

#include "lq/mma.cuh"

using namespace lq;

namespace {

constexpr int kWarps = 8;

__device__ __forceinline__ float load(const float* x, i64 i) { return x[i]; }
__device__ __forceinline__ float load_half(const u16* x, i64 i) { return half_to_float(x[i]); }
__device__ __forceinline__ float load_bfloat(const u16* x, i64 i) { return __uint_as_float(static_cast<u32>(x[i]) << 16); }

__device__ __forceinline__ void quantize(float x, u8* out, i64 block) {
  constexpr u32 kAll = 0xFFFFFFFFu;
  const int lane = threadIdx.x % 32;
  float amax = fabsf(x);
#pragma unroll
  for (int offset = 16; offset; offset /= 2) amax = fmaxf(amax, __shfl_xor_sync(kAll, amax, offset));
  // fmaxf drops NaN; a block that holds one must not look finite.
  if (__any_sync(kAll, x != x)) amax = __int_as_float(0x7FC00000);
  const float d = __fdiv_rn(amax, 127.0f);
  const float inverse = d == 0.0f ? 0.0f : __fdiv_rn(1.0f, d);
  const float rounded = roundf(__fmul_rn(x, inverse));
  // Where 1 / d overflows (or x is not finite) the code is 0, as in lq_formats.
  const int q = fabsf(rounded) <= 127.0f ? static_cast<int>(rounded) : 0;
  int sum = q;
#pragma unroll
  for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
  u8* bytes = out + block * 36;
  if (lane == 0) {
    const u32 scale = float_to_half(d), s = float_to_half(__fmul_rn(static_cast<float>(sum), d));
    *reinterpret_cast<u32*>(bytes) = scale | s << 16;
  }
  bytes[4 + lane] = static_cast<u8>(q);
}

}  // namespace

#define LQ_KERNEL(NAME, TYPE, LOAD)                                                                     \
  extern "C" __global__ void __launch_bounds__(kWarps * 32) NAME(const TYPE* x, u8* out, i64 blocks) { \
    const i64 block = static_cast<i64>(blockIdx.x) * kWarps + threadIdx.x / 32;                         \
    if (block < blocks) quantize(LOAD(x, block * 32 + threadIdx.x % 32), out, block);                   \
  }

LQ_KERNEL(quantize_q8_1_float32, float, load)
LQ_KERNEL(quantize_q8_1_float16, u16, load_half)
LQ_KERNEL(quantize_q8_1_bfloat16, u16, load_bfloat)
