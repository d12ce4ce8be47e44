// Tokens in Q8_1 blocks, `half d; half s; int8 q[32]`, to 16 bits in shared memory.
#pragma once

#include "lq/dequantize.cuh"

namespace lq {

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

}  // namespace lq
