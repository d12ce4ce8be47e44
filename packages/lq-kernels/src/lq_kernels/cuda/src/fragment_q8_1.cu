// Tokens to int8 in the order in which decode_a16 reads them (lq/q8_1.cuh): floats, quantized as Q8_1 blocks are, or such blocks. Hopper.
//
// A lane has half a block of 32, and x padded with zeros to a multiple of 128 in features. It starts before its predecessor ends, and
// its successor before it does; whoever needs results waits.

#include "lq/hopper.cuh"
#include "lq/q8_1.cuh"

using namespace lq;

namespace {

constexpr int kMostThreads = 256;

// Where half a block lies among tokens in fragment order, and which it is.
struct Place {
  u8* step;
  int tokens, token, half;  // of the step: how many, and which
  i64 block;                // of all tokens' blocks
  bool inside, exists;      // of the tokens; of their K, and not of what it is padded to

  __device__ __forceinline__ Place(u8* out, i64 m, i64 row_blocks) {
    const i64 number = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
    const i64 steps = (row_blocks + 3) / 4, row_halves = steps * kQ8_1StepHalves, row = number / row_halves, tile = row / 8;
    const int in_row = static_cast<int>(number - row * row_halves);
    tokens = static_cast<int>(m - tile * 8 < 8 ? m - tile * 8 : 8);
    token = static_cast<int>(row % 8), half = in_row % kQ8_1StepHalves;
    step = out + (tile * 8 * steps + static_cast<i64>(in_row / kQ8_1StepHalves) * tokens) * kQ8_1StepBytes;
    block = row * row_blocks + in_row / 2;
    inside = row < m, exists = inside && in_row / 2 < row_blocks;
  }
};

template <typename From>
__device__ __forceinline__ void fragment(const u8* x, u8* out, i64 m, i64 row_blocks) {
  using Half = Q8_1Half<From>;
  const Place place(out, m, row_blocks);
  Half values = {};
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (place.exists) values.load(x + (place.block * 2 + place.half % 2) * 16 * Half::kElement);
  const Q8_1Fragment made = values.quantize();
  if (place.inside) made.store(place.step, place.token, Q8_1Place(place.half, place.tokens));
}

}  // namespace

#define LQ_FRAGMENT(SUFFIX, TYPE)                                                                                          \
  extern "C" __global__ void __launch_bounds__(kMostThreads) fragment_q8_1_##SUFFIX(const u8* x, u8* out, i64 m, i64 blocks) { \
    fragment<TYPE>(x, out, m, blocks);                                                                                     \
  }

LQ_FRAGMENT(float32, Fp32)
LQ_FRAGMENT(float16, Fp16)
LQ_FRAGMENT(bfloat16, Bf16)

extern "C" __global__ void __launch_bounds__(kMostThreads) fragment_q8_1_blocks(const u8* x, u8* out, i64 m, i64 row_blocks) {
  const Place place(out, m, row_blocks);
  if (!place.inside) return;
  Q8_1Fragment made = {};
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (place.exists) {
    const u32* const block = reinterpret_cast<const u32*>(x) + place.block * 9;
    made.d = half_to_float(static_cast<u16>(block[0]));
    u32 q[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) q[i] = block[1 + place.half % 2 * 4 + i];
#pragma unroll
    for (int t = 0; t < 4; ++t) made.words[t] = __byte_perm(q[t / 2], q[2 + t / 2], t % 2 ? 0x7362 : 0x5140);
  }
  made.store(place.step, place.token, Q8_1Place(place.half, place.tokens));
}
