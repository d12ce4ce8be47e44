// Warp-level building blocks shared by lq's CUDA kernels. Header-free: only what NVRTC knows by itself.
#pragma once

namespace lq {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;

// fp16 bits to float, exact.
__device__ __forceinline__ float half_to_float(u16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// float to fp16 bits, round to nearest even.
__device__ __forceinline__ u16 float_to_half(float value) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// The bit pattern of 12582912.0f (1.5 * 2^23): an integer in [-2^22, 2^22) added to it, read as a float, is 12582912 + integer.
constexpr int kMagicBits = 0x4B400000;
constexpr float kMagic = 12582912.0f;

// D = A (16 x 32, s8) * B (32 x 8, s8) + magic. Lane = 4 g + t holds
//   a0: row g,     k 4t..4t+3       b0: column g, k 4t..4t+3       d0, d1: row g,     columns 2t, 2t+1
//   a1: row g + 8, k 4t..4t+3       b1: column g, k 16+4t..        d2, d3: row g + 8, columns 2t, 2t+1
//   a2: row g,     k 16+4t..16+4t+3
//   a3: row g + 8, k 16+4t..
__device__ __forceinline__ void mma_s8_magic(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const u32 (&magic)[4]) {
  int r0, r1, r2, r3;
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(magic[0]), "r"(magic[1]), "r"(magic[2]), "r"(magic[3]));
  d[0] = __int_as_float(r0);
  d[1] = __int_as_float(r1);
  d[2] = __int_as_float(r2);
  d[3] = __int_as_float(r3);
}

// The same; who has the magic in registers passes it, where the compiler would make it anew for every product.
__device__ __forceinline__ void mma_s8_magic(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  mma_s8_magic(d, a, b, {kMagicBits, kMagicBits, kMagicBits, kMagicBits});
}

// Copy 16 bytes from global to shared memory asynchronously; the bytes are zeros where `valid` is false.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  u32 address = static_cast<u32>(__cvta_generic_to_shared(shared));
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace lq
