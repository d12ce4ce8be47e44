// Integers to bf16 and fp16 by bit tricks, without a conversion, every result exact.
//
// - bf16: where the upper byte is zero, the number is the lower byte times 2^-133: subnormal up to 127, and the binade above goes on
//   with the same unit. So a byte, or a nibble in either half of it, is a number where it stands, and one fma scales it and subtracts
//   the offset. 2^133 is no bf16: results are a 64th.
// - fp16: a code is put into the mantissa of 1024, whose unit is 1 (16 for a nibble in the upper half), and the offset is subtracted.
//
// Codes come in fragment order (lq_formats.layouts.FRAGMENT_INT4, FRAGMENT_INT8): what one call unpacks is the A fragment of one
// m16n8k16 (and of a wgmma k16 step): a[0] = row g, a[1] = row g + 8, a[2] = row g at k + 8, a[3] = row g + 8 at k + 8.
#pragma once

#include "lq/mma.cuh"

namespace lq {

template <typename A, typename B>
constexpr bool kSame = false;
template <typename A>
constexpr bool kSame<A, A> = true;

struct Bf16 {
  using Bits = u16;
};
struct Fp16 {
  using Bits = u16;
};
struct Fp32 {
  using Bits = float;
};

// (a & b) | c
__device__ __forceinline__ u32 and_or(u32 a, u32 b, u32 c) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// (a & b) ^ c; from C the compiler makes two instructions of it.
__device__ __forceinline__ u32 and_xor(u32 a, u32 b, u32 c) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ __forceinline__ u32 sub2(Fp16, u32 a, u32 b) {
  u32 d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ __forceinline__ u32 add2(Bf16, u32 a, u32 b) {
  u32 d;
  asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ __forceinline__ u32 add2(Fp16, u32 a, u32 b) {
  u32 d;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ __forceinline__ u32 mul2(Bf16, u32 a, u32 b) {
  u32 d;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ __forceinline__ u32 mul2(Fp16, u32 a, u32 b) {
  u32 d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// The larger of each pair of unsigned halves (sm_90).
__device__ __forceinline__ u32 larger_of_pairs(u32 a, u32 b) {
  u32 d;
  asm("max.u16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// a * b + c, rounded once.
__device__ __forceinline__ u32 fma2(Bf16, u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ __forceinline__ u32 fma2(Fp16, u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// What the results of int4_fragment and int8_fragment are to be multiplied by.
__device__ constexpr float fragment_unit(Bf16) { return 64.0f; }
__device__ constexpr float fragment_unit(Fp16) { return 1.0f; }

// Eight unsigned int4 codes in their places: rows g in the lower half of a byte, rows g + 8 in the upper.
__device__ __forceinline__ void int4_places(u32 (&a)[4], u32 word) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = word >> (i / 2 * 8) & (i % 2 ? 0x00f000f0u : 0x000f000fu);
}

// Eight unsigned int4 codes u to (u - 8) / unit. bf16: times 2^127 or 2^123, less 1 / 8.
__device__ __forceinline__ void int4_fragment(Bf16 t, u32 (&a)[4], u32 word) {
  int4_places(a, word);
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = fma2(t, a[i], i % 2 ? 0x7d007d00u : 0x7f007f00u, 0xbe00be00u);
}

// fp16: less 1032, or a 16th less 72.
__device__ __forceinline__ void int4_fragment(Fp16 t, u32 (&a)[4], u32 word) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32 bits = and_or(word >> (i / 2 * 8), i % 2 ? 0x00f000f0u : 0x000f000fu, 0x64006400u);
    a[i] = i % 2 ? fma2(t, bits, 0x2c002c00u, 0xd480d480u) : sub2(t, bits, 0x64086408u);
  }
}

// What the results of int4_fragment with zeros are to be multiplied by.
__device__ constexpr float zero_unit(Bf16) { return 64.0f; }
__device__ constexpr float zero_unit(Fp16) { return 512.0f; }

// A pair of zeros to what int4_fragment adds: -zero / unit, exact unless it is subnormal.
__device__ __forceinline__ u32 less_zero(Bf16 t, u32 pair) { return mul2(t, pair, 0xbc80bc80u); }  // -1 / 64
__device__ __forceinline__ u32 less_zero(Fp16 t, u32 pair) { return mul2(t, pair, 0x98009800u); }  // -1 / 512

// Eight unsigned int4 codes u to (u - zero) / unit, rounded once: exact where zeros are integers. less[r] is less_zero of rows g + 8 r,
// twice. bf16: as above. fp16 likewise: a code where it stands is subnormal, times 2^-24, and is multiplied by 2^15 or 2^11.
__device__ __forceinline__ void int4_fragment(Bf16 t, u32 (&a)[4], u32 word, const u32 (&less)[2]) {
  int4_places(a, word);
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = fma2(t, a[i], i % 2 ? 0x7d007d00u : 0x7f007f00u, less[i % 2]);
}

__device__ __forceinline__ void int4_fragment(Fp16 t, u32 (&a)[4], u32 word, const u32 (&less)[2]) {
  int4_places(a, word);
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = fma2(t, a[i], i % 2 ? 0x68006800u : 0x78007800u, less[i % 2]);
}

// Eight int8 codes b in their places, as b + 128.
__device__ __forceinline__ void int8_places(u32 (&a)[4], u32 word0, u32 word1) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = and_xor((i < 2 ? word0 : word1) >> (8 * (i % 2)), 0x00ff00ffu, 0x00800080u);
}

// Eight int8 codes b in two words, to b / unit; bytes of a word are [a_i.lo, a_{i+1}.lo, a_i.hi, a_{i+1}.hi].
// bf16: b ^ 0x80 is b + 128; times 2^127, less 2.
__device__ __forceinline__ void int8_fragment(Bf16 t, u32 (&a)[4], u32 word0, u32 word1) {
  int8_places(a, word0, word1);
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = fma2(t, a[i], 0x7f007f00u, 0xc000c000u);
}

// fp16: b ^ 0x80 is b + 128, at 0x6400 it is 1024 + 128 + b = 0x6480 + b.
__device__ __forceinline__ void int8_fragment(Fp16 t, u32 (&a)[4], u32 word0, u32 word1) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32 word = (i < 2 ? word0 : word1) >> (8 * (i % 2));
    a[i] = sub2(t, and_xor(word, 0x00ff00ffu, 0x64806480u), 0x64806480u);
  }
}

__device__ __forceinline__ float to_float(Bf16, u16 bits) { return __uint_as_float(static_cast<u32>(bits) << 16); }
__device__ __forceinline__ float to_float(Fp16, u16 bits) { return half_to_float(bits); }
__device__ __forceinline__ float to_float(Fp32, float value) { return value; }

// The pair (1, 1).
__device__ __forceinline__ u32 ones2(Bf16) { return 0x3f803f80u; }
__device__ __forceinline__ u32 ones2(Fp16) { return 0x3c003c00u; }

// Round to nearest even.
__device__ __forceinline__ u16 from_float(Fp16, float value) { return float_to_half(value); }
__device__ __forceinline__ u16 from_float(Bf16, float value) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// Two of them: `low` in the low half.
__device__ __forceinline__ u32 from_floats(Bf16, float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ u32 from_floats(Fp16, float low, float high) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// What makes a scaled fragment that of codes less a zero: (8 - zero) * scale / unit of two rows, rounded once.
__device__ __forceinline__ u32 fragment_offset(Bf16 t, u32 zeros, u32 scales) {
  return fma2(t, zeros, mul2(t, scales, 0xbc80bc80u), mul2(t, scales, 0x3e003e00u));  // -1 / 64, 1 / 8
}

__device__ __forceinline__ u32 fragment_offset(Fp16 t, u32 zeros, u32 scales) {
  return fma2(t, zeros, mul2(t, scales, 0xbc00bc00u), mul2(t, scales, 0x48004800u));  // -1, 8
}

// The same as floats, not rounded.
template <typename T>
__device__ __forceinline__ float2 fragment_offset(T, float2 zeros, float2 scales) {
  constexpr float kPart = 1.0f / fragment_unit(T{});
  return {(8.0f - zeros.x) * scales.x * kPart, (8.0f - zeros.y) * scales.y * kPart};
}

// The same of a weight with a minimum, code * scale + minimum: (minimum + 8 * scale) / unit.
__device__ __forceinline__ u32 fragment_minimum(Bf16 t, u32 minima, u32 scales) {
  return fma2(t, scales, 0x3e003e00u, mul2(t, minima, 0x3c803c80u));  // 1 / 8, 1 / 64
}

__device__ __forceinline__ u32 fragment_minimum(Fp16 t, u32 minima, u32 scales) { return fma2(t, scales, 0x48004800u, minima); }  // 8

template <typename T>
__device__ __forceinline__ float2 fragment_minimum(T, float2 minima, float2 scales) {
  constexpr float kPart = 1.0f / fragment_unit(T{});
  return {fmaf(8.0f, scales.x, minima.x) * kPart, fmaf(8.0f, scales.y, minima.y) * kPart};
}

// D += A (16 x 16) * B (16 x 8), fp32 sums; fragments as in mma.cuh with pairs of k instead of fours.
__device__ __forceinline__ void mma_k16(Bf16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_k16(Fp16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// D = A * B: the first of a sum, which clears nothing.
__device__ __forceinline__ void mma_k16_first(Bf16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

__device__ __forceinline__ void mma_k16_first(Fp16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

// A float as the sum of two tf32, to 2^-22 of it; inf and NaN as the first.
__device__ __forceinline__ void split_tf32(u32& high, u32& low, float value) {
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(high) : "f"(value));
  const float first = __uint_as_float(high);
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(low) : "f"(value == first ? 0.0f : value - first));
}

// D += A (16 x 4) * B (4 x 8), nearly as in fp32: a[i] of row g + 8 i and column t, b of row t and column g, where g is the lane's
// quotient by 4 and t the rest. Products of the lower halves of both are left out.
__device__ __forceinline__ void mma_k4_fp32(float (&d)[4], const float (&a)[2], float b) {
  u32 high[2], low[2], high_b, low_b;
  split_tf32(high[0], low[0], a[0]);
  split_tf32(high[1], low[1], a[1]);
  split_tf32(high_b, low_b, b);
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%8}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(high[0]), "r"(high[1]), "r"(low[0]), "r"(low[1]), "r"(high_b));
  asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(high[0]), "r"(high[1]), "r"(low_b));
}

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8. The compiler may move it, so the
// address must depend on whatever says that the data is there (see order_after).
__device__ __forceinline__ void load_matrix_x4(u32 (&r)[4], u32 address) {
  asm("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
      : "r"(address));
}

// Two values as they lie together in shared memory, in place: the compiler does not move it.
template <typename T>
__device__ __forceinline__ void load_pair(float (&to)[2], u32 address) {
  if constexpr (sizeof(typename T::Bits) == 2) {
    u32 pair;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(address) : "memory");
    to[0] = to_float(T{}, static_cast<u16>(pair));
    to[1] = to_float(T{}, static_cast<u16>(pair >> 16));
  } else {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(to[0]), "=f"(to[1]) : "r"(address) : "memory");
  }
}

// Makes everything computed from `value` follow what comes before.
__device__ __forceinline__ void order_after(u32& value) { asm volatile("" : "+r"(value)::"memory"); }

}  // namespace lq
