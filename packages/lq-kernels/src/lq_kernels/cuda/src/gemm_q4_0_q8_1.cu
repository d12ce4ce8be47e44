// Q4_0 x Q8_1: out[m, n] = sum over blocks of d4 * (d8 * sum(q4 * q8) - 8 * s8), fp32, straight from ggml's bytes.
//
// A CTA owns 32 weight rows and 8 * kColumnTiles tokens. K is streamed through shared memory in chunks of 16 blocks (512
// elements) by cp.async, kStages deep; each of 8 warps takes two blocks of every chunk, so the warps split K, and their
// sums are added through shared memory in the order of the warps: results are bitwise reproducible.
//
// The nibble order of Q4_0 is the A fragment of mma.m16n8k32: word t of a row's 16 quant bytes gives a0/a1 by masking and
// a2/a3 by shifting. The integer accumulator starts at the bits of 12582912.0f, so it *is* the float 12582912 + sum and no
// integer is converted: fma(D, d8, -12582912 * d8) = d8 * sum with one rounding (12582912 * d8 is exact).
//
// Row pitches in shared memory are padded (288 -> 304, 576 -> 592 bytes) so that the eight rows of a fragment fall into
// different banks. kAligned: rows start at multiples of 16 bytes (K % 256 == 0); other K are copied in pieces of 2 and 4.

#include "lq/mma.cuh"

using namespace lq;

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kRows = 32;
constexpr int kRowTiles = kRows / 16;
constexpr int kChunk = 16;  // blocks of 32 elements in a stage
constexpr int kBlocksPerWarp = kChunk / kWarps;
constexpr int kWeightBytes = 18;
constexpr int kActivationBytes = 36;
constexpr int kWeightPitch = kChunk * kWeightBytes + 16;
constexpr int kActivationPitch = kChunk * kActivationBytes + 16;

template <int kColumnTiles>
struct Stage {
  static constexpr int kTokens = 8 * kColumnTiles;
  static constexpr int kWeights = kRows * kWeightPitch;
  static constexpr int kBytes = kWeights + kTokens * kActivationPitch;
};

// Copy blocks [first, first + kChunk) of `rows` rows into shared memory; zeros outside of the matrix.
template <bool kAligned, int kRowsHere, int kBlockBytes, int kPitch>
__device__ __forceinline__ void load_rows(u8* shared, const u8* global, i64 row0, i64 rows, i64 blocks, i64 first) {
  constexpr int kRowBytes = kChunk * kBlockBytes;
  const i64 pitch = blocks * kBlockBytes;
  const int valid = static_cast<int>((blocks - first < kChunk ? blocks - first : kChunk) * kBlockBytes);
  if constexpr (kAligned) {
    constexpr int kPieces = kRowBytes / 16;
    for (int i = threadIdx.x; i < kRowsHere * kPieces; i += kThreads) {
      const int row = i / kPieces, offset = (i % kPieces) * 16;
      const bool ok = row0 + row < rows && offset < valid;
      const u8* from = ok ? global + (row0 + row) * pitch + first * kBlockBytes + offset : global;
      cp_async_16(shared + row * kPitch + offset, from, ok);
    }
  } else {
    constexpr int kPieces = kRowBytes / 2;
    for (int i = threadIdx.x; i < kRowsHere * kPieces; i += kThreads) {
      const int row = i / kPieces, offset = (i % kPieces) * 2;
      const bool ok = row0 + row < rows && offset < valid;
      const u16 value = ok ? *reinterpret_cast<const u16*>(global + (row0 + row) * pitch + first * kBlockBytes + offset) : 0;
      *reinterpret_cast<u16*>(shared + row * kPitch + offset) = value;
    }
  }
}

template <int kColumnTiles, int kStages, bool kAligned>
__device__ __forceinline__ void gemm(const u8* weights, const u8* activations, float* out, i64 rows, i64 tokens, i64 blocks) {
  using S = Stage<kColumnTiles>;
  extern __shared__ __align__(16) u8 shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const i64 row0 = static_cast<i64>(blockIdx.x) * kRows, token0 = static_cast<i64>(blockIdx.y) * S::kTokens;
  const i64 chunks = (blocks + kChunk - 1) / kChunk;

  auto load = [&](i64 chunk) {
    u8* stage = shared + static_cast<int>(chunk % kStages) * S::kBytes;
    load_rows<kAligned, kRows, kWeightBytes, kWeightPitch>(stage, weights, row0, rows, blocks, chunk * kChunk);
    load_rows<kAligned, S::kTokens, kActivationBytes, kActivationPitch>(
        stage + S::kWeights, activations, token0, tokens, blocks, chunk * kChunk);
  };

  float acc[kRowTiles][kColumnTiles][4] = {};
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < chunks) load(s);
    cp_async_commit();
  }
  for (i64 chunk = 0; chunk < chunks; ++chunk) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    if (chunk + kStages - 1 < chunks) load(chunk + kStages - 1);
    cp_async_commit();
    const u8* stage = shared + static_cast<int>(chunk % kStages) * S::kBytes;
