// wgmma with the A operand in registers: D (64 x kColumns, fp32) += A (64 x 16) * B (16 x kColumns), B in shared memory.
//
// Warp i of a warpgroup holds rows 16 i to 16 i + 15 of A and D. Within it lane 4 g + t holds of A what mma_k16 takes (a[0] = row g,
// a[1] = row g + 8, a[2] and a[3] the same at k + 8), and of D, for every 8 columns j: d[4 j], d[4 j + 1] = row g, columns 8 j + 2 t
// and + 1; d[4 j + 2], d[4 j + 3] = row g + 8.
//
// The instruction runs on while the program continues. Until wgmma_wait says that it is complete, D is undefined. A's registers are
// not ours to watch: ptxas gives them away only where a wait proves that the wgmma is done.
//
// There is the one instruction that the source which includes this asks for, with LQ_TOKENS columns and A and B of LQ_X: NVRTC parses one
// program at a time, and the asm of all of them takes long to parse.
#pragma once

#include "lq/dequantize.cuh"
#include "lq/hopper.cuh"

namespace lq {

// Descriptor of a B operand that a tensor copy with 128-byte swizzle wrote: columns of 64 elements of 16 bits (128 bytes, k
// contiguous), 8 columns in 1024 bytes. `address` is a multiple of 1024, plus 32 bytes for every k16 step.
__device__ __forceinline__ u64 swizzled_descriptor(u32 address) {
  constexpr u64 kSwizzle128 = 1, kStride = 1024 / 16;
  return kSwizzle128 << 62 | kStride << 32 | 1ull << 16 | (address & 0x3ffff) >> 4;
}

// Registers written before are read by the wgmmas after.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a group of wgmmas.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending groups are not complete.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving sums from register to register across this point. To be put before the first wgmma and after the last
// wait: it does not see that they are written in between.
template <int kSums>
__device__ __forceinline__ void pin_sums(float (&d)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int kColumns>
struct Wgmma;

#define LQ_LIST_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define LQ_LIST_16 LQ_LIST_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define LQ_LIST_32 LQ_LIST_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LQ_LIST_48 LQ_LIST_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define LQ_LIST_56 LQ_LIST_48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define LQ_LIST_64                                                                              \
  LQ_LIST_32                                                                                    \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54" \
  ",%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define LQ_LIST_88                                                                              \
  LQ_LIST_64                                                                                    \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86" \
  ",%87"
#define LQ_LIST_96                                                                             \
  LQ_LIST_64                                                                                   \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"                            \
  ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define LQ_LIST_128                                                                                \
  LQ_LIST_64                                                                                       \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86"    \
  ",%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107" \
  ",%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

#define LQ_SUMS_8(d, i)                                                                                                   \
  "+f"(d[(i)]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3]), "+f"(d[(i) + 4]), "+f"(d[(i) + 5]), "+f"(d[(i) + 6]), \
      "+f"(d[(i) + 7])
#define LQ_SUMS_16(d, i) LQ_SUMS_8(d, i), LQ_SUMS_8(d, (i) + 8)
#define LQ_SUMS_32(d, i) LQ_SUMS_16(d, i), LQ_SUMS_16(d, (i) + 16)
#define LQ_SUMS_48(d, i) LQ_SUMS_32(d, i), LQ_SUMS_16(d, (i) + 32)
#define LQ_SUMS_56(d, i) LQ_SUMS_48(d, i), LQ_SUMS_8(d, (i) + 48)
#define LQ_SUMS_64(d, i) LQ_SUMS_32(d, i), LQ_SUMS_32(d, (i) + 32)
#define LQ_SUMS_88(d, i) LQ_SUMS_64(d, i), LQ_SUMS_16(d, (i) + 64), LQ_SUMS_8(d, (i) + 80)
#define LQ_SUMS_96(d, i) LQ_SUMS_64(d, i), LQ_SUMS_32(d, (i) + 64)
#define LQ_SUMS_128(d, i) LQ_SUMS_64(d, i), LQ_SUMS_64(d, (i) + 64)

// A0 to ADD: the numbers of the operands that follow the sums. `add` says that D is added to; otherwise it is overwritten.
#define LQ_WGMMA(COLUMNS, SUMS, A0, A1, A2, A3, B, ADD)                                                                       \
  template <>                                                                                                                 \
  struct Wgmma<COLUMNS> {                                                                                                     \
    static __device__ __forceinline__ void run(LQ_X, float(&d)[SUMS], const u32(&a)[4], u64 b, int add) {                     \
      asm volatile("{ .reg .pred add; setp.ne.s32 add, %" #ADD ", 0;\n"                                                       \
                   "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." LQ_PTX(LQ_X) "." LQ_PTX(LQ_X) " {" LQ_LIST_##SUMS  \
                   "}, {%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #B ", add, 1, 1, 0; }"                                       \
                   : LQ_SUMS_##SUMS(d, 0)                                                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                           \
    }                                                                                                                         \
  };
#define LQ_PTX_Bf16 "bf16"
#define LQ_PTX_Fp16 "f16"
#define LQ_PTX(TYPE) LQ_PTX_OF(TYPE)
#define LQ_PTX_OF(TYPE) LQ_PTX_##TYPE

#define LQ_WGMMA_16 LQ_WGMMA(16, 8, 8, 9, 10, 11, 12, 13)
#define LQ_WGMMA_32 LQ_WGMMA(32, 16, 16, 17, 18, 19, 20, 21)
#define LQ_WGMMA_64 LQ_WGMMA(64, 32, 32, 33, 34, 35, 36, 37)
#define LQ_WGMMA_96 LQ_WGMMA(96, 48, 48, 49, 50, 51, 52, 53)
#define LQ_WGMMA_112 LQ_WGMMA(112, 56, 56, 57, 58, 59, 60, 61)
#define LQ_WGMMA_128 LQ_WGMMA(128, 64, 64, 65, 66, 67, 68, 69)
#define LQ_WGMMA_176 LQ_WGMMA(176, 88, 88, 89, 90, 91, 92, 93)
#define LQ_WGMMA_192 LQ_WGMMA(192, 96, 96, 97, 98, 99, 100, 101)
#define LQ_WGMMA_256 LQ_WGMMA(256, 128, 128, 129, 130, 131, 132, 133)
#define LQ_WGMMA_COLUMNS(COLUMNS) LQ_WGMMA_OF(COLUMNS)
#define LQ_WGMMA_OF(COLUMNS) LQ_WGMMA_##COLUMNS

#if defined(LQ_TOKENS) && defined(LQ_X)
LQ_WGMMA_COLUMNS(LQ_TOKENS)
#endif

// Four 8 x 8 matrices of 16-bit elements from registers to shared memory, transposed. Register i holds of matrix i row lane / 4,
// columns 2 (lane % 4) and + 1; lane 8 i + j gives the address of the 16 bytes that take its column j.
__device__ __forceinline__ void store_matrix_x4_transposed(u32 address, const u32 (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]),
               "r"(r[3])
               : "memory");
}

}  // namespace lq
