// Q8_1 blocks `half d; half s; int8 q[32]` to bf16: d q, rounded once. Hopper: it starts early and lets the product start early.
//
// Four lanes a block, eight elements a lane.

#include "lq/dequantize.cuh"
#include "lq/hopper.cuh"

using namespace lq;

namespace {

constexpr int kThreads = 256;

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) dequantize_q8_1(const u8* blocks, u16* out, i64 count) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const i64 unit = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x;
  if (unit / 4 >= count) return;
  const u32* const words = reinterpret_cast<const u32*>(blocks + unit / 4 * 36);
  const float d = to_float(Fp16{}, static_cast<u16>(words[0]));
  uint4 values;
  u32* const to = reinterpret_cast<u32*>(&values);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int codes = static_cast<int>(words[1 + 2 * (unit % 4) + i]);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float low = static_cast<float>(codes << (24 - 16 * j) >> 24), high = static_cast<float>(codes << (16 - 16 * j) >> 24);
      to[2 * i + j] = from_floats(Bf16{}, d * low, d * high);
    }
  }
  reinterpret_cast<uint4*>(out)[unit] = values;
}
