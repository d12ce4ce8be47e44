// The host's stand-in for include/lq/mma.cuh: CUDA kernels of this package, compiled by g++ and run one thread at a time.
//
// Every CUDA thread is a fiber; barriers, shuffles and mma are where fibers wait for each other. It is built to find
// mistakes that a GPU may hide: fibers run in an order that depends on a seed, shared memory starts as 0xFF bytes (NaN as
// floats), cp.async copies land only when the thread waits for their group, and lanes that disagree about the next
// warp-wide operation, or threads that never meet at a barrier, end the run with a message. mma.m16n8k32 and m16n8k16 are
// written out from the PTX manual's fragment tables; nothing here is shared with the code under test.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

namespace host {

constexpr int kWarp = 32;
constexpr int kWords = 6;
constexpr size_t kStack = 64 << 10;
constexpr size_t kShared = 228 << 10;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Copy {
  void* to;
  const void* from;
  int size, valid;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  int barriers = 0, collectives = 0;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Warp {
  struct Round {
    int kind = 0, arrived = 0;
    uint32_t words[kWarp][kWords];
  } rounds[2];
  int complete = 0;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline int current = 0, at_barrier = 0, barriers_complete = 0;
inline bool progress = false;
inline void (*entry)(const long long*);
inline const long long* arguments;

[[noreturn]] inline void fail(const char* reason) {
  std::fprintf(stderr, "thread %d: %s\n", current, reason);
  std::abort();
}

inline void pause() { swapcontext(&fibers[current].context, &scheduler); }

inline void start() {
  entry(arguments);
  if (!fibers[current].open.empty()) fail("ends with cp.async copies that were never committed");
  for (auto& group : fibers[current].groups)
    if (!group.empty()) fail("ends before its cp.async copies have landed");
  fibers[current].done = progress = true;
  swapcontext(&fibers[current].context, &scheduler);
}

// Leave `words` for the other lanes, wait until every lane has, and return what all of them left.
inline const Warp::Round& meet(int kind, std::initializer_list<uint32_t> words) {
  Fiber& fiber = fibers[current];
  Warp& warp = warps[current / kWarp];
  const int mine = fiber.collectives++;
  Warp::Round& round = warp.rounds[mine % 2];
  if (round.arrived == 0) round.kind = kind;
  if (round.kind != kind) fail("the lanes of a warp are in different warp-wide operations");
  std::copy(words.begin(), words.end(), round.words[current % kWarp]);
  progress = true;
  if (++round.arrived == kWarp) {
    ++warp.complete;
    warp.rounds[(mine + 1) % 2].arrived = 0;
  }
  while (warp.complete <= mine) pause();
  return round;
}

inline void land(const std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    if (reinterpret_cast<uintptr_t>(copy.to) % copy.size || reinterpret_cast<uintptr_t>(copy.from) % copy.size)
      fail("a cp.async address is not aligned to its size");
    std::memcpy(copy.to, copy.from, copy.valid);
    std::memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.size - copy.valid);
  }
}

}  // namespace host

inline host::Index threadIdx, blockIdx;

namespace {
extern unsigned char shared[];
__align__(128) unsigned char shared[host::kShared];
}  // namespace

// Run a grid; kernels take only pointers and 64-bit integers, at most eight. Not reentrant.
extern "C" void host_launch(void (*kernel)(), long long grid_x, long long grid_y, long long threads, long long bytes,
                            long long seed, const long long* arguments) {
  using namespace host;
  static void (*call)(...) = nullptr;
  call = reinterpret_cast<void (*)(...)>(kernel);
  entry = [](const long long* a) {
    reinterpret_cast<void (*)(long long, long long, long long, long long, long long, long long, long long, long long)>(
        call)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]);
  };
  host::arguments = arguments;
  uint64_t random = 0x9E3779B97F4A7C15ull * (seed + 1);
  for (long long y = 0; y < grid_y; ++y)
    for (long long x = 0; x < grid_x; ++x) {
      blockIdx = {static_cast<unsigned>(x), static_cast<unsigned>(y), 0};
      std::memset(shared, 0xFF, kShared);
      fibers.clear();
      fibers.resize(threads);
      warps.assign(threads / kWarp, Warp());
      at_barrier = barriers_complete = 0;
      std::vector<int> order(threads);
      for (int i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        order[i] = i;
        fiber.stack.reset(new char[kStack]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, start, 0);
      }
      for (bool left = true; left;) {
        left = progress = false;
        for (int i = threads - 1; i > 0; --i) {
          random ^= random << 13, random ^= random >> 7, random ^= random << 17;
          std::swap(order[i], order[random % (i + 1)]);
        }
        for (int i : order) {
          if (fibers[i].done) continue;
          left = true;
          current = i;
          threadIdx = {static_cast<unsigned>(i), 0, 0};
          swapcontext(&scheduler, &fibers[i].context);
        }
        if (left && !progress) fail("no thread can go on: a barrier or warp-wide operation that not all reach");
      }
      for (size_t i = bytes; i < kShared; ++i)
        if (shared[i] != 0xFF) fail("shared memory is written beyond what the launcher asked for");
    }
}

