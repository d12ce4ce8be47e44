// What CUDA kernels of this package find on the host, where g++ compiles them: CUDA's keywords, types and functions, and one function for
// every PTX instruction that translate.py knows. device.cpp runs them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct Index3 { unsigned x, y, z; };
extern Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace host {

using u16 = uint16_t;
using u32 = uint32_t;
using u64 = unsigned long long;

[[noreturn]] void fail(const char* reason);
unsigned char* shared_memory();  // of the CTA that runs

// A matrix in global memory: what the launcher's tensor maps are here. The pitch and an element are in bytes.
struct Matrix {
  u64 magic;
  unsigned char* address;
  long long rows, columns, element, pitch, box_rows, box_columns;
};

// ---- numbers ----

float half_to_float(u16 bits);
u16 float_to_half(float value);
double bf16_to_double(u16 bits);
u16 double_to_bf16(double value, double rest);  // value + rest, rounded once
double half_to_double(u16 bits);
u16 double_to_half(double value, double rest);
float add_toward_zero(float a, float b);
u32 to_tf32(float value);
u16 to_e4m3x2(float high, float low);

// ---- one CTA's threads ----

u32 meet_any(u32 value);
u32 meet_or(u32 value);
u32 meet_max(u32 value);
u32 meet_from(u32 value, int lane);
void meet();
void barrier(int id, int threads);  // id 0 and no threads: all
bool elect();
u32 shared_address(const void* pointer);

// ---- PTX, in the order of its manual; see translate.py for the instructions ----

inline void nothing() {}
template <typename T>
void nothing(T&&...) {}
inline void lop3_and_or(u32& d, u32 a, u32 b, u32 c) { d = (a & b) | c; }
inline void lop3_and_xor(u32& d, u32 a, u32 b, u32 c) { d = (a & b) ^ c; }
inline void max_u16x2(u32& d, u32 a, u32 b) { d = std::max(a & 0xffff, b & 0xffff) | std::max(a >> 16, b >> 16) << 16; }
inline void prmt(u32& d, u32 a, u32 b, u32 selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 which = selector >> (4 * i) & 15;
    u32 byte = static_cast<u32>(bytes >> (8 * (which & 7)) & 0xff);
    if (which & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  d = result;
}
void add_f16x2(u32& d, u32 a, u32 b);
void sub_f16x2(u32& d, u32 a, u32 b);
void mul_f16x2(u32& d, u32 a, u32 b);
void fma_f16x2(u32& d, u32 a, u32 b, u32 c);
void add_bf16x2(u32& d, u32 a, u32 b);
void mul_bf16x2(u32& d, u32 a, u32 b);
void fma_bf16x2(u32& d, u32 a, u32 b, u32 c);
inline void add_rz_f32(float& d, float a, float b) { d = add_toward_zero(a, b); }
inline void cvt_f32_f16(float& d, u16 bits) { d = half_to_float(bits); }
inline void cvt_f16_f32(u16& d, float value) { d = float_to_half(value); }
inline void cvt_bf16_f32(u16& d, float value) { d = double_to_bf16(value, 0); }
inline void cvt_bf16x2_f32(u32& d, float high, float low) { d = double_to_bf16(low, 0) | u32{double_to_bf16(high, 0)} << 16; }
inline void cvt_f16x2_f32(u32& d, float high, float low) { d = float_to_half(low) | u32{float_to_half(high)} << 16; }
inline void cvt_tf32_f32(u32& d, float value) { d = to_tf32(value); }
inline void cvt_e4m3x2_f32(u16& d, float high, float low) { d = to_e4m3x2(high, low); }

void cluster_ctarank(u32& d);
void cluster_nctarank(u32& d);
void mapa(u32& d, u32 address, u32 rank);
inline void elect_sync(u32& d) { d = elect(); }
void barrier_arrive(int id, int threads);
inline void barrier_all_of_id(int id, int threads) { barrier(id, threads); }
inline void barrier_15(int threads) { barrier(15, threads); }
void cluster_arrive();
void cluster_wait();

void ld_shared_u32(u32& d, u32 address);
void ld_shared_f32(float& d, u32 address);
void ld_shared_v2_f32(float& d0, float& d1, u32 address);
void ld_shared_v4_u32(u32& d0, u32& d1, u32& d2, u32& d3, u32 address);
void atom_add(int& before, int* to, int value);
void ldmatrix_x4(u32& d0, u32& d1, u32& d2, u32& d3, u32 address);
void ldmatrix_x4_trans(u32& d0, u32& d1, u32& d2, u32& d3, u32 address);
void stmatrix_x4_trans(u32 address, u32 a0, u32 a1, u32 a2, u32 a3);
void stmatrix_x2_trans(u32 address, u32 a0, u32 a1);

void cp_async_16(u32 to, const void* from, int bytes);
void cp_async_commit();
void cp_async_wait(int pending);

void mbarrier_init(u32 address, u32 arrivals);
void mbarrier_arrive(u32 address);
void mbarrier_arrive_expect(u32 address, u32 bytes);
void mbarrier_arrive_remote(u32 address, u32 rank);
void mbarrier_wait(u32 address, u32 parity);

inline void create_policy(u64& policy) { policy = 0; }
inline void clock_now(u32& now) {
  static u32 clocks;
  now = clocks += 1 << 16;
}
void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier, u64 policy);
void tensor_copy(u32 to, const void* map, int x, int y, u32 barrier, u64 policy);
void tensor_copy_multicast(u32 to, const void* map, int x, int y, u32 barrier, u16 mask, u64 policy);
void tensor_store(const void* map, int x, int y, u32 from);
void bulk_commit();
void bulk_wait_read(int pending);
void st_async_v2(u32 to, float x, float y, u32 barrier);
void st_async_v4(u32 to, float x, float y, float z, float w, u32 barrier);

void mma_s8(int& d0, int& d1, int& d2, int& d3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, u32 c0, u32 c1, u32 c2, u32 c3);
enum class Type { kBf16, kF16, kTf32, kS8, kE4m3 };
// D = A B + C of 16 x kK, kK x 8; registers of A and B one after the other.
void mma(Type type, int k, float* d, const u32* a, const u32* b, const float (&c)[4]);

template <Type kType>
void mma_k16(float& d0, float& d1, float& d2, float& d3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const u32 a[] = {a0, a1, a2, a3}, b[] = {b0, b1};
  float d[4];
  mma(kType, 16, d, a, b, {d0, d1, d2, d3});
  d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
}
template <Type kType>
void mma_k16_of(float& d0, float& d1, float& d2, float& d3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, float c) {
  d0 = d1 = d2 = d3 = c;
  mma_k16<kType>(d0, d1, d2, d3, a0, a1, a2, a3, b0, b1);
}
// The second register of B is the first.
inline void mma_tf32_k8(float& d0, float& d1, float& d2, float& d3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0) {
  const u32 a[] = {a0, a1, a2, a3}, b[] = {b0, b0};
  float d[4];
  mma(Type::kTf32, 8, d, a, b, {d0, d1, d2, d3});
  d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
}
inline void mma_tf32_k4(float& d0, float& d1, float& d2, float& d3, u32 a0, u32 a1, u32 b0) {
  const u32 a[] = {a0, a1}, b[] = {b0};
  float d[4];
  mma(Type::kTf32, 4, d, a, b, {d0, d1, d2, d3});
  d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
}

// D (64 x columns) = A B, plus D where `add` says so. `a` is four registers, which are read when the wgmma is, as late as may be; or null,
// and A has a descriptor.
void wgmma(Type type, int columns, void* d, const u32* a, u64 a_descriptor, u64 b_descriptor, int add);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);

}  // namespace host

