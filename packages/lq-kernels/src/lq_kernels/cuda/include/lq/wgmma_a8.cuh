// wgmma with operands of 8 bits: D (64 x kColumns) += A (64 x 32) * B (32 x kColumns), int8 with s32 sums or e4m3 with fp32 sums.
//
// Both operands have k contiguous. B, and A where it is in shared memory, are rows of 128 bytes in the 128-byte swizzle, as a tensor
// copy writes them; swizzled_descriptor describes them, plus 32 bytes for every k32 step. A from registers: warp i of a warpgroup holds
// rows 16 i to 16 i + 15, lane 4 g + t of it four bytes of k in each register (byte b is k + b):
//   a[0] = row g, k = 4 t    a[1] = row g + 8, k = 4 t    a[2] = row g, k = 16 + 4 t    a[3] = row g + 8, k = 16 + 4 t
// D as in wgmma.cuh: d[4 j], d[4 j + 1] = row g, columns 8 j + 2 t and + 1; d[4 j + 2], d[4 j + 3] = row g + 8.
//
// Sums of e4m3 are not quite fp32: before they are added, the products of a k32 step and the sum so far are cut to about 13 bits below
// the largest exponent among them (measured by others, not documented). So an error grows with the sum; where that matters, sums of a
// few steps are added up elsewhere. s32 sums are exact.
#pragma once

#include "lq/wgmma.cuh"

