// Many tokens times a packed weight: y (m, n) = x (m, k) @ w (n, k).T for int4 and int8 weights in fragment order. Hopper.
//
// A tile is 128 out features by LQ_TOKENS tokens. Weights are the A operand of wgmma, from registers: what a lane reads from shared
// memory is its fragment, unpacked by bit tricks while earlier products run. Tokens are the B operand, in shared memory.
//
// - Warpgroup 0 loads: warp 0 weights (bulk copies, which do not wait for the previous kernel), warp 1 tokens (tensor map).
// - Warpgroups 1 and 2 multiply 64 out features each, four wgmmas in flight.
// - Tiles are walked persistently, out features first. Where there are too few for the machine, the CTAs of a cluster share K and
//   add their sums through distributed shared memory in the order of K (one tile a cluster).
//
// Accuracy: u - zero is exact; times a group's scale it is rounded once to x's dtype, as a dequantized weight is (one scale a row:
// not rounded, the fp32 sum is scaled). Sums are fp32. Bitwise reproducible.
//
// Compiled with LQ_BITS (4, 8), LQ_X (Bf16, Fp16), LQ_SCALE (Bf16, Fp16, Fp32), LQ_GROUPS (groups in 128 in features: 1, 2, 4; 0: one
// scale a row), LQ_ZERO (0, 1) and LQ_TOKENS (64, 128, 256).

#include "lq/dequantize.cuh"
#include "lq/hopper.cuh"
#include "lq/wgmma.cuh"

using namespace lq;

