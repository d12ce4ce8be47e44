// Hopper's asynchronous machinery in one place: mbarriers, bulk and tensor copies, clusters, programmatic dependent launch,
// warpgroup registers. Header-free PTX; sm_90a. Names follow the PTX ISA.
#pragma once

#include "lq/mma.cuh"

namespace lq {

using u64 = unsigned long long;

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// True in one lane of a converged warp.
__device__ __forceinline__ bool elect_one() {
  u32 chosen;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(chosen));
  return chosen != 0;
}

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// ---- mbarriers (8 bytes of shared memory each) ----

// LQ_RACECHECK=1: built for compute-sanitizer's racecheck, which of what a warp has read or written orders by an mbarrier only what the
// arriving thread itself did, and wants a proxy fence of who has read, where the one of who fills again does (fence_async_proxy). So all
// threads arrive where otherwise one does for others, behind a fence; and who waits sleeps, as every look is recorded.
#ifndef LQ_RACECHECK
#define LQ_RACECHECK 0
#endif
constexpr bool kRacecheck = LQ_RACECHECK != 0;
constexpr int kArrivingLanes = kRacecheck ? 32 : 1;

__device__ __forceinline__ void mbarrier_init(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// As many in a row, by one lane: lanes that initialise one each take turns, with a branch and a fence for each.
template <int kCount>
__device__ __forceinline__ void mbarriers_init(u64* first, u32 arrivals) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) mbarrier_init(first + i, arrivals);
}

constexpr int kMaxStages = 16;  // of a ring

// Those of a ring, which mostly has few stages.
__device__ __forceinline__ void mbarriers_init_ring(u64* full, u32 full_arrivals, u64* empty, u32 empty_arrivals, int stages) {
#pragma unroll
  for (int i = 0; i < kMaxStages; i += 4) {
    if (i >= stages) break;
    mbarriers_init<4>(full + i, full_arrivals);
    mbarriers_init<4>(empty + i, empty_arrivals);
  }
}

// Makes initialised barriers visible to asynchronous copies and to the cluster.
__device__ __forceinline__ void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void mbarrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrive, and expect `bytes` more from asynchronous copies in this phase.
__device__ __forceinline__ void mbarrier_arrive_expect(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Arrive on the barrier at the same offset in CTA `rank` of the cluster; earlier writes of this thread become visible there. (For racecheck
// an arrival at the own CTA's barrier is a local one.)
__device__ __forceinline__ void mbarrier_arrive_remote(u64* barrier, u32 rank) {
  if (kRacecheck && rank == cluster_rank()) return mbarrier_arrive(barrier);
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;"
      "  mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote]; }" ::"r"(shared_address(barrier)), "r"(rank) : "memory");
}

// The same for a stage that has been read. Nothing was written, so nothing is ordered: mbarrier_arrive_remote waits for all earlier
// memory operations.
__device__ __forceinline__ void mbarrier_arrive_at(u64* barrier, u32 rank) {
  if (kRacecheck && rank == cluster_rank()) return mbarrier_arrive(barrier);
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Wait until the phase of the given parity is complete.
__device__ __forceinline__ void mbarrier_wait(u64* barrier, u32 parity) {
  if constexpr (kRacecheck) {
    asm volatile(
        "{ .reg .pred done;\n"
        "wait_%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over_%=;\n"
        "nanosleep.u32 20000;\n"
        "bra wait_%=;\n"
        "over_%=: }" ::"r"(shared_address(barrier)), "r"(parity) : "memory");
    return;
  }
  asm volatile(
      "{ .reg .pred done;\n"
      "wait_%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait_%=; }" ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}

// ---- copies from global to shared memory that complete on an mbarrier ----

// L2 policies: weights are read once and should not evict activations, which are read by every CTA.
__device__ __forceinline__ u64 policy_evict_first() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ u64 policy_evict_last() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ u64 policy_evict_normal() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Copy `bytes` (a multiple of 16, both ends 16-byte aligned).
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, u32 bytes, u64* barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)), "l"(policy) : "memory");
}

// Copy a box of a two-dimensional tensor map, (x, y) its first element's column and row.
__device__ __forceinline__ void tensor_copy_2d(void* shared, const void* map, int x, int y, u64* barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], "
      "[%4], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier)), "l"(policy) : "memory");
}

// The same box to every CTA of `mask`, at the same offset, completing on each one's barrier at the same offset.
__device__ __forceinline__ void tensor_copy_2d_multicast(
    void* shared, const void* map, int x, int y, u64* barrier, u16 mask, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%0], "
      "[%1, {%2, %3}], [%4], %5, %6;" ::"r"(shared_address(shared)),
      "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier)), "h"(mask), "l"(policy) : "memory");
}

__device__ __forceinline__ void prefetch_tensor_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// ---- clusters ----

__device__ __forceinline__ u32 cluster_size() {
  u32 size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// Orders nothing but the barriers of mbarrier_init_fence: a full release costs a flush to the L2.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }

__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// All warps say that their CTA's barriers are initialised; warps that use another CTA's wait for it, later. Under racecheck such a wait
// seems to last until every warp of the CTA waits too or has ended, and a producer may do neither: there all wait at once, and a moment
// more in case that was for their own CTA alone.
__device__ __forceinline__ void barriers_initialised() {
  cluster_arrive();
  if constexpr (kRacecheck) {
    cluster_wait();
    asm volatile("nanosleep.u32 1000000;");
  }
}

__device__ __forceinline__ void wait_for_barriers_of_cluster() {
  if constexpr (!kRacecheck) cluster_wait();
}

// Address of a shared variable of this CTA in the shared memory of CTA `rank`.
__device__ __forceinline__ u32 map_shared(u32 address, u32 rank) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

__device__ __forceinline__ u32 map_shared(const void* pointer, u32 rank) { return map_shared(shared_address(pointer), rank); }

// Store a pair, or four, in the shared memory of a CTA of the cluster, 8 or 16 bytes that complete on that CTA's barrier. Addresses come
// from map_shared.
__device__ __forceinline__ void store_async(u32 to, float first, float second, u32 barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to), "f"(first), "f"(second),
               "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void store_async(u32 to, const float4& v, u32 barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to), "f"(v.x),
               "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
               : "memory");
}

// Makes this thread's writes to shared memory visible to asynchronous copies, and orders what it has read, or knows to be read, before
// copies that it issues from here on over the same memory: mbarriers alone do not order generic accesses before those of another proxy.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- counters in global memory ----

// Adds, and returns what was there. What the CTA wrote, before a barrier of all its threads, is seen by whoever comes later, behind another:
// causality is transitive, so one thread's release is enough. (A fence of every thread took 2,100 clocks.)
__device__ __forceinline__ int add_acquire_release(int* to, int value) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(before) : "l"(to), "r"(value) : "memory");
  return before;
}

// ---- programmatic dependent launch ----

// Wait until everything that the previous kernel of the stream wrote is visible. What comes before must not depend on it.
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Allow the next kernel of the stream to start (up to its own wait).
__device__ __forceinline__ void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- time ----

// The multiprocessor's clocks, modulo 2^32.
__device__ __forceinline__ u32 clock_now() {
  u32 now;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(now));
  return now;
}

// ---- warpgroups ----

template <int kRegisters>
__device__ __forceinline__ void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// A barrier among `threads` threads of a CTA; id 1 to 15.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same for who need not wait.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace lq
