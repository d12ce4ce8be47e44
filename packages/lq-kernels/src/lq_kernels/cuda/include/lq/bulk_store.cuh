// Copies from shared to global memory that run on while the program continues. Groups of them belong to the thread that issued them.
#pragma once

#include "lq/hopper.cuh"

namespace lq {

// Copy a box of shared memory to where a two-dimensional tensor map has it, (x, y) its first element's column and row; what is outside of
// the matrix is left. Who wrote the box did so with fence_async_proxy after it.
__device__ __forceinline__ void tensor_store_2d(const void* map, int x, int y, const void* shared) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(x), "r"(y),
               "r"(shared_address(shared))
               : "memory");
}

// Closes a group of this thread's bulk stores.
__device__ __forceinline__ void bulk_stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all groups of this thread but the last `kPending` have read their shared memory.
template <int kPending>
__device__ __forceinline__ void bulk_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// How a tile's results leave through stages of a ring that the producers pass over, beside the next tile's products: `kBoxes` boxes of 64
// out features and all tokens, in the swizzle of 128 bytes, `kStageBoxes` of them a stage, in parts of tokens, each as soon as all consumers
// have arrived at the named barrier of the part. A part has as many tokens as a box of the map, which the host makes.
template <int kTokens, int kBoxes, int kStageBoxes, int kConsumers>
struct Leaving {
  static constexpr int kPartTokens = kTokens > 64 && kTokens % 64 == 0 ? 64 : kTokens % 32 == 0 ? 32 : kTokens;
  static constexpr int kParts = kTokens / kPartTokens;
  static constexpr int kStages = kBoxes > kStageBoxes ? 2 : 1;
  static constexpr int kBarrier = 2 + kConsumers / 128;  // the first of them: others are of warpgroups, and of all

  // For consumers, after each chunk of `kChunk` tokens: what is in the ring after a part's last goes.
  template <int kChunk>
  static __device__ __forceinline__ void leave(int chunk) {
    constexpr int kPartChunks = kChunk < kPartTokens ? kPartTokens / kChunk : 1;
    if (chunk % kPartChunks != kPartChunks - 1) return;
    fence_async_proxy();
    named_barrier_arrive(kBarrier + chunk / kPartChunks, kConsumers + 32);
  }

  // For the warp whose first lane has sent them off, in the order of stages, the last group of stores for each: say that they are free, each
  // when it has been read, as the consumers of operands would say it, by `kArrivals` arrivals, spread over the `kSharers` CTAs that fill
  // each other's rings. `stage` is the first of them, and becomes the one behind.
  template <int kSharers, int kArrivals>
  static __device__ __forceinline__ void free(u64* empty, int& stage, int stages, int lane) {
    static_assert(kBoxes <= 2 * kStageBoxes, "groups are counted so far");
#pragma unroll
    for (int out = 1; out <= kStages; ++out) {
      if (lane == 0) out < kStages ? bulk_stores_read<1>() : bulk_stores_read<0>();
      __syncwarp();
#pragma unroll 1
      for (int i = lane; i < kArrivals; i += 32) {
        if constexpr (kSharers > 1)
          mbarrier_arrive_at(empty + stage, i % kSharers);
        else
          mbarrier_arrive(empty + stage);
      }
      if (++stage == stages) stage = 0;
    }
  }
};

}  // namespace lq