namespace {

using X = LQ_X;
using Scale = LQ_SCALE;
using ScaleBits = Scale::Bits;

constexpr int kBits = LQ_BITS;
constexpr int kGroups = LQ_GROUPS;
constexpr int kTokens = LQ_TOKENS;
constexpr bool kZero = LQ_ZERO != 0;
constexpr bool kPerRow = kGroups == 0;

constexpr int kThreads = 384;
constexpr int kBlocks = 8;  // of 16 rows in a tile
constexpr int kRows = 16 * kBlocks;
constexpr int kBlockBytes = 1024;
constexpr int kStep = kBits == 4 ? 128 : 64;  // in features of a stage of weights; a stage of tokens has 64
constexpr int kSubs = kStep / 64;
constexpr int kScaleBytes = 16 * static_cast<int>(sizeof(ScaleBits));  // of a block and group
constexpr int kWeightStage = kBlocks * (kBlockBytes + kGroups * kScaleBytes * (kZero ? 2 : 1));
constexpr int kTokenStage = kTokens * 128;
constexpr int kTokenStages = kTokens == 256 ? 5 : 8;
constexpr int kWeightStages = kTokens == 256 ? 3 + (kWeightStage <= 9216) : 6;
constexpr int kStagePitch = 144;  // bytes of 64 results of a token on their way out, padded against bank conflicts
constexpr int kChunk = 64;        // tokens on their way out at once

struct __align__(64) TensorMap {
  u64 data[16];
};

struct Arguments {
  const u8* packed;
  const u8* scales;
  const u8* zeros;
  const u16* bias;
  u16* y;
  i64 m, n, k;
  i64 blocks;
  i64 group_size;
};

// The pair (v, v).
__device__ __forceinline__ u32 pair_of(float value) {
  const u32 bits = from_float(X{}, value);
  return bits | bits << 16;
}

// Values of a lane's two rows, g and g + 8, less `minus`, as pairs in x's dtype.
__device__ __forceinline__ void load_pairs(u32 (&to)[2], u32 address, float minus) {
  float values[2];
  load_pair<Scale>(values, address);
  to[0] = pair_of(values[0] - minus);
  to[1] = pair_of(values[1] - minus);
}

__device__ __forceinline__ void prefill(const TensorMap* map, const Arguments& p) {
  extern __shared__ __align__(1024) u8 shared[];
  u64* weights_full = reinterpret_cast<u64*>(shared);
  u64* weights_empty = weights_full + 8;
  u64* tokens_full = weights_empty + 8;
  u64* tokens_empty = tokens_full + 8;
  u8* token_ring = shared + 1024;
  u8* weight_ring = token_ring + kTokenStages * kTokenStage;
  u8* staging = weight_ring + kWeightStages * kWeightStage;

  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int rank = static_cast<int>(cluster_rank()), ranks = static_cast<int>(cluster_size());
  const int log_ranks = __ffs(ranks) - 1;
  const int steps_all = static_cast<int>((p.k + kStep - 1) / kStep);
  const int first_step = steps_all * rank >> log_ranks, steps = (steps_all * (rank + 1) >> log_ranks) - first_step;
  const int blocks = static_cast<int>(p.blocks);
  const int row_tiles = (blocks + kBlocks - 1) / kBlocks, token_tiles = static_cast<int>((p.m + kTokens - 1) / kTokens);
  const int tiles = row_tiles * token_tiles;
  const int first_tile = static_cast<int>(blockIdx.x) >> log_ranks, tile_stride = static_cast<int>(gridDim.x) >> log_ranks;

  if (warp == 0) {
    if (lane < 8) {
      mbarrier_init(weights_full + lane, 1);
      mbarrier_init(weights_empty + lane, 8);
      mbarrier_init(tokens_full + lane, 1);
      mbarrier_init(tokens_empty + lane, 8);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  let_next_kernel_start();

  if (warp < 4) {
    decrease_registers<40>();
    if (warp == 0) {
      const u64 policy = token_tiles > 1 ? policy_evict_last() : policy_evict_first();
      const int steps_per_group = static_cast<int>(p.group_size / kStep);
      int stage = 0;
      u32 parity = 1;
      for (int tile = first_tile; tile < tiles; tile += tile_stride) {
        const int block = tile % row_tiles * kBlocks, here = blocks - block < kBlocks ? blocks - block : kBlocks;
        for (int step = first_step; step < first_step + steps; ++step) {
          mbarrier_wait(weights_empty + stage, parity);
          if (elect_one()) {
            u8* to = weight_ring + stage * kWeightStage;
            mbarrier_arrive_expect(weights_full + stage, here * (kBlockBytes + kGroups * kScaleBytes * (kZero ? 2 : 1)));
            bulk_copy(to, p.packed + (static_cast<i64>(step) * blocks + block) * kBlockBytes, here * kBlockBytes,
                      weights_full + stage, policy);
            if constexpr (!kPerRow) {
              const int group = kGroups > 1 ? step * kGroups : steps_per_group == 1 ? step : step / steps_per_group;
              u8* scale = to + kBlocks * kBlockBytes;
#pragma unroll 1
              for (int i = 0; i < kGroups; ++i) {
                const i64 from = (static_cast<i64>(group + i) * blocks + block) * kScaleBytes;
                bulk_copy(scale + i * kBlocks * kScaleBytes, p.scales + from, here * kScaleBytes, weights_full + stage, policy);
                if constexpr (kZero)
                  bulk_copy(scale + (kGroups + i) * kBlocks * kScaleBytes, p.zeros + from, here * kScaleBytes, weights_full + stage,
                            policy);
              }
            }
          }
          __syncwarp();
          if (++stage == kWeightStages) stage = 0, parity ^= 1;
        }
      }
    } else if (warp == 1) {
      const u64 policy = policy_evict_last();
      wait_for_previous_kernel();
      int stage = 0;
      u32 parity = 1;
      for (int tile = first_tile; tile < tiles; tile += tile_stride) {
        const int token = tile / row_tiles * kTokens;
        for (int sub = first_step * kSubs; sub < (first_step + steps) * kSubs; ++sub) {
          mbarrier_wait(tokens_empty + stage, parity);
          if (elect_one()) {
            mbarrier_arrive_expect(tokens_full + stage, kTokenStage);
            tensor_copy_2d(token_ring + stage * kTokenStage, map, sub * 64, token, tokens_full + stage, policy);
          }
          __syncwarp();
          if (++stage == kTokenStages) stage = 0, parity ^= 1;
        }
      }
    }
    if (ranks > 1) {
      cluster_arrive_release();
      cluster_wait();
      cluster_arrive_release();
      cluster_wait();
    }
    return;
  }

  increase_registers<232>();
  const int group_of_warps = warp / 4 - 1, block = warp - 4, g = lane / 4, t = lane % 4;
  const u8* my_codes = weight_ring + block * kBlockBytes + lane * 16;
  const u32 my_scales = shared_address(weight_ring) + kBlocks * kBlockBytes + block * kScaleBytes + 2 * g * static_cast<int>(sizeof(ScaleBits));
  const u32 tokens_at = shared_address(token_ring);
  int weight_stage = 0, token_stage = 0, held = -1;  // `held`: the token stage that wgmmas in flight may still read
  u32 weight_parity = 0, token_parity = 0;

  for (int tile = first_tile; tile < tiles; tile += tile_stride) {
    const i64 row0 = static_cast<i64>(tile % row_tiles) * kRows;
    const i64 token0 = static_cast<i64>(tile / row_tiles) * kTokens;
    float row_scale[2] = {1.0f, 1.0f};
    u32 zero[2] = {};
    if constexpr (kPerRow) {
      if (row0 / 16 + block < blocks) {
        const i64 at = row0 + block * 16 + 2 * g;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          row_scale[r] = to_float(Scale{}, reinterpret_cast<const ScaleBits*>(p.scales)[at + r]);
          if constexpr (kZero) zero[r] = pair_of(to_float(Scale{}, reinterpret_cast<const ScaleBits*>(p.zeros)[at + r]) - 8.0f);
        }
      }
    }

    float acc[kTokens / 2];
    u32 accumulate = 0;
    for (int step = 0; step < steps; ++step) {
      mbarrier_wait(weights_full + weight_stage, weight_parity);
      const u8* codes = my_codes + weight_stage * kWeightStage;
      u32 scales = my_scales + weight_stage * kWeightStage;  // of the group that comes next
#pragma unroll 1
      for (int sub = 0; sub < kSubs; ++sub) {
        mbarrier_wait(tokens_full + token_stage, token_parity);
        const u64 tokens = token_descriptor(tokens_at + token_stage * kTokenStage);
        u32 words[2][4];
#pragma unroll
        for (int h = 0; h < (kBits == 4 ? 1 : 2); ++h) {
          const uint4 v = *reinterpret_cast<const uint4*>(codes + (kBits == 4 ? sub : h) * 512);
          words[h][0] = v.x, words[h][1] = v.y, words[h][2] = v.z, words[h][3] = v.w;
        }
        u32 scale[2];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if constexpr (!kPerRow) {
            // Groups of 32 and 64 begin within the step.
            constexpr int kPerGroup = kGroups > 1 ? 8 / kGroups : 8;
            if (j % kPerGroup == 0) {
              load_pairs(scale, scales, 0.0f);
              if constexpr (kZero) load_pairs(zero, scales + kGroups * kBlocks * kScaleBytes, 8.0f);
              if constexpr (kGroups > 1) scales += kBlocks * kScaleBytes;
            }
          }
          u32 a[4];
          if constexpr (kBits == 4)
            int4_fragment(X{}, a, words[0][j]);
          else
            int8_fragment(X{}, a, words[j / 2][j % 2 * 2], words[j / 2][j % 2 * 2 + 1]);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if constexpr (kZero) a[i] = sub2(X{}, a[i], zero[i % 2]);
            if constexpr (!kPerRow) a[i] = mul2(X{}, a[i], scale[i % 2]);
          }
          wgmma_fence();
          wgmma(X{}, acc, a, tokens + 2 * j, accumulate);
          wgmma_commit();
          accumulate = 1;
          if (j == 2) {
            wgmma_wait<2>();  // of the previous stage of tokens none is in flight
            if (held >= 0 && lane == 0) mbarrier_arrive(tokens_empty + held);
          }
        }
        held = token_stage;
        if (++token_stage == kTokenStages) token_stage = 0, token_parity ^= 1;
      }
      if (lane == 0) mbarrier_arrive(weights_empty + weight_stage);
      if (++weight_stage == kWeightStages) weight_stage = 0, weight_parity ^= 1;
    }
    wgmma_wait<0>();
    if (lane == 0) mbarrier_arrive(tokens_empty + held);
    held = -1;

    int first = 0, count = kTokens / 8;  // groups of eight tokens that this CTA stores
    if (ranks > 1) {
      // One tile a cluster: the rings are free. CTA r adds up tokens r * kTokens / ranks and on.
      count >>= log_ranks;
      first = rank * count;
      cluster_arrive_release();
      cluster_wait();
      const int thread = threadIdx.x - 128;
      float4* inbox = reinterpret_cast<float4*>(token_ring);
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
        const int owner = j / count;
        store_cluster(map_shared(inbox + (rank * count + j % count) * 256 + thread, owner), acc[4 * j], acc[4 * j + 1], acc[4 * j + 2],
                      acc[4 * j + 3]);
      }
      cluster_arrive_release();
      cluster_wait();
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
        if (j >= count) break;
        float4 total = inbox[j * 256 + thread];
        for (int s = 1; s < ranks; ++s) {
          const float4 more = inbox[(s * count + j) * 256 + thread];
          total.x += more.x, total.y += more.y, total.z += more.z, total.w += more.w;
        }
        acc[4 * j] = total.x, acc[4 * j + 1] = total.y, acc[4 * j + 2] = total.z, acc[4 * j + 3] = total.w;
      }
    }

    // Out: 64 tokens at a time through shared memory, so that a token's 64 results are one piece of 128 bytes.
    float bias[2] = {};
    if (p.bias)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const i64 row = row0 + block * 16 + g + 8 * r;
        if (row < p.n) bias[r] = to_float(X{}, p.bias[row]);
      }
    wait_for_previous_kernel();  // long past; y is written from here on
    u8* out = staging + group_of_warps * kChunk * kStagePitch;
    const i64 column0 = row0 + group_of_warps * 64;
    const bool vectors = p.n % 8 == 0 && reinterpret_cast<u64>(p.y) % 16 == 0;
