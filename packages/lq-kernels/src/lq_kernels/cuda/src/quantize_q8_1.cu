// Q8_1: 32 floats to `half d; half s; int8 q[32]`, the bytes of lq_formats.quantize_q8_1.
//
// Four lanes a block, eight elements a lane. Division and multiplication are rounded one by one (__fdiv_rn, __fmul_rn):
// a fused or approximate operation would change bytes. roundf rounds half away from zero, as ggml does. On Hopper it starts
// before its predecessor ends, and its successor before it does; whoever needs results waits.

#include "lq/mma.cuh"

using namespace lq;

namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 4;  // of a block
constexpr int kElements = 32 / kLanes;

struct alignas(16) Vector {
  u32 words[4];
};

__device__ __forceinline__ void load(float (&to)[kElements], const float* x, i64 at) {
  const Vector low = *reinterpret_cast<const Vector*>(x + at), high = *reinterpret_cast<const Vector*>(x + at + 4);
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = __uint_as_float(low.words[i]), to[4 + i] = __uint_as_float(high.words[i]);
}

__device__ __forceinline__ void load_half(float (&to)[kElements], const u16* x, i64 at) {
  const Vector v = *reinterpret_cast<const Vector*>(x + at);
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = half_to_float(static_cast<u16>(v.words[i / 2] >> (16 * (i % 2))));
}

__device__ __forceinline__ void load_bfloat(float (&to)[kElements], const u16* x, i64 at) {
  const Vector v = *reinterpret_cast<const Vector*>(x + at);
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = __uint_as_float(i % 2 ? v.words[i / 2] & 0xFFFF0000u : v.words[i / 2] << 16);
}

__device__ __forceinline__ void overlap() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Every lane of the warp takes part; what lanes without a block have is not stored.
__device__ __forceinline__ void quantize(const float (&x)[kElements], u8* block, int part, bool exists) {
  constexpr u32 kAll = 0xFFFFFFFFu;
  float amax = 0.0f;
  int nan = 0;
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    amax = fmaxf(amax, fabsf(x[i]));
    nan |= x[i] != x[i];
  }
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(kAll, amax, offset));
    nan |= __shfl_xor_sync(kAll, nan, offset);
  }
  // fmaxf drops NaN; a block that holds one must not look finite.
  if (nan) amax = __int_as_float(0x7FC00000);
  const float d = __fdiv_rn(amax, 127.0f);
  const float inverse = d == 0.0f ? 0.0f : __fdiv_rn(1.0f, d);
  int sum = 0;
  u32 codes[2] = {};
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const float rounded = roundf(__fmul_rn(x[i], inverse));
    // Where 1 / d overflows (or x is not finite) the code is 0, as in lq_formats.
    const int q = fabsf(rounded) <= 127.0f ? static_cast<int>(rounded) : 0;
    sum += q;
    codes[i / 4] |= (static_cast<u32>(q) & 0xFFu) << (8 * (i % 4));
  }
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) sum += __shfl_xor_sync(kAll, sum, offset);
  if (!exists) return;
  u32* const words = reinterpret_cast<u32*>(block);
  if (part == 0) words[0] = float_to_half(d) | static_cast<u32>(float_to_half(__fmul_rn(static_cast<float>(sum), d))) << 16;
  words[1 + 2 * part] = codes[0];
  words[2 + 2 * part] = codes[1];
}

}  // namespace

#define LQ_KERNEL(NAME, TYPE, LOAD)                                                                  \
  extern "C" __global__ void __launch_bounds__(kThreads) NAME(const TYPE* x, u8* out, i64 blocks) { \
    const i64 unit = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x, block = unit / kLanes;   \
    const bool exists = block < blocks;                                                              \
    float values[kElements] = {};                                                                    \
    overlap();                                                                                       \
    if (exists) LOAD(values, x, unit * kElements);                                                   \
    quantize(values, out + block * 36, static_cast<int>(unit % kLanes), exists);                     \
  }

LQ_KERNEL(quantize_q8_1_float32, float, load)
LQ_KERNEL(quantize_q8_1_float16, u16, load_half)
LQ_KERNEL(quantize_q8_1_bfloat16, u16, load_bfloat)
