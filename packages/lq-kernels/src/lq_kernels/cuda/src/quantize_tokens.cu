// Tokens to 8 bits: x (m, k) bf16 or fp16 to codes (m, k) int8 or e4m3 and one fp32 scale a token; lq_kernels.dynamic_reference defines
// them, and these are the same bytes.
//
// One CTA a token, which holds it in registers: x is read once. The largest magnitude is found on the bits as they are: without the
// sign, the floats of a type are ordered like integers, with infinity and NaN above all.
//
// - int8: the exact product x * inverse, rounded to nearest even: a multiply-add of 1.5 * 2^23 leaves the integer in the low byte.
// - e4m3: x * inverse rounded to fp32, then to e4m3, to nearest even both times.
// - A token with NaN or infinity has the scale NaN and zeros for codes.
//
// Compiled with LQ_X (Bf16, Fp16), LQ_CODES (Int8, Fp8) and LQ_VECTORS (1, 2, 4, 8: of eight elements, a thread).

#include "lq/wgmma_a8.cuh"

using namespace lq;

namespace {

using X = LQ_X;
using Codes = LQ_CODES;
constexpr int kVectors = LQ_VECTORS;
constexpr int kMaxWarps = 32;
constexpr float kLeast = 7.888609052210118e-31f;  // 2^-100, so that neither the scale nor its inverse leaves the normal floats

__device__ __forceinline__ u32 infinity(Bf16) { return 0x7f80; }
__device__ __forceinline__ u32 infinity(Fp16) { return 0x7c00; }
__device__ __forceinline__ float largest(Int8) { return 127.0f; }
__device__ __forceinline__ float largest(Fp8) { return 448.0f; }

// Four codes of two pairs of x.
__device__ __forceinline__ u32 four_codes(Int8, const float (&x)[4], float inverse) {
  u32 r[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) r[i] = __float_as_uint(fmaf(x[i], inverse, kMagic));
  return __byte_perm(__byte_perm(r[0], r[1], 0x0040), __byte_perm(r[2], r[3], 0x0040), 0x5410);
}

__device__ __forceinline__ u32 four_codes(Fp8, const float (&x)[4], float inverse) {
  u16 pairs[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
        : "=h"(pairs[i])
        : "f"(__fmul_rn(x[2 * i + 1], inverse)), "f"(__fmul_rn(x[2 * i], inverse)));
  return pairs[0] | static_cast<u32>(pairs[1]) << 16;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(1024)
    quantize_tokens(const u16* x, u8* codes, float* scales, i64 k, i64 x_pitch, i64 code_pitch) {
  __shared__ u32 warp_max[kMaxWarps];
  const int vectors = static_cast<int>(k / 8), threads = static_cast<int>(blockDim.x), warps = threads / 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const i64 token = blockIdx.x;
  const uint4* const from = reinterpret_cast<const uint4*>(x + token * x_pitch);
  uint2* const to = reinterpret_cast<uint2*>(codes + token * code_pitch);
  let_next_kernel_start();
  wait_for_previous_kernel();

  uint4 v[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = static_cast<int>(threadIdx.x) + i * threads;
    v[i] = at < vectors ? from[at] : uint4{0, 0, 0, 0};
  }
  u32 most = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    constexpr u32 kMagnitudes = 0x7fff7fffu;
    most = larger_of_pairs(most, larger_of_pairs(larger_of_pairs(v[i].x & kMagnitudes, v[i].y & kMagnitudes), larger_of_pairs(v[i].z & kMagnitudes, v[i].w & kMagnitudes)));
  }
  most = most > most << 16 ? most >> 16 : most & 0xffff;
  most = __reduce_max_sync(0xffffffff, most);
  if (lane == 0) warp_max[warp] = most;
  __syncthreads();
  most = __reduce_max_sync(0xffffffff, lane < warps ? warp_max[lane] : 0);

  const bool finite = most < infinity(X{});
  const float amax = fmaxf(to_float(X{}, static_cast<u16>(most)), kLeast);
  const float inverse = __fdiv_rn(largest(Codes{}), amax);
  if (threadIdx.x == 0) scales[token] = finite ? __fdiv_rn(amax, largest(Codes{})) : __int_as_float(0x7fc00000);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = static_cast<int>(threadIdx.x) + i * threads;
    if (at < vectors) {
      const u32 words[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
      u32 four[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float values[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) values[j] = to_float(X{}, static_cast<u16>(words[2 * half + j / 2] >> (16 * (j % 2))));
        four[half] = finite ? four_codes(Codes{}, values, inverse) : 0;
      }
      to[at] = uint2{four[0], four[1]};
    }
  }
}
