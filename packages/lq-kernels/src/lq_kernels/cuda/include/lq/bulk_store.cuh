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

// For a warp whose first lane has sent off `kStages` stages of a ring in bulk, in the order of stages, the last group of stores for each: say
// that they are free, each when it has been read, as the consumers of operands would say it, by `kArrivals` arrivals, spread over the
// `kSharers` CTAs that fill each other's rings. `stage` is the first of them, and becomes the one behind.
template <int kStages, int kSharers, int kArrivals>
__device__ __forceinline__ void free_when_sent(u64* empty, int& stage, int stages, int lane) {
  static_assert(kStages == 1 || kStages == 2, "groups are counted so far");
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

}  // namespace lq