// ---- CUDA C++ ----

inline void __syncthreads() { host::barrier(0, 0); }
inline void __syncwarp() { host::meet(); }
inline float __uint_as_float(unsigned bits) { float value; std::memcpy(&value, &bits, 4); return value; }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline unsigned __float_as_uint(float value) { unsigned bits; std::memcpy(&bits, &value, 4); return bits; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float value) { return std::exp(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32) | low) >> (by & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  unsigned result;
  host::prmt(result, a, b, selector);
  return result;
}
inline bool __any_sync(unsigned, bool value) { return host::meet_any(value) != 0; }
inline unsigned __reduce_or_sync(unsigned, unsigned value) { return host::meet_or(value); }
inline unsigned __reduce_max_sync(unsigned, unsigned value) { return host::meet_max(value); }
inline unsigned __shfl_sync(unsigned, unsigned value, int lane) { return host::meet_from(value, lane); }
inline int __shfl_sync(unsigned, int value, int lane) { return static_cast<int>(host::meet_from(static_cast<unsigned>(value), lane)); }
inline float __shfl_sync(unsigned, float value, int lane) { return __uint_as_float(host::meet_from(__float_as_uint(value), lane)); }
inline int __shfl_xor_sync(unsigned, int value, int mask) {
  return static_cast<int>(host::meet_from(static_cast<unsigned>(value), static_cast<int>(threadIdx.x % 32) ^ mask));
}
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  return __uint_as_float(host::meet_from(__float_as_uint(value), static_cast<int>(threadIdx.x % 32) ^ mask));
}
inline unsigned __cvta_generic_to_shared(const void* pointer) { return host::shared_address(pointer); }
inline float4 __ldcg(const float4* from) { return *from; }
inline void __stcg(float4* to, float4 value) { *to = value; }
inline void __stcg(uint4* to, uint4 value) { *to = value; }
using std::max;
using std::min;
inline unsigned min(unsigned a, int b) { return std::min(a, static_cast<unsigned>(b)); }