namespace lq {

struct Int8 {
  using Sum = int;
};
struct Fp8 {
  using Sum = float;
};

template <int kSums>
__device__ __forceinline__ void pin_sums(int (&d)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// Codes of int4 in fragment order for 8 bits (lq_formats.layouts.FRAGMENT_A8_INT8, FRAGMENT_A8_FP8): a word is two registers of A, rows
// g and g + 8.

// Two's complement nibbles to int8, 16 times the code.
template <bool kLowest>
__device__ __forceinline__ void int4_rows(Int8, u32& low, u32& high, u32 word) {
  low = word << 4 & 0xf0f0f0f0u;
  high = word & 0xf0f0f0f0u;
}

// Sign and magnitude to e4m3: a magnitude is the mantissa of a subnormal, so its unit is 2^-9. The sign of the high row's byte b is in
// byte b + 1, where a rotation by a nibble finds it. Minus zero stands for -8 (kLowest: there are such codes), the least normal number.
template <bool kLowest>
__device__ __forceinline__ void int4_rows(Fp8, u32& low, u32& high, u32 word) {
  low = word & 0x87878787u;
  high = __funnelshift_r(word, word, 4) & 0x87878787u;
  if constexpr (kLowest) {
    // Bit 3 where the sign is set and no bit of the magnitude is: adding 7 carries into it from any.
    low |= low >> 4 & ~(low + 0x07070707u) & 0x08080808u;
    high |= high >> 4 & ~(high + 0x07070707u) & 0x08080808u;
  }
}

// What the units above are worth.
__device__ __forceinline__ constexpr float int4_unit(Int8) { return 1.0f / 16; }
__device__ __forceinline__ constexpr float int4_unit(Fp8) { return 512.0f; }

template <int kColumns>
struct WgmmaA8;

#define LQ_INTS_8(d, i)                                                                                                   \
  "+r"(d[(i)]), "+r"(d[(i) + 1]), "+r"(d[(i) + 2]), "+r"(d[(i) + 3]), "+r"(d[(i) + 4]), "+r"(d[(i) + 5]), "+r"(d[(i) + 6]), \
      "+r"(d[(i) + 7])
#define LQ_INTS_16(d, i) LQ_INTS_8(d, i), LQ_INTS_8(d, (i) + 8)
#define LQ_INTS_32(d, i) LQ_INTS_16(d, i), LQ_INTS_16(d, (i) + 16)
#define LQ_INTS_64(d, i) LQ_INTS_32(d, i), LQ_INTS_32(d, (i) + 32)
#define LQ_INTS_96(d, i) LQ_INTS_64(d, i), LQ_INTS_32(d, (i) + 64)
#define LQ_INTS_128(d, i) LQ_INTS_64(d, i), LQ_INTS_64(d, (i) + 64)

// P0 to P5: the numbers of the operands that follow the sums. `add` says that D is added to; otherwise it is overwritten.
#define LQ_WGMMA_A8_TYPE(COLUMNS, SUMS, TYPE, LIST, PTX, SCALES, P0, P1, P2, P3, P4, P5)                                             \
  static __device__ __forceinline__ void run(TYPE, TYPE::Sum(&d)[SUMS], const u32(&a)[4], u64 b, int add) {                         \
    asm volatile("{ .reg .pred add; setp.ne.s32 add, %" #P5 ", 0;\n"                                                                \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k32." PTX " {" LQ_LIST_##SUMS "}, {%" #P0 ",%" #P1 ",%" #P2 ",%" #P3 \
                 "}, %" #P4 ", add" SCALES "; }"                                                                                    \
                 : LIST(d, 0)                                                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                                   \
  }                                                                                                                                 \
  static __device__ __forceinline__ void run(TYPE, TYPE::Sum(&d)[SUMS], u64 a, u64 b, int add) {                                    \
    asm volatile("{ .reg .pred add; setp.ne.s32 add, %" #P2 ", 0;\n"                                                                \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k32." PTX " {" LQ_LIST_##SUMS "}, %" #P0 ", %" #P1 ", add" SCALES    \
                 "; }"                                                                                                              \
                 : LIST(d, 0)                                                                                                       \
                 : "l"(a), "l"(b), "r"(add));                                                                                       \
  }
#define LQ_WGMMA_A8_Int8(COLUMNS, SUMS, ...) \
  LQ_WGMMA_A8_TYPE(COLUMNS, SUMS, Int8, LQ_INTS_##SUMS, "s32.s8.s8", "", __VA_ARGS__)
#define LQ_WGMMA_A8_Fp8(COLUMNS, SUMS, ...) \
  LQ_WGMMA_A8_TYPE(COLUMNS, SUMS, Fp8, LQ_SUMS_##SUMS, "f32.e4m3.e4m3", ", 1, 1", __VA_ARGS__)
#define LQ_WGMMA_A8_STRUCT(CODES, COLUMNS, ...)      \
  template <>                                        \
  struct WgmmaA8<COLUMNS> {                          \
    LQ_WGMMA_A8_##CODES(COLUMNS, __VA_ARGS__)        \
  };
#define LQ_WGMMA_A8(CODES, ...) LQ_WGMMA_A8_STRUCT(CODES, __VA_ARGS__)

#define LQ_WGMMA_A8_16 16, 8, 8, 9, 10, 11, 12, 13
#define LQ_WGMMA_A8_32 32, 16, 16, 17, 18, 19, 20, 21
#define LQ_WGMMA_A8_64 64, 32, 32, 33, 34, 35, 36, 37
#define LQ_WGMMA_A8_128 128, 64, 64, 65, 66, 67, 68, 69
#define LQ_WGMMA_A8_192 192, 96, 96, 97, 98, 99, 100, 101
#define LQ_WGMMA_A8_256 256, 128, 128, 129, 130, 131, 132, 133
#define LQ_WGMMA_A8_COLUMNS(COLUMNS) LQ_WGMMA_A8_OF(COLUMNS)
#define LQ_WGMMA_A8_OF(COLUMNS) LQ_WGMMA_A8_##COLUMNS

// As in wgmma.cuh, the instructions that the source asks for.
#if defined(LQ_TOKENS) && defined(LQ_CODES)
LQ_WGMMA_A8(LQ_CODES, LQ_WGMMA_A8_COLUMNS(LQ_TOKENS))
#endif

}  // namespace lq
