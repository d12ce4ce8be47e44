// Tokens in Q8_1 blocks, `half d; half s; int8 q[32]`, to 16 bits in shared memory; and tokens of 16 bits to what their blocks would be.
#pragma once

#include "lq/dequantize.cuh"

namespace lq {

template <bool kValue>
struct Bool {
  static constexpr bool value = kValue;
};

// Four int8 of a word to d q, a product that is exact until it is rounded to 16 bits. A byte less its sign, put into the mantissa of
// 2^15, is a number 2^15 + 128 too large; that is 9 bits and d 11, so d times it is exact too, but neither inf nor NaN. What is
// left of a zero may have the other sign, which no sum shows.
template <typename X, bool kFinite>
__device__ __forceinline__ void scale_int8(u32& low, u32& high, u32 word, float d) {
  constexpr float kExcess = 32896.0f;
  float values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float value = __uint_as_float(__byte_perm(word ^ 0x80808080u, 0x47000000u, 0x7404 + 16 * i));
    values[i] = kFinite ? fmaf(d, value, -kExcess * d) : d * (value - kExcess);
  }
  low = from_floats(X{}, values[0], values[1]);
  high = from_floats(X{}, values[2], values[3]);
}

// The q of a Q8_1 block to d q.
template <typename X, bool kFinite>
__device__ __forceinline__ void scale_block(uint4 (&values)[4], const u32* q, float d) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    scale_int8<X, kFinite>(values[i].x, values[i].y, q[2 * i], d);
    scale_int8<X, kFinite>(values[i].z, values[i].w, q[2 * i + 1], d);
  }
}

// Q8_1 blocks [from, to) of m tokens, which lie at `raw` in the tokens' rows, to 16 bits at the rows' start, by a warp: a block by a
// lane. Raw blocks end where rows do, so that in any order of K a block lies only over itself and blocks before it: those of a round
// are in registers when the first is written. Neighbouring lanes have neighbouring tokens, whose rows begin in different banks.
template <typename X>
__device__ __forceinline__ void convert_q8_1(u8* tokens, int pitch, int m, int raw, int from, int to) {
  constexpr int kWords = 9;  // d and s, then q
  const int lane = static_cast<int>(threadIdx.x) % 32, in_round = 32 / m;
  u8* const row = tokens + lane % m * pitch;
  int block = lane / m < in_round ? from + lane / m : to;
  u32 words[kWords] = {};
  auto load = [&] {
    if (block < to)
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const u32*>(row + raw + block * (kWords * 4))[i];
  };
  load();
#pragma unroll 1
  for (int first = from; first < to; first += in_round) {
    const float d = to_float(Fp16{}, static_cast<u16>(words[0]));
    uint4 values[4];
    if ((words[0] & 0x7c00) != 0x7c00)
      scale_block<X, true>(values, words + 1, d);
    else
      scale_block<X, false>(values, words + 1, d);
    uint4* const out = reinterpret_cast<uint4*>(row + block * 64);
    const bool exists = block < to;
    block += in_round;
    load();
    __syncwarp();
    if (exists)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] = values[i];
  }
  __syncwarp();
}

__device__ __forceinline__ u32 larger_of_pairs(u32 a, u32 b) {
  u32 d;
  asm("max.u16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// a + b, toward zero.
__device__ __forceinline__ float add_toward_zero(float a, float b) {
  float sum;
  asm("add.rz.f32 %0, %1, %2;" : "=f"(sum) : "f"(a), "f"(b));
  return sum;
}

// Two numbers of a block to |d q|: q is |x| / d, rounded once, and then half away from zero: that is |x| / d + .5 without its fraction,
// which a sum of 2^23 drops. d times the sum less 2^23 d is d q exactly, but neither inf nor NaN.
template <typename From, typename X, bool kFinite>
__device__ __forceinline__ u32 round_pair(u32 pair, float inverse, float d) {
  constexpr float kUnitOne = 8388608.0f;
  float values[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float scaled = __fmul_rn(fabsf(to_float(From{}, static_cast<u16>(pair >> (16 * i)))), inverse);
    const float sum = add_toward_zero(add_toward_zero(scaled, 0.5f), kUnitOne);
    values[i] = kFinite ? fmaf(d, sum, -kUnitOne * d) : d * (sum - kUnitOne);
  }
  // The sign is that of x. That of a zero no sum shows.
  return from_floats(X{}, values[0], values[1]) | (pair & 0x80008000u);
}

// Blocks [from, to) of m tokens of 16 bits to the X that the bytes of lq_formats.quantize_q8_1 would stand for, in place, by a warp: a
// block by a lane. Lanes begin with different quarters of their blocks, which lie in different banks.
template <typename From, typename X>
__device__ __forceinline__ void round_q8_1(u8* tokens, int pitch, int m, int from, int to) {
  const int lane = static_cast<int>(threadIdx.x) % 32, in_round = 32 / m;
  u8* const row = tokens + lane % m * pitch;
  if (lane / m >= in_round) return;
#pragma unroll 1
  for (int block = from + lane / m; block < to; block += in_round) {
    uint4* const words = reinterpret_cast<uint4*>(row + block * 64);
    const int turn = block >> 1;
    uint4 values[4];
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[i] = words[(i + turn) & 3];
      const u32 low = larger_of_pairs(values[i].x & 0x7FFF7FFFu, values[i].y & 0x7FFF7FFFu);
      const u32 high = larger_of_pairs(values[i].z & 0x7FFF7FFFu, values[i].w & 0x7FFF7FFFu);
      largest = larger_of_pairs(largest, larger_of_pairs(low, high));
    }
    // As integers NaN is larger than inf, and that than the rest. Where 1 / d is no number codes are 0.
    largest = max(largest & 0xFFFFu, largest >> 16);
    const float quotient = __fdiv_rn(to_float(From{}, static_cast<u16>(largest)), 127.0f), one = __fdiv_rn(1.0f, quotient);
    const float inverse = one <= 3.402823466e38f ? one : 0.0f;
    const u16 bits = float_to_half(quotient);
    const float d = half_to_float(bits);
    auto make = [&](auto finite) {
      constexpr bool kFinite = decltype(finite)::value;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        values[i].x = round_pair<From, X, kFinite>(values[i].x, inverse, d);
        values[i].y = round_pair<From, X, kFinite>(values[i].y, inverse, d);
        values[i].z = round_pair<From, X, kFinite>(values[i].z, inverse, d);
        values[i].w = round_pair<From, X, kFinite>(values[i].w, inverse, d);
      }
    };
    if ((bits & 0x7C00u) != 0x7C00u)
      make(Bool<true>{});
    else
      make(Bool<false>{});
#pragma unroll
    for (int i = 0; i < 4; ++i) words[(i + turn) & 3] = values[i];
  }
}

}  // namespace lq