inline void __syncthreads() {
  host::Fiber& fiber = host::fibers[host::current];
  const int mine = fiber.barriers++;
  host::progress = true;
  if (++host::at_barrier == static_cast<int>(host::fibers.size())) host::at_barrier = 0, ++host::barriers_complete;
  while (host::barriers_complete <= mine) host::pause();
}
inline void __syncwarp() { host::meet(1, {}); }

inline float __uint_as_float(unsigned bits) { float value; std::memcpy(&value, &bits, 4); return value; }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline unsigned __float_as_uint(float value) { unsigned bits; std::memcpy(&bits, &value, 4); return bits; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }

inline int __shfl_xor_sync(unsigned, int value, int mask) {
  return static_cast<int>(host::meet(2, {static_cast<unsigned>(value)}).words[(threadIdx.x % 32) ^ mask][0]);
}
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  return __uint_as_float(host::meet(3, {__float_as_uint(value)}).words[(threadIdx.x % 32) ^ mask][0]);
}
inline bool __any_sync(unsigned, bool value) {
  const auto& round = host::meet(4, {value});
  bool any = false;
  for (auto& words : round.words) any |= words[0] != 0;
  return any;
}

namespace lq {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;

inline float half_to_float(u16 bits) { _Float16 half; std::memcpy(&half, &bits, 2); return static_cast<float>(half); }
inline u16 float_to_half(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  u16 bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

constexpr float kMagic = 12582912.0f;

// PTX, mma.m16n8k32 with 8-bit operands: with g = lane / 4 and t = lane % 4,
// A row    = g            for i in 0..3 and 8..11, g + 8 otherwise;  A column = 4 t + i % 4, + 16 for i >= 8
// B row    = 4 t + i % 4, + 16 for i >= 4;                           B column = g
// C row    = g for i < 2, g + 8 otherwise;                           C column = 2 t + i % 2
inline void mma_s8_magic(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  const auto& round = host::meet(5, {a[0], a[1], a[2], a[3], b[0], b[1]});
  static thread_local int A[16][32], B[32][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 16; ++i) {
      const int row = i < 4 || (i >= 8 && i < 12) ? g : g + 8, column = 4 * t + i % 4 + (i >= 8 ? 16 : 0);
      A[row][column] = static_cast<int8_t>(round.words[lane][i / 4] >> (8 * (i % 4)));
    }
    for (int i = 0; i < 8; ++i)
      B[4 * t + i % 4 + (i >= 4 ? 16 : 0)][g] = static_cast<int8_t>(round.words[lane][4 + i / 4] >> (8 * (i % 4)));
  }
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) {
    int sum = 0x4B400000;
    for (int k = 0; k < 32; ++k) sum += A[i < 2 ? g : g + 8][k] * B[k][2 * t + i % 2];
    d[i] = __int_as_float(sum);
  }
}

// PTX, mma.m16n8k16 with fp16 operands, two in a register, low half first:
// A row = g for i in {0, 1, 4, 5}, g + 8 otherwise; A column = 2 t + i % 2, + 8 for i >= 4; B row = 2 t + i % 2, + 8 for i >= 2;
// B column = g; C as above. Sums in double: the order in which tensor cores add is not specified.
inline void mma_f16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  const auto& round = host::meet(6, {a[0], a[1], a[2], a[3], b[0], b[1]});
  static thread_local double A[16][16], B[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; ++i)
      A[i / 2 % 2 ? g + 8 : g][2 * t + i % 2 + (i >= 4 ? 8 : 0)] =
          half_to_float(static_cast<u16>(round.words[lane][i / 2] >> (16 * (i % 2))));
    for (int i = 0; i < 4; ++i)
      B[2 * t + i % 2 + (i >= 2 ? 8 : 0)][g] =
          half_to_float(static_cast<u16>(round.words[lane][4 + i / 2] >> (16 * (i % 2))));
  }
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) {
    double sum = d[i];
    for (int k = 0; k < 16; ++k) sum += A[i < 2 ? g : g + 8][k] * B[k][2 * t + i % 2];
    d[i] = static_cast<float>(sum);
  }
}

template <int kBytes>
inline void cp_async(void* shared, const void* global, bool valid) {
  host::fibers[host::current].open.push_back({shared, global, kBytes, valid ? kBytes : 0});
}
inline void cp_async_16(void* shared, const void* global, bool valid) { cp_async<16>(shared, global, valid); }
inline void cp_async_commit() {
  auto& fiber = host::fibers[host::current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int kPending>
inline void cp_async_wait() {
  auto& groups = host::fibers[host::current].groups;
  for (; groups.size() > kPending; groups.pop_front()) host::land(groups.front());
}

}  // namespace lq
