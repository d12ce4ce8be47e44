// Integers to bf16 and fp16 by bit tricks: a code is put into the mantissa of a float whose exponent makes its unit 1, and the
// offset is subtracted. No integer-to-float conversion, every result exact.
//
// Codes come in fragment order (lq_formats.layouts.FRAGMENT_INT4, FRAGMENT_INT8): what one call unpacks is the A fragment of one
// m16n8k16 (and of a wgmma k16 step): a[0] = row g, a[1] = row g + 8, a[2] = row g at k + 8, a[3] = row g + 8 at k + 8.
#pragma once

#include "lq/mma.cuh"

namespace lq {

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

__device__ __forceinline__ u32 sub2(Bf16, u32 a, u32 b) {
  u32 d;
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ __forceinline__ u32 sub2(Fp16, u32 a, u32 b) {
  u32 d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
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

// Eight unsigned int4 codes u to u - 8. bf16: 0x4300 is 128 with a unit of 1; fp16: 0x6400 is 1024 with a unit of 1.
__device__ __forceinline__ void int4_fragment(Bf16 t, u32 (&a)[4], u32 word) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = sub2(t, and_or(word >> (4 * i), 0x000f000fu, 0x43004300u), 0x43084308u);
}

__device__ __forceinline__ void int4_fragment(Fp16 t, u32 (&a)[4], u32 word) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = sub2(t, and_or(word >> (4 * i), 0x000f000fu, 0x64006400u), 0x64086408u);
}

// The same codes as they are, 0 to 15.
__device__ __forceinline__ void int4_codes(Bf16 t, u32 (&a)[4], u32 word) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = sub2(t, and_or(word >> (4 * i), 0x000f000fu, 0x43004300u), 0x43004300u);
}

__device__ __forceinline__ void int4_codes(Fp16 t, u32 (&a)[4], u32 word) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = sub2(t, and_or(word >> (4 * i), 0x000f000fu, 0x64006400u), 0x64006400u);
}

// Eight int8 codes in two words; bytes of a word are [a_i.lo, a_{i+1}.lo, a_i.hi, a_{i+1}.hi].
// bf16 has 8 bits of mantissa, enough for the low seven bits at 128 and, apart, for the sign's weight of 128.
__device__ __forceinline__ void int8_fragment(Bf16 t, u32 (&a)[4], u32 word0, u32 word1) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32 word = (i < 2 ? word0 : word1) >> (8 * (i % 2));
    a[i] = sub2(t, and_or(word, 0x007f007fu, 0x43004300u), and_or(word, 0x00800080u, 0x43004300u));
  }
}

// fp16: b ^ 0x80 is b + 128, at 0x6400 it is 1024 + 128 + b = 0x6480 + b.
__device__ __forceinline__ void int8_fragment(Fp16 t, u32 (&a)[4], u32 word0, u32 word1) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32 word = (i < 2 ? word0 : word1) >> (8 * (i % 2));
    a[i] = sub2(t, (word & 0x00ff00ffu) ^ 0x64806480u, 0x64806480u);
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