#pragma unroll
    for (int chunk = 0; chunk < kTokens / kChunk; ++chunk) {
      if (chunk * (kChunk / 8) >= count) break;
      named_barrier(1 + group_of_warps, 128);
#pragma unroll
      for (int j = 0; j < kChunk / 8; ++j) {
        if (chunk * (kChunk / 8) + j >= count) break;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float value = acc[chunk * (kChunk / 2) + 4 * j + i] * row_scale[i / 2] + bias[i / 2];
          u8* to = out + (8 * j + 2 * t + i % 2) * kStagePitch + (block % 4 * 16 + g + 8 * (i / 2)) * 2;
          *reinterpret_cast<u16*>(to) = from_float(X{}, value);
        }
      }
      named_barrier(1 + group_of_warps, 128);
      const int thread = threadIdx.x % 128;
      const int stored = count * 8 - chunk * kChunk < kChunk ? count * 8 - chunk * kChunk : kChunk;
      for (int i = thread; i < stored * 8; i += 128) {
        const int token_in_chunk = i / 8, part = i % 8;
        const i64 token = token0 + first * 8 + chunk * kChunk + token_in_chunk, column = column0 + part * 8;
        if (token >= p.m || column >= p.n) continue;
        const u8* from = out + token_in_chunk * kStagePitch + part * 16;
        u16* to = p.y + token * p.n + column;
        if (vectors) {
          *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        } else {
          for (int e = 0; e < 8 && column + e < p.n; ++e) to[e] = reinterpret_cast<const u16*>(from)[e];
        }
      }
    }
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) prefill_a16(const __grid_constant__ TensorMap map, const u8* packed,
                                                                     const u8* scales, const u8* zeros, const u16* bias, u16* y, i64 m,
                                                                     i64 n, i64 k, i64 blocks, i64 group_size) {
  prefill(&map, Arguments{packed, scales, zeros, bias, y, m, n, k, blocks, group_size});
}
