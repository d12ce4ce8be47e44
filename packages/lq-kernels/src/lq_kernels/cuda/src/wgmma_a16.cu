// Many tokens times a packed weight: y (m, n) = x (m, k) @ w (n, k).T for int4 and int8 weights in fragment order. Hopper.
//
// Operands are swapped: weights, unpacked in registers, are the A operand of wgmma (64 out features), tokens are the columns and come
// from shared memory. So a weight is unpacked once for up to 256 tokens, never written to shared memory, and few tokens waste little.
//
// - A producer warp fills a ring of stages: the codes of kRows out features at one K step (128 in features for int4, 64 for int8) by
//   one bulk copy, their scales by others, and x by a tensor map that writes the 128-byte swizzle and zeros past the end of x. Weights
//   do not depend on the previous kernel: the ring's weights are requested before griddepcontrol.wait, x after it.
// - Two warpgroups multiply, half of the rows each. While wgmmas run, the next codes are unpacked; a group's scale multiplies the
//   weight in x's dtype, after the exact difference of code and zero: what a dequantized weight would hold. One scale a row multiplies
//   the fp32 sum instead.
// - CTAs are persistent. Tiles are taken so that those running at once share rows and tokens in L2: `raster` row tiles for all tokens,
//   then the next ones.
// - Where there are many tiles, two CTAs may share their tokens (LQ_MULTICAST): each loads half of x for both, which halves what L2
//   has to serve. A stage is then free when the consumers of both have released it.
// - Where there are few tiles, the CTAs of a cluster share K. Partial sums are exchanged through distributed shared memory, each CTA
//   finishing its share of the tokens, and added in the order of K. No atomics, no workspace: results are bitwise reproducible.
//
// Compiled with LQ_BITS (4, 8), LQ_X (Bf16, Fp16), LQ_SCALE (Bf16, Fp16, Fp32: the type of scales and zeros), LQ_GROUPS (groups in
// 128 in features: 1, 2, 4; 0: one scale a row), LQ_ZERO (0, 1), LQ_TOKENS (16, 32, 64, 128, 256) and LQ_ROWS (128, 256) of a tile,
// LQ_MULTICAST (0: a cluster, if any, shares K; 1: clusters of two that share tokens).

#include "lq/wgmma_rs.cuh"

using namespace lq;

