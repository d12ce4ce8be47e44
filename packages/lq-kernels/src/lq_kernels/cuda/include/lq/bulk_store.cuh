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

}  // namespace lq