#pragma unroll
    for (int j = 0; j < kBlocksPerWarp; ++j) {
      const int block = warp * kBlocksPerWarp + j;
      u32 a[kRowTiles][4];
      float d4[kRowTiles][2];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const u8* q = stage + (r * 16 + half * 8 + g) * kWeightPitch + block * kWeightBytes;
          // Blocks of 18 bytes: the quants are 2-byte aligned only.
          const u16* word = reinterpret_cast<const u16*>(q + 2 + 4 * t);
          const u32 v = word[0] | static_cast<u32>(word[1]) << 16;
          d4[r][half] = half_to_float(*reinterpret_cast<const u16*>(q));
          a[r][half] = v & 0x0F0F0F0Fu;
          a[r][half + 2] = (v >> 4) & 0x0F0F0F0Fu;
        }
      }
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c) {
        const u8* tile = stage + S::kWeights + c * 8 * kActivationPitch + block * kActivationBytes;
        const u8* column = tile + g * kActivationPitch + 4 + 4 * t;
        u32 b[2] = {*reinterpret_cast<const u32*>(column), *reinterpret_cast<const u32*>(column + 16)};
        float d8[2], bias[2], s8[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const u32 ds = *reinterpret_cast<const u32*>(tile + (2 * t + i) * kActivationPitch);
          d8[i] = half_to_float(static_cast<u16>(ds));
          s8[i] = 8.0f * half_to_float(static_cast<u16>(ds >> 16));
          bias[i] = -kMagic * d8[i];
        }
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          float d[4];
          mma_s8_magic(d, a[r], b);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float product = fmaf(d[i], d8[i % 2], bias[i % 2]) - s8[i % 2];
            acc[r][c][i] = fmaf(product, d4[r][i / 2], acc[r][c][i]);
          }
        }
      }
    }
  }

  // Add the warps' sums in order. Every cp.async has landed (the last groups are empty), the stages are free to reuse.
  cp_async_wait<0>();
  __syncthreads();
  float* sums = reinterpret_cast<float*>(shared);
  constexpr int kTile = kRows * S::kTokens;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = r * 16 + g + (i / 2) * 8, token = c * 8 + 2 * t + i % 2;
        sums[warp * kTile + row * S::kTokens + token] = acc[r][c][i];
      }
  __syncthreads();
  for (int i = threadIdx.x; i < kTile; i += kThreads) {
    const i64 row = row0 + i / S::kTokens, token = token0 + i % S::kTokens;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += sums[w * kTile + i];
    if (row < rows && token < tokens) out[row * tokens + token] = total;
  }
}

}  // namespace

#define LQ_KERNEL(NAME, COLUMN_TILES, STAGES, ALIGNED)                                                               \
  extern "C" __global__ void __launch_bounds__(kThreads, 1) NAME(const u8* weights, const u8* activations, float* out, \
                                                              i64 rows, i64 tokens, i64 blocks) {                   \
    gemm<COLUMN_TILES, STAGES, ALIGNED>(weights, activations, out, rows, tokens, blocks);                           \
  }

LQ_KERNEL(gemm_q4_0_q8_1_c1, 1, 6, true)
LQ_KERNEL(gemm_q4_0_q8_1_c2, 2, 4, true)
LQ_KERNEL(gemm_q4_0_q8_1_c4, 4, 3, true)
LQ_KERNEL(gemm_q4_0_q8_1_c8, 8, 2, true)
LQ_KERNEL(gemm_q4_0_q8_1_c1_unaligned, 1, 2, false)
LQ_KERNEL(gemm_q4_0_q8_1_c2_unaligned, 2, 2, false)
LQ_KERNEL(gemm_q4_0_q8_1_c4_unaligned, 4, 2, false)
LQ_KERNEL(gemm_q4_0_q8_1_c8_unaligned, 8, 2, false)