namespace {

using X = LQ_X;
using Scale = LQ_SCALE;
using ScaleBits = Scale::Bits;

constexpr int kBits = LQ_BITS;
constexpr int kGroups = LQ_GROUPS;
constexpr bool kZero = LQ_ZERO != 0;
constexpr bool kPerRow = kGroups == 0;
constexpr int kTokens = LQ_TOKENS;
constexpr int kRows = LQ_ROWS;
constexpr bool kMulticast = LQ_MULTICAST != 0;
constexpr int kSharers = kMulticast ? 2 : 1;  // CTAs that have the same tokens
static_assert(kBits == 4 || (kPerRow && !kZero), "8 bits: one scale a row, symmetric");

constexpr int kConsumerWarps = 8;
constexpr int kConsumers = kConsumerWarps * 32;
constexpr int kThreads = kConsumers + 128;  // a whole warpgroup gives its registers to the consumers, but one warp works
constexpr int kCtas = kTokens <= 64 && kRows == 128 ? 2 : 1;  // of an SM: while one ends, the other (or the next kernel's) loads
constexpr int kConsumerRegisters = kCtas == 2 ? 104 : 240;
constexpr int kMaxStages = 16;
constexpr int kBlockRows = 16;
constexpr int kBlockBytes = 1024;                  // of codes in a K step
constexpr int kStep = kBits == 4 ? 128 : 64;       // in features
constexpr int kParts = kRows / 128;                // of 64 rows, of a warpgroup
constexpr int kBlocks = kRows / kBlockRows;        // of a tile
constexpr int kSums = kTokens / 2;                 // a thread and part
constexpr int kSlices = kStep / 16;                // k16 steps of a stage
constexpr int kBatch = kTokens * kParts <= 32 ? 4 : kTokens * kParts <= 128 ? 2 : 1;  // ... in a group of wgmmas; two groups are in flight
constexpr int kBatches = kSlices / kBatch;
constexpr int kBoxBytes = kTokens * 128;           // of x: 64 in features
constexpr int kShareTokens = kTokens / kSharers;   // that one of them loads
constexpr int kXBytes = kStep / 64 * kBoxBytes;
constexpr int kStage = kXBytes + kBlocks * kBlockBytes;
constexpr int kGroupBytes = kRows * static_cast<int>(sizeof(ScaleBits));  // scales of a group
constexpr int kScaleStage = kGroups * kGroupBytes * (kZero ? 2 : 1);
constexpr int kChunk = kTokens == 256 || kTokens == 16 ? 16 : 32;  // tokens that pass through shared memory at once on their way out
constexpr int kChunkPitch = 64 * kParts * 2 + 16;                  // bytes; padded against bank conflicts
constexpr int kPartialPitch = kRows + 4;                           // floats; the same

struct alignas(64) TensorMap {
  u8 opaque[128];
};

struct Arguments {
  const u8* packed;
  const u8* scales;
  const u8* zeros;
  const u16* bias;
  u16* y;
  i64 m, n, k;
  i64 blocks;      // of 16 rows
  i64 group_size;  // used where a group is a whole number of steps
  i64 stages;
  i64 raster;  // row tiles (pairs of them with multicast) in a band
};

// The tiles of this cluster, one after the other.
struct Tiles {
  int rows, tokens, raster, next, stride;  // row tiles, token tiles, ...
  int row, token;                          // the current tile

  __device__ __forceinline__ bool advance() {
    if (next >= rows * tokens) return false;
    const int band = next / (raster * tokens), in_band = next - band * raster * tokens;
    const int first = band * raster, height = rows - first < raster ? rows - first : raster;
    token = in_band / height;
    row = first + in_band - token * height;
    next += stride;
    return true;
  }
};

template <typename A, typename B>
constexpr bool kSame = false;
template <typename A>
constexpr bool kSame<A, A> = true;

// Scales (or zeros) of rows g and g + 8 as a pair in x's dtype.
__device__ __forceinline__ u32 load_scales(const u8* from) {
  if constexpr (sizeof(ScaleBits) == 4) {
    const float2 pair = *reinterpret_cast<const float2*>(from);
    return from_floats(X{}, pair.x, pair.y);
  } else {
    const u32 pair = *reinterpret_cast<const u32*>(from);
    if constexpr (kSame<X, Scale>)
      return pair;
    else
      return from_floats(X{}, to_float(Scale{}, static_cast<u16>(pair)), to_float(Scale{}, static_cast<u16>(pair >> 16)));
  }
}

// A thread's codes and scales of a stage.
struct Weights {
  static constexpr int kHalves = 2;
  static constexpr int kScales = kPerRow ? 1 : kGroups;
  uint4 words[kParts][kHalves];
  u32 scale[kParts][kScales], zero[kParts][kScales];
  u32 row_zero[kParts];  // of one zero a row

  // The A fragment of k16 step `slice`.
  __device__ __forceinline__ void fragment(u32 (&a)[4], int part, int slice) const {
    const uint4& four = words[part][slice / (kSlices / 2)];
    const u32 word[4] = {four.x, four.y, four.z, four.w};
    const int at = slice % (kSlices / 2);
    if constexpr (kBits == 8) {
      int8_fragment(X{}, a, word[2 * at], word[2 * at + 1]);
    } else {
      const int group = kPerRow ? 0 : slice * kGroups / kSlices;
      if constexpr (kZero) {
        const u32 zeros = kPerRow ? row_zero[part] : zero[part][group];
        int4_codes(X{}, a, word[at]);
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = sub2(X{}, a[i], __byte_perm(zeros, 0, i % 2 ? 0x3232 : 0x1010));
      } else {
        int4_fragment(X{}, a, word[at]);
      }
      if constexpr (!kPerRow) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = mul2(X{}, a[i], __byte_perm(scale[part][group], 0, i % 2 ? 0x3232 : 0x1010));
      }
    }
  }
};

