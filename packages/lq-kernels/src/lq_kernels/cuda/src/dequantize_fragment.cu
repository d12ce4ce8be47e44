// The dense weight of codes in fragment order: w (n, k) = (u - zero) * scale, or u * scale + minimum, computed in fp32 and rounded
// once. Any GPU.
//
// A warp takes a block of 16 rows at one K step; a lane writes the pairs of its eight codes a word. Compiled with LQ_BITS (4, 8),
// LQ_OUT and LQ_SCALE (Bf16, Fp16, Fp32), LQ_GROUPS (groups in a step: 1, 2, 4; 0: one scale a row), LQ_ZERO (0, 1; 2: minima).

#include "lq/dequantize.cuh"

using namespace lq;

namespace {

constexpr int kStep = LQ_BITS == 4 ? 128 : 64;
constexpr int kTogether = LQ_GROUPS > 1 ? LQ_GROUPS : 1;  // groups of a step, whose scales lie beside each other
constexpr int kWarps = 8;

__device__ __forceinline__ u16 out_bits(Bf16 t, float v) { return from_float(t, v); }
__device__ __forceinline__ u16 out_bits(Fp16 t, float v) { return from_float(t, v); }
__device__ __forceinline__ float out_bits(Fp32, float v) { return v; }

}  // namespace

extern "C" __global__ void __launch_bounds__(kWarps * 32) dequantize_fragment(const u32* packed, const LQ_SCALE::Bits* scales,
                                                                             const LQ_SCALE::Bits* zeros, LQ_OUT::Bits* out, i64 n,
                                                                             i64 k, i64 blocks, i64 group_size) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const i64 block = static_cast<i64>(blockIdx.x) * kWarps + threadIdx.x / 32, step = blockIdx.y;
  if (block >= blocks) return;
  const u32* from = packed + ((step * blocks + block) * 2 * 32 + lane) * 4;
  for (int half = 0; half < 2; ++half) {
    const uint4 v = *reinterpret_cast<const uint4*>(from + half * 128);
    const u32 words[4] = {v.x, v.y, v.z, v.w};
    for (int w = 0; w < 4; ++w) {
      for (int i = 0; i < (LQ_BITS == 4 ? 4 : 2); ++i) {
        // int4: word = k16 step, i = rh + 2 kh; int8: word = 2 (k16 step) + kh, i = rh.
        const int rh = i % 2, kh = LQ_BITS == 4 ? i / 2 : w % 2, j = LQ_BITS == 4 ? w : w / 2;
        const i64 row = block * 16 + g + 8 * rh, column = step * kStep + half * (kStep / 2) + 16 * j + 8 * kh + 2 * t;
        if (row >= n) continue;
        for (int h = 0; h < 2; ++h) {
          if (column + h >= k) continue;
          // Of 32 bits, as in features are: a quotient of 64 takes several times as long. Groups may end within a step.
          const u32 group = LQ_GROUPS == 0 ? 0 : static_cast<u32>(column + h) / static_cast<u32>(group_size);
          const i64 at = ((group / kTogether * blocks + block) * kTogether + group % kTogether) * 16 + 2 * g + rh;
          float value;
          if (LQ_BITS == 4)
            value = static_cast<float>(words[w] >> (4 * (i + 4 * h)) & 0xF) - 8.0f;
          else
            value = static_cast<float>(static_cast<signed char>(words[w] >> (8 * (rh + 2 * h)) & 0xFF));
          const float scale = to_float(LQ_SCALE{}, scales[at]);
          if (LQ_ZERO == 1) value -= to_float(LQ_SCALE{}, zeros[at]) - 8.0f;
          value = LQ_ZERO == 2 ? fmaf(value + 8.0f, scale, to_float(LQ_SCALE{}, zeros[at])) : value * scale;
          out[row * k + column + h] = out_bits(LQ_OUT{}, value);
        }
      }
    }
  }
}
