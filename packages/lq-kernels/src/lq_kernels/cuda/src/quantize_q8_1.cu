// Q8_1: 32 floats to `half d; half s; int8 q[32]`, the bytes of lq_formats.quantize_q8_1; or to what a block stands for, d q,
// rounded once to bf16 (round_q8_1_*), for products of 16 bits.
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

// Two floats to bf16, to nearest even: `low` in the low half.
__device__ __forceinline__ u32 to_bfloats(float low, float high) {
#if defined(__CUDA_ARCH__)
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  auto bits = [](float value) {
    const u32 word = __float_as_uint(value);
    return value != value ? 0x7FFFu : (word + 0x7FFFu + (word >> 16 & 1u)) >> 16;
  };
  return bits(low) | bits(high) << 16;
#endif
}

// What a lane has of a block: its elements' codes, and the d of all.
struct Quantized {
  float d;
  int q[kElements];
};

// Every lane of the warp takes part.
__device__ __forceinline__ Quantized quantize(const float (&x)[kElements]) {
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
  Quantized block;
  block.d = __fdiv_rn(amax, 127.0f);
  const float inverse = block.d == 0.0f ? 0.0f : __fdiv_rn(1.0f, block.d);
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const float rounded = roundf(__fmul_rn(x[i], inverse));
    // Where 1 / d overflows (or x is not finite) the code is 0, as in lq_formats.
    block.q[i] = fabsf(rounded) <= 127.0f ? static_cast<int>(rounded) : 0;
  }
  return block;
}

// Every lane of the warp takes part; what lanes without a block have is not stored.
__device__ __forceinline__ void store(const Quantized& block, u8* to, int part, bool exists) {
  int sum = 0;
  u32 codes[2] = {};
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    sum += block.q[i];
    codes[i / 4] |= (static_cast<u32>(block.q[i]) & 0xFFu) << (8 * (i % 4));
  }
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, offset);
  if (!exists) return;
  u32* const words = reinterpret_cast<u32*>(to);
  const float s = __fmul_rn(static_cast<float>(sum), block.d);
  if (part == 0) words[0] = float_to_half(block.d) | static_cast<u32>(float_to_half(s)) << 16;
  words[1 + 2 * part] = codes[0];
  words[2 + 2 * part] = codes[1];
}

// d is an fp16 number in a block. A product with an infinite d is NaN where q is 0.
__device__ __forceinline__ void store_rounded(const Quantized& block, u16* to) {
  const float d = half_to_float(float_to_half(block.d));
  Vector values;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    values.words[i] = to_bfloats(__fmul_rn(d, static_cast<float>(block.q[2 * i])), __fmul_rn(d, static_cast<float>(block.q[2 * i + 1])));
  *reinterpret_cast<Vector*>(to) = values;
}

}  // namespace

#define LQ_KERNELS(SUFFIX, TYPE, LOAD)                                                                                     \
  extern "C" __global__ void __launch_bounds__(kThreads) quantize_q8_1_##SUFFIX(const TYPE* x, u8* out, i64 blocks) {      \
    const i64 unit = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x, block = unit / kLanes;                         \
    const bool exists = block < blocks;                                                                                    \
    float values[kElements] = {};                                                                                          \
    overlap();                                                                                                             \
    if (exists) LOAD(values, x, unit * kElements);                                                                         \
    store(quantize(values), out + block * 36, static_cast<int>(unit % kLanes), exists);                                    \
  }                                                                                                                        \
  extern "C" __global__ void __launch_bounds__(kThreads) round_q8_1_##SUFFIX(const TYPE* x, u16* out, i64 blocks) {        \
    const i64 unit = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x;                                                \
    const bool exists = unit / kLanes < blocks;                                                                            \
    float values[kElements] = {};                                                                                          \
    overlap();                                                                                                             \
    if (exists) LOAD(values, x, unit * kElements);                                                                         \
    const Quantized block = quantize(values);                                                                              \
    if (exists) store_rounded(block, out + unit * kElements);                                                              \
  }

LQ_KERNELS(float32, float, load)
LQ_KERNELS(float16, u16, load_half)
LQ_KERNELS(bfloat16, u16, load_bfloat)
