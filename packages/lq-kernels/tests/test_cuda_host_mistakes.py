"""Mistakes that kernels may make are found where they run on the host (see ``host/machine.py``), whatever their results."""

import pytest
import torch
from cuda_host import HostError

# 64 threads copy 256 bytes through shared memory, or 128 multiply ones; by `mistake`, something is wrong.
SOURCE = """
#define LQ_TOKENS 16
#define LQ_X Bf16
#include "lq/wgmma.cuh"
using namespace lq;

extern "C" __global__ void __launch_bounds__(64) copy(const u8* from, u8* to, i64 mistake) {
  extern __shared__ __align__(128) u8 shared[];
  u64* const full = reinterpret_cast<u64*>(shared + 256);
  const int thread = threadIdx.x, bytes = mistake == 3 ? 512 : 256;
  if (thread == 0) mbarrier_init(full, 1);
  if (mistake != 1) __syncthreads();
  if (thread == 0) {
    mbarrier_arrive_expect(full, mistake == 2 ? 272 : bytes);
    bulk_copy(shared, from, bytes, full, policy_evict_first());
  }
  if (mistake != 4) mbarrier_wait(full, 0);
  reinterpret_cast<u32*>(to)[thread] = reinterpret_cast<u32*>(shared)[thread];
  if (mistake == 5) to[256 + thread] = 1;
  if (mistake == 6) shared[264 + thread] = 1;
  if (mistake == 7 && thread % 32 < 16) __syncwarp();
  if (mistake == 8 && thread < 32) __syncthreads();
  if (mistake == 9) reinterpret_cast<u8*>(full)[0] = 1, mbarrier_wait(full, 0);
  if (mistake == 10) cp_async_16(shared, from, true), cp_async_commit();
  if (mistake == 11) mbarrier_wait(full, 1);
}

extern "C" __global__ void __launch_bounds__(64) send(float* to, i64 mistake) {
  extern __shared__ __align__(128) u8 shared[];
  u64* const full = reinterpret_cast<u64*>(shared + 512);
  const int thread = threadIdx.x;
  const u32 other = cluster_rank() ^ 1;
  if (thread == 0) mbarrier_init(full, 1);
  if (mistake != 1) cluster_arrive(), cluster_wait();
  if (thread == 0) mbarrier_arrive_expect(full, 512);
  if (mistake == 2 && other == 0) return;
  store_async(map_shared(shared + 8 * thread, other), 1.0f + thread, 2.0f, map_shared(full, other));
  mbarrier_wait(full, 0);
  to[64 * blockIdx.x + thread] = reinterpret_cast<float*>(shared)[2 * thread];
}

extern "C" __global__ void __launch_bounds__(128) multiply(float* to, i64 mistake) {
  extern __shared__ __align__(1024) u8 shared[];
  const int thread = threadIdx.x;
  for (int i = 0; i < 8; ++i) reinterpret_cast<u16*>(shared)[thread + 128 * i] = 0x3f80;
  __syncthreads();
  float sums[8] = {};
  u32 a[4] = {0x40004000, 0x40004000, 0x40004000, 0x40004000};
  wgmma_fence();
  Wgmma<16>::run(Bf16{}, sums, a, swizzled_descriptor(shared_address(shared)), 1);
  wgmma_commit();
  if (mistake == 1) a[2] = 0;
  if (mistake == 2) shared[thread * 16 + 1] = 0;
  if (mistake == 3) to[thread] = sums[0];
  wgmma_wait<0>();
  if (mistake != 3) to[thread] = sums[0];
}
"""

COPY = {
    "uses a barrier before it is initialised": (1, "there is no mbarrier at 0x100"),
    "expects more bytes than come": (2, "at 0x100, phase 0, short of 0 arrivals and 16 bytes"),
    "copies more than there is room for": (3, "cp.async.bulk: 512 bytes at 0 of shared memory, which has 264"),
    "does not wait for a copy": (4, "ends its CTA while something is on its way"),
    "writes behind a tensor": (5, "touches 0x"),
    "writes behind shared memory": (6, "written beyond what the launcher asked for|touches 0x"),
    "lets lanes part": (7, "bar.warp.sync"),
    "lets warps part": (8, "bar.sync 0, where 32 of 64 threads are"),
    "overwrites a barrier": (9, "the mbarrier at 0x100 of CTA 0 was overwritten"),
    "leaves copies alone": (10, "ends before its cp.async copies have landed"),
    "waits for a phase that does not come": (11, "short of 1 arrivals and 0 bytes"),
}  # fmt: skip


@pytest.fixture
def launch(host, tmp_path_factory):
    source = tmp_path_factory.getbasetemp() / "mistakes.cu"  # the same name for all tests: it is compiled once
    source.write_text(SOURCE)

    def run(kernel, threads, shared, cluster, *values):
        host.run(source, kernel, (cluster, 1, 1), threads, shared, cluster, (), values)

    return run


def copied(host, launch, mistake):
    x = host.guard(torch.randint(0, 256, (256,), dtype=torch.uint8))
    y = host.guard(x, poison=True)
    launch("copy", 64, 264, 1, x.data_ptr(), y.data_ptr(), mistake)
    return torch.equal(x, y)


def test_what_is_right_passes(host, launch):
    for host.seed in range(6):
        assert copied(host, launch, 0)
        y = host.guard(torch.zeros(2, 64))
        launch("send", 64, 520, 2, y.data_ptr(), 0)
        assert torch.equal(y, torch.arange(1.0, 65.0).expand(2, 64))
        launch("multiply", 128, 2048, 1, y.data_ptr(), 0)
        assert torch.equal(y, torch.full((2, 64), 32.0))


@pytest.mark.parametrize("mistake", COPY)
def test_a_kernel_that(host, launch, mistake):
    number, message = COPY[mistake]

    def in_some_orders():
        for host.seed in (2, 5, 8):  # copies land late
            copied(host, launch, number)

    with pytest.raises(HostError, match=message):
        in_some_orders()


@pytest.mark.parametrize(("mistake", "message"), [(1, "there is no mbarrier"), (2, "has ended|on its way")])
def test_a_cta_that_is_not_ready_or_has_ended_gets_nothing(host, launch, mistake, message):
    y = host.guard(torch.zeros(2, 64))

    def in_some_orders():
        for host.seed in range(6):
            launch("send", 64, 520, 2, y.data_ptr(), mistake)

    with pytest.raises(HostError, match=message):
        in_some_orders()


@pytest.mark.parametrize("mistake", [1, 2, 3])
def test_products_in_flight_read_what_is_there_when_they_are_waited_for(host, launch, mistake):
    y = host.guard(torch.zeros(128))
    launch("multiply", 128, 2048, 1, y.data_ptr(), mistake)
    assert not torch.equal(y, torch.full((128,), 32.0))
