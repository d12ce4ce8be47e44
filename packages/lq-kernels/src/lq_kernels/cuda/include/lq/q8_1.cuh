// Tokens quantized as ggml's Q8_1 blocks are, in the order in which decode_a16 reads them.
//
// Of each 8 tokens, and 128 in features of them (a step): two times the codes of 64 in features, token by token; then four floats a token,
// the d of its blocks. Of 64 codes a lane t of four has 16 consecutive bytes, a word for each 16 in features: the columns of an
// m16n8k32 of int8 that it holds, as int4 weights in fragment order have them, 2 t, 2 t + 8, 2 t + 1 and 2 t + 9.
#pragma once

#include "lq/dequantize.cuh"

namespace lq {

constexpr int kQ8_1StepBytes = 144;  // of a token
constexpr int kQ8_1StepHalves = 8;   // of blocks, of 16 in features each

// Where half a block lies in a step of some tokens, from a token's first codes and first float on.
struct Q8_1Place {
  int codes, scale;
  bool first;  // of a block's halves

  __device__ __forceinline__ Q8_1Place(int half, int tokens)
      : codes(half / 4 * tokens * 64 + half % 4 * 4), scale(tokens * 128 + half / 2 * 4), first(half % 2 == 0) {}
};

// Half a block.
struct Q8_1Fragment {
  u32 words[4];  // by lane
  float d;       // of the block

  __device__ __forceinline__ void store(u8* step, int token, const Q8_1Place& place) const {
    u8* const codes = step + token * 64 + place.codes;
#pragma unroll
    for (int t = 0; t < 4; ++t) *reinterpret_cast<u32*>(codes + t * 16) = words[t];
    if (place.first) *reinterpret_cast<float*>(step + token * 16 + place.scale) = d;
  }
};

// a + b, toward zero.
__device__ __forceinline__ float add_toward_zero(float a, float b) {
  float sum;
  asm("add.rz.f32 %0, %1, %2;" : "=f"(sum) : "f"(a), "f"(b));
  return sum;
}

// Bytes of a and b by kSelector's nibbles, or, where a nibble is 8 more, the sign of such a byte in all its bits.
template <u32 kSelector>
__device__ __forceinline__ u32 permute(u32 a, u32 b) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "n"(kSelector));
  return d;
}

// 16 elements of x, half a block; the next lane, or the one before, has the other half.
template <typename From>
struct Q8_1Half {
  static constexpr int kElement = static_cast<int>(sizeof(typename From::Bits));  // bytes
  static constexpr bool kPairs = kElement == 2;
  u32 words[4 * kElement];

  __device__ __forceinline__ void load(const u8* from) {
#pragma unroll
    for (int i = 0; i < kElement; ++i) {
      const uint4 four = reinterpret_cast<const uint4*>(from)[i];
      words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
    }
  }

  // The codes and d of lq_formats.quantize_q8_1. Every lane of the warp takes part. Where d is not finite codes are anything: a product
  // with such a d is NaN.
  __device__ __forceinline__ Q8_1Fragment quantize() const {
    constexpr float kHalves = 4194304.5f;  // 2^22 + .5, whose unit is .5
    // As integers NaN is larger than inf, and that than the rest. Where 1 / d is no number codes are 0.
    const float quotient = __fdiv_rn(largest(), 127.0f), one = __fdiv_rn(1.0f, quotient);
    const float inverse = one <= 3.402823466e38f ? one : 0.0f;
    Q8_1Fragment made;
    made.d = half_to_float(float_to_half(quotient));
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      u32 bytes[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // |x| / d is rounded once, and then half away from zero: that is |x| / d + .5 without its fraction. The last byte of the sum
        // is its integer, of 7 bits, and a bit of the fraction.
        const float scaled = __fmul_rn(fabsf(element(2 * t + i / 2 + i % 2 * 8)), inverse);
        bytes[i] = __float_as_uint(add_toward_zero(scaled, kHalves));
      }
      const u32 sizes = permute<0x5410>(permute<0x0040>(bytes[0], bytes[1]), permute<0x0040>(bytes[2], bytes[3])), sign = signs(t);
      const u32 flipped = and_xor(sizes >> 1, 0x7f7f7f7fu, sign);  // and 1 more, where the sign is set, in each byte
      made.words[t] = ((flipped & 0x7f7f7f7fu) + (sign & 0x01010101u)) ^ (flipped & 0x80808080u);
    }
    return made;
  }

  __device__ __forceinline__ float element(int i) const {
    if constexpr (kPairs)
      return to_float(From{}, static_cast<u16>(words[i / 2] >> (16 * (i % 2))));
    else
      return __uint_as_float(words[i]);
  }

  // 0xFF for each negative number of a lane's word.
  __device__ __forceinline__ u32 signs(int t) const {
    if constexpr (kPairs)
      return permute<0xfbd9>(words[t], words[4 + t]);
    else
      return permute<0x5410>(permute<0x00fb>(words[2 * t], words[2 * t + 8]), permute<0x00fb>(words[2 * t + 1], words[2 * t + 9]));
  }

  // The largest |x| of the block.
  __device__ __forceinline__ float largest() const {
    constexpr u32 kAll = 0xffffffffu, kMask = kPairs ? 0x7fff7fffu : 0x7fffffffu;
    u32 most = 0;
#pragma unroll
    for (const u32 word : words) most = kPairs ? larger_of_pairs(most, word & kMask) : max(most, word & kMask);
    const u32 other = static_cast<u32>(__shfl_xor_sync(kAll, static_cast<int>(most), 1));
    if constexpr (kPairs) {
      most = larger_of_pairs(most, other);
      return to_float(From{}, static_cast<u16>(max(most & 0xffffu, most >> 16)));
    } else {
      return __uint_as_float(max(most, other));
    }
  }
};

}  // namespace lq