__device__ __forceinline__ float4 load_remote(u32 address) {
  float4 value;
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

// Eight results of neighbouring out features; `whole` says that n is a multiple of 8.
__device__ __forceinline__ void store_eight(u16* y, const uint4& values, i64 left, bool whole) {
  if (whole) {
    if (left > 0) *reinterpret_cast<uint4*>(y) = values;
  } else {
    const u32 words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < left) y[i] = static_cast<u16>(words[i / 2] >> (16 * (i % 2)));
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, kCtas)
    wgmma_a16(const __grid_constant__ TensorMap x_map, const u8* packed, const u8* scales, const u8* zeros, const u16* bias, u16* y, i64 m,
              i64 n, i64 k, i64 all_blocks, i64 group_size, i64 ring_stages, i64 raster) {
  const Arguments p{packed, scales, zeros, bias, y, m, n, k, all_blocks, group_size, ring_stages, raster};
  extern __shared__ __align__(1024) u8 ring[];
  const int stages = static_cast<int>(p.stages);
  u8* const scale_ring = ring + stages * kStage;
  u8* const staging = scale_ring + stages * kScaleStage;
  u64* const full = reinterpret_cast<u64*>(staging + 2 * kChunk * kChunkPitch);
  u64* const empty = full + kMaxStages;
  u64* const ready = empty + kMaxStages;  // every CTA of the cluster has its partial sums of a tile in shared memory
  u64* const taken = ready + 1;           // every CTA has read what it needs of them

  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int cta = static_cast<int>(cluster_rank()), ctas = static_cast<int>(cluster_size());
  const int rank = kMulticast ? 0 : cta, ranks = kMulticast ? 1 : ctas;  // among those that share K
  const int steps_all = static_cast<int>((p.k + kStep - 1) / kStep);
  const int first_step = steps_all * rank / ranks, steps = steps_all * (rank + 1) / ranks - first_step;
  const int blocks = static_cast<int>(p.blocks);
  Tiles tiles{(blocks + kSharers * kBlocks - 1) / (kSharers * kBlocks), static_cast<int>((p.m + kTokens - 1) / kTokens),
              static_cast<int>(p.raster), static_cast<int>(blockIdx.x) / ctas, static_cast<int>(gridDim.x) / ctas};

  if (warp == kConsumerWarps) {
    if (lane < stages) {
      mbarrier_init(full + lane, 1);
      mbarrier_init(empty + lane, kSharers * kConsumerWarps);
    }
    if (lane == 0) {
      prefetch_tensor_map(&x_map);
      mbarrier_init(ready, ranks * kConsumerWarps);
      mbarrier_init(taken, ranks * kConsumerWarps);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (ctas > 1) cluster_arrive();
  let_next_kernel_start();

  const auto row_tile = [&](const Tiles& tile) { return kMulticast ? tile.row * kSharers + cta : tile.row; };

  if (warp >= kConsumerWarps) {
    decrease_registers<24>();
    if (warp > kConsumerWarps) return;
    // The producer. What is read once must not push out what is read again.
    const u64 weight_policy = tiles.tokens == 1 ? policy_evict_first() : policy_evict_normal();
    const u64 x_policy = tiles.rows == 1 ? policy_evict_first() : policy_evict_normal();
    const int steps_per_group = static_cast<int>(p.group_size / kStep);

    auto wait_until_empty = [&](int stage, u32 parity) {
      if constexpr (kMulticast)
        mbarrier_wait_cluster(empty + stage, parity);
      else
        mbarrier_wait(empty + stage, parity);
    };
    auto fill_weights = [&](int stage, const Tiles& tile, int step) {
      if (elect_one()) {
        const int wanted = row_tile(tile) * kBlocks;
        const int block = wanted < blocks ? wanted : blocks - 1;  // the second of two CTAs may have no rows: it reads any, and stores none
        const int here = blocks - block < kBlocks ? blocks - block : kBlocks;
        const int k_step = first_step + step;
        const int scale_bytes = here * kBlockRows * static_cast<int>(sizeof(ScaleBits));
        mbarrier_arrive_expect(full + stage, kXBytes + here * kBlockBytes + kGroups * (kZero ? 2 : 1) * scale_bytes);
        bulk_copy(ring + stage * kStage + kXBytes, p.packed + (static_cast<i64>(k_step) * blocks + block) * kBlockBytes,
                  here * kBlockBytes, full + stage, weight_policy);
        if constexpr (!kPerRow) {
          const int group = kGroups > 1 ? k_step * kGroups : k_step / steps_per_group;
          u8* to = scale_ring + stage * kScaleStage;
#pragma unroll
          for (int i = 0; i < kGroups; ++i) {
            const i64 from = (static_cast<i64>(group + i) * blocks + block) * kBlockRows * static_cast<int>(sizeof(ScaleBits));
            bulk_copy(to + i * kGroupBytes, p.scales + from, scale_bytes, full + stage, weight_policy);
            if constexpr (kZero)
              bulk_copy(to + (kGroups + i) * kGroupBytes, p.zeros + from, scale_bytes, full + stage, weight_policy);
          }
        }
      }
      __syncwarp();
    };
    auto fill_x = [&](int stage, const Tiles& tile, int step) {
      if (elect_one()) {
#pragma unroll
        for (int i = 0; i < kStep / 64; ++i) {
          u8* to = ring + stage * kStage + i * kBoxBytes;
          const int column = (first_step + step) * kStep + i * 64;
          if constexpr (kMulticast)
            tensor_copy_2d_multicast(to + cta * kShareTokens * 128, &x_map, column, tile.token * kTokens + cta * kShareTokens, full + stage,
                                     (1 << kSharers) - 1, x_policy);
          else
            tensor_copy_2d(to, &x_map, column, tile.token * kTokens, full + stage, x_policy);
        }
      }
      __syncwarp();
    };

    // The first stages, as far as the first tile goes: weights, then x.
    const int early = steps < stages ? steps : stages;
    const bool any = tiles.advance();
    if (any)
      for (int step = 0; step < early; ++step) fill_weights(step, tiles, step);
    wait_for_previous_kernel();
    if constexpr (kMulticast) cluster_wait();  // the other's barriers are initialised
    if (any) {
      for (int step = 0; step < early; ++step) fill_x(step, tiles, step);
      int stage = early == stages ? 0 : early, step = early;
      u32 parity = early == stages ? 0 : 1, tile_parity = 0;
      do {
        for (; step < steps; ++step) {
          wait_until_empty(stage, parity);
          fill_weights(stage, tiles, step);
          fill_x(stage, tiles, step);
          if (++stage == stages) stage = 0, parity ^= 1;
        }
        step = 0;
        // The ring holds the partial sums of a tile. And a CTA stays until nobody reads its shared memory.
        if (ranks > 1) mbarrier_wait_cluster(taken, tile_parity);
        tile_parity ^= 1;
      } while (tiles.advance());
      // Nor goes a CTA whose barriers the other still arrives at.
      if constexpr (kMulticast)
        for (int i = 0; i < stages; ++i) {
          wait_until_empty(stage, parity);
          if (++stage == stages) stage = 0, parity ^= 1;
        }
    }
    return;
  }

  increase_registers<kConsumerRegisters>();
  const int warpgroup = warp / 4, g = lane / 4, t = lane % 4;
  const int first_block = warpgroup * 4 * kParts + warp % 4;  // of this warp in a tile; parts are 4 blocks apart
  const bool whole = p.n % 8 == 0;
  u8* const my_staging = staging + warpgroup * kChunk * kChunkPitch;
  int stage = 0;
  u32 parity = 0, tile_parity = 0;
  Weights weights;
  bool first_tile = true;

  auto load_weights = [&] {
    const u8* codes = ring + stage * kStage + kXBytes + first_block * kBlockBytes + lane * 16;
    const u8* scale = scale_ring + stage * kScaleStage + (first_block * kBlockRows + 2 * g) * static_cast<int>(sizeof(ScaleBits));
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int half = 0; half < Weights::kHalves; ++half)
        weights.words[part][half] = *reinterpret_cast<const uint4*>(codes + part * 4 * kBlockBytes + half * 512);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const u8* from = scale + group * kGroupBytes + part * 64 * static_cast<int>(sizeof(ScaleBits));
        weights.scale[part][group] = load_scales(from);
        if constexpr (kZero) weights.zero[part][group] = load_scales(from + kGroups * kGroupBytes);
      }
    }
  };

  auto release = [&](int stage) {
    if constexpr (kMulticast) {
      if (lane < kSharers) mbarrier_arrive_remote(empty + stage, lane);
    } else {
      if (lane == 0) mbarrier_arrive(empty + stage);
    }
  };

  while (tiles.advance()) {
    const int tile_block = row_tile(tiles) * kBlocks + first_block;
    float acc[kParts][kSums];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) acc[part][i] = 0.0f;
      if constexpr (kPerRow && kZero) {
        const i64 at = static_cast<i64>(tile_block + 4 * part) * kBlockRows + 2 * g;
        weights.row_zero[part] = tile_block + 4 * part < blocks ? load_scales(p.zeros + at * static_cast<int>(sizeof(ScaleBits))) : 0;
      }
    }

    mbarrier_wait(full + stage, parity);
    load_weights();
    int last = stage;
    for (int step = 0; step < steps; ++step) {
      const u32 x_at = shared_address(ring) + stage * kStage;
      const int before = last;
      last = stage;
#pragma unroll
      for (int batch = 0; batch < kBatches; ++batch) {
        u32 a[kBatch][kParts][4];
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
#pragma unroll
          for (int part = 0; part < kParts; ++part) weights.fragment(a[i][part], part, batch * kBatch + i);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int slice = batch * kBatch + i;
          const u64 b = swizzled_descriptor(x_at + slice / 4 * kBoxBytes + slice % 4 * 32);
#pragma unroll
          for (int part = 0; part < kParts; ++part) Wgmma<kTokens>::run(X{}, acc[part], a[i][part], b);
        }
        wgmma_commit();
        if (batch == kBatches - 1) {
          if (++stage == stages) stage = 0, parity ^= 1;
          if (step + 1 < steps) {
            mbarrier_wait(full + stage, parity);
            load_weights();
          }
        }
        wgmma_wait<1>();
        if (batch == 0 && step > 0) release(before);
      }
    }
    wgmma_wait<0>();
    release(last);
    __syncwarp();

    if (first_tile) {
      wait_for_previous_kernel();  // long past; y is written from here on
      if (ranks > 1) cluster_wait();
      first_tile = false;
    }

    // Scale and bias.
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      float factor[2] = {1.0f, 1.0f}, offset[2] = {0.0f, 0.0f};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int block = tile_block + 4 * part;
        const i64 row = static_cast<i64>(block) * kBlockRows + g + 8 * r;
        if constexpr (kPerRow)
          if (block < blocks)
            factor[r] = to_float(Scale{}, reinterpret_cast<const ScaleBits*>(p.scales)[static_cast<i64>(block) * kBlockRows + 2 * g + r]);
        if (p.bias && rank == 0 && row < p.n) offset[r] = to_float(X{}, p.bias[row]);
      }
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        asm volatile("" : "+f"(acc[part][i]));  // nothing moves before the wait
        acc[part][i] = kPerRow ? fmaf(acc[part][i], factor[i / 2 % 2], offset[i / 2 % 2]) : acc[part][i] + offset[i / 2 % 2];
      }
    }

    const i64 token0 = static_cast<i64>(tiles.token) * kTokens, row0 = static_cast<i64>(row_tile(tiles)) * kRows;
    const int tokens = static_cast<int>(p.m - token0 < kTokens ? p.m - token0 : kTokens);
    if (ranks == 1) {
      const i64 first_row = row0 + warpgroup * kRows / 2;
#pragma unroll
      for (int chunk = 0; chunk < kTokens / kChunk; ++chunk) {
        if (chunk * kChunk < tokens) {
          named_barrier(2 + warpgroup, 128);
#pragma unroll
          for (int pair = 0; pair < kChunk / 16; ++pair)
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
              u32 r[4];
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const int at = (chunk * kChunk + pair * 16) / 2 + 2 * i;
                r[i] = from_floats(X{}, acc[part][at], acc[part][at + 1]);
              }
              const int token = pair * 16 + lane / 16 * 8 + lane % 8, row = part * 64 + warp % 4 * 16 + lane / 8 % 2 * 8;
              store_matrix_x4_transposed(shared_address(my_staging) + token * kChunkPitch + row * 2, r);
            }
          named_barrier(2 + warpgroup, 128);
          constexpr int kUnits = 8 * kParts;  // of eight rows
#pragma unroll
          for (int i = threadIdx.x % 128; i < kChunk * kUnits; i += 128) {
            const int unit = i % kUnits, token = i / kUnits;
            if (chunk * kChunk + token < tokens) {
              const i64 row = first_row + unit * 8;
              store_eight(p.y + (token0 + chunk * kChunk + token) * p.n + row,
                          *reinterpret_cast<const uint4*>(my_staging + token * kChunkPitch + unit * 16), p.n - row, whole);
            }
          }
        }
      }
    } else {
      // Every wgmma of both warpgroups has read the ring.
      named_barrier(1, kConsumers);
      float* partial = reinterpret_cast<float*>(ring);
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int i = 0; i < kSums; ++i)
          partial[(i / 4 * 8 + 2 * t + i % 2) * kPartialPitch + (first_block + 4 * part) * kBlockRows + g + i / 2 % 2 * 8] = acc[part][i];
      __syncwarp();
      if (lane < ranks) mbarrier_arrive_remote(ready, lane);
      mbarrier_wait_cluster(ready, tile_parity);
      const int share = kTokens / ranks, first_token = rank * share;
      constexpr int kUnits = kRows / 8;
      for (int i = threadIdx.x; i < share * kUnits; i += kConsumers) {
        const int unit = i % kUnits, token = first_token + i / kUnits;
        if (token < tokens) {
          float4 low{}, high{};
#pragma unroll 4
          for (int source = 0; source < ranks; ++source) {
            const u32 from = map_shared(partial, source) + (token * kPartialPitch + unit * 8) * 4;
            const float4 a = load_remote(from), b = load_remote(from + 16);
            low.x += a.x, low.y += a.y, low.z += a.z, low.w += a.w;
            high.x += b.x, high.y += b.y, high.z += b.z, high.w += b.w;
          }
          const uint4 values{from_floats(X{}, low.x, low.y), from_floats(X{}, low.z, low.w), from_floats(X{}, high.x, high.y),
                             from_floats(X{}, high.z, high.w)};
          const i64 row = row0 + unit * 8;
          store_eight(p.y + (token0 + token) * p.n + row, values, p.n - row, whole);
        }
      }
      fence_async_proxy();  // what the ring receives next comes after
      __syncwarp();
      if (lane < ranks) mbarrier_arrive_remote(taken, lane);
      tile_parity ^= 1;
    }
  }
}
