// 8-bit tokens times a packed weight: y (m, n) = x (m, k) @ w (n, k).T, x int8 or e4m3 with one scale a token (quantize_tokens.cu), w in
// the same codes with one scale a row, or int4 in fragment order with one scale a row or group. Hopper.
//
// A tile is 128 out features by LQ_TOKENS tokens. Tokens are the B operand of wgmma, in shared memory. Weights are the A operand: 8-bit
// ones from shared memory as well, plain rows of the weight; int4 from registers, unpacked to 8 bits by three instructions for eight.
//
// - Warpgroup 0 loads a ring of stages, 128 in features each: weights (warp 0, which does not wait for the previous kernel) and tokens
//   (warp 1). Tensor maps write the 128-byte swizzle, and zeros past the end of a matrix.
// - Warpgroups 1 and 2 multiply 64 out features each.
// - LQ_PROMOTE: the sums of a stage, of two stages where weights have 8 bits, are added up in fp32 registers (times the group's scale,
//   where there is one) before the next products start. This takes a second register for every sum, so a tile has at most 192 tokens
//   (128 with int4); while one warpgroup adds, the other's products run. Otherwise sums stay in the tensor cores' for all of K.
// - LQ_MULTICAST: two CTAs with neighbouring row tiles have the same tokens, and each loads half of them for both. 8 bits take half the
//   time of 16 with as many bytes a product, so what L2 can deliver, not arithmetic, is the first limit. A stage is free when the
//   consumers of both CTAs have released it.
// - Stream-K as in prefill_a16.cu: the first `shared_tiles` tiles are cut into K steps and these into equal runs, one for each of the
//   first `workers` CTAs. CTAs that have a part of a tile leave their sums in a workspace; the last to come adds them up, in the order
//   of K. Nobody waits, so nothing can deadlock. The other tiles are taken whole, CTA after CTA.
// - LQ_ASIDE: a whole tile's results go to two stages of the ring, which the producers pass over, and from there to memory by warp 2, as in
//   prefill_a16.cu.
// - Tiles are numbered in bands of `raster` row tiles, all tokens of a band before the next. With multicast, pairs of CTAs do all this as
//   one, and a tile is a pair of neighbouring row tiles.
//
// Accuracy: int8 sums are exact (K * 127 * 128 < 2^31), and one fp32 rounding when scaled, promoted or not; groups are then added in
// fp32. e4m3 sums: see wgmma_a8.cuh. Bitwise reproducible: the order of all sums is fixed.
//
// A token with the scale NaN gives NaN.
//
// It is long on purpose: one CTA's life from its first copy to its last store, whose parts share sizes and registers.
//
// Compiled with LQ_BITS (4, 8), LQ_CODES (Int8, Fp8), LQ_OUT (Bf16, Fp16: y and bias), LQ_SCALE (Bf16, Fp16, Fp32: of the weight),
// LQ_GROUPED (0: one scale a row; 1: a scale for groups of a multiple of 128 in features; int4 and LQ_PROMOTE only), LQ_LOWEST (0: no int4
// code is -8), LQ_PROMOTE (0, 1), LQ_TOKENS (16, 32, 64, 128, 192, 256) and LQ_MULTICAST (0, 1).

#include "lq/bulk_store.cuh"
#include "lq/stream_k.cuh"
#include "lq/wgmma_a8.cuh"

using namespace lq;

namespace {

using Codes = LQ_CODES;
using Sum = Codes::Sum;
using Out = LQ_OUT;
using Scale = LQ_SCALE;
using ScaleBits = Scale::Bits;

constexpr int kBits = LQ_BITS;
constexpr int kTokens = LQ_TOKENS;
constexpr int kRows = 128;
constexpr bool kGrouped = LQ_GROUPED != 0;
constexpr bool kLowest = LQ_LOWEST != 0;
constexpr bool kPromote = LQ_PROMOTE != 0;
constexpr bool kMulticast = LQ_MULTICAST != 0;
constexpr int kSharers = kMulticast ? 2 : 1;  // CTAs that have the same tokens
static_assert(!kGrouped || (kBits == 4 && kPromote), "a group's scale multiplies sums of its own");

constexpr int kConsumerWarps = kRows / 16;
constexpr int kConsumers = 32 * kConsumerWarps;
constexpr int kThreads = 128 + kConsumers;
constexpr int kConsumerRegisters = 240;  // with 24 of the others as many as at launch (168)
constexpr int kStep = 128;  // in features of a stage: 128 bytes of a token
constexpr int kSlices = kStep / 32;
constexpr int kBlocks = kRows / 16;
constexpr int kBlockBytes = 1024;  // of int4 codes of 16 rows
constexpr int kXBytes = kTokens * kStep;
constexpr int kShareTokens = kTokens / kSharers;  // that one of them loads
constexpr int kWeightBytes = kRows * kStep * kBits / 8;
constexpr int kStage = kXBytes + kWeightBytes;
constexpr int kBlockScaleBytes = kGrouped ? 16 * static_cast<int>(sizeof(ScaleBits)) : 0;
constexpr int kScaleStage = kBlocks * kBlockScaleBytes;
constexpr int kSums = kTokens / 2;  // of a thread
constexpr int kUnits = kTokens / 8;
constexpr int kChunk = kTokens == 16 ? 16 : 32;  // tokens that pass through shared memory at once on their way out
constexpr int kChunkPitch = 144;                 // bytes of 64 results, padded against bank conflicts
constexpr int kStaging = kRows / 64 * kChunk * kChunkPitch;
#define LQ_ASIDE (LQ_TOKENS >= 128)  // as in linear_a8.py, which passes a map of y
constexpr bool kAside = LQ_ASIDE != 0;
using Results = Leaving<kTokens, 2, 1, kConsumers>;  // a stage where tokens were has 64 out features, a warpgroup's

// A thread's int4 codes and scales of a stage.
struct Weights {
  u32 words[2 * kSlices];
  float scale[2];

  __device__ __forceinline__ void load(const u8* codes, const u8* scales) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 v = *reinterpret_cast<const uint4*>(codes + half * 512);
      words[4 * half] = v.x, words[4 * half + 1] = v.y, words[4 * half + 2] = v.z, words[4 * half + 3] = v.w;
    }
    if constexpr (kGrouped)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        scale[r] = to_float(Scale{}, reinterpret_cast<const ScaleBits*>(scales)[r]) * int4_unit(Codes{});
  }

  // The A fragment of k32 step `slice`.
  __device__ __forceinline__ void fragment(u32 (&a)[4], int slice) const {
    int4_rows<kLowest>(Codes{}, a[0], a[1], words[2 * slice]);
    int4_rows<kLowest>(Codes{}, a[2], a[3], words[2 * slice + 1]);
  }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    linear_a8(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap tail_map,
              const __grid_constant__ TensorMap w_map, const u8* packed, const u8* scales, const float* token_scales, const u16* bias,
              u16* y, float4* partials, int* arrivals,
#if LQ_ASIDE
              const __grid_constant__ TensorMap y_map,
#endif
              i64 m, i64 n, i64 k, i64 group_size, i64 ring_stages, LQ_WORK_PARAMETERS) {
  extern __shared__ __align__(1024) u8 ring[];
  const int stages = static_cast<int>(ring_stages);
  u8* const scale_ring = ring + stages * kStage;
  u8* const staging = scale_ring + stages * kScaleStage;
  u64* const full = reinterpret_cast<u64*>(staging + kStaging);
  u64* const empty = full + kMaxStages;
  int* const arrived = reinterpret_cast<int*>(empty + kMaxStages);
  u64* const taken = empty + kMaxStages + 1;  // a tile's results are on their way from the ring

  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

  // What has to be done before the first copies is not hidden: a CTA starts when its predecessor has left. So a warp that has time
  // initialises the barriers, and those that copy find out what.
  if (warp == 2) {
    if (elect_one()) {
      mbarriers_init_ring(full, 2, empty, kSharers * kConsumerWarps * kArrivingLanes, stages);
#if LQ_ASIDE
      mbarrier_init(taken, 1), prefetch_tensor_map(&y_map);
#endif
      mbarrier_init_fence();
    }
    __syncwarp();
  } else if (warp < 2) {
    if (elect_one()) {
      if (warp == 1) prefetch_tensor_map(&x_map);
      if (kBits == 8 && warp == 0) prefetch_tensor_map(&w_map);
    }
    __syncwarp();
  }
  const int rank = kMulticast ? static_cast<int>(cluster_rank()) : 0, cta = static_cast<int>(blockIdx.x) / kSharers;
  const int blocks = static_cast<int>((n + 15) / 16);
  Work work LQ_WORK(cta, static_cast<int>(gridDim.x) / kSharers);
  work.start_with(cta);
  const bool whole = n % 8 == 0 && reinterpret_cast<u64>(y) % 16 == 0;
  const auto aside = [&] { return kAside && whole && work.first == work.last; };
  bool more = work.advance();
  __syncthreads();
  if (warp != 0) {
    if constexpr (kMulticast) barriers_initialised();
    let_next_kernel_start();
  }

  if (warp < 4) {
    decrease_registers<24>();
    int stage = 0;
    u32 parity = 1;
    // The stages that results go to.
    const auto pass_over = [&] {
      for (int i = 0; i < Results::kStages && aside(); ++i) {
        mbarrier_wait(empty + stage, parity);
        if (elect_one()) mbarrier_arrive(full + stage);
        __syncwarp();
        if (++stage == stages) stage = 0, parity ^= 1;
      }
    };
    if (warp == 0) {
      // What is read once must not push out what is read again.
      const u64 policy = work.tokens == 1 ? policy_evict_first() : policy_evict_normal();
      const int steps_per_group = static_cast<int>(group_size / kStep);
      bool said = false;  // that the barriers are initialised: a matter for others, after the first copies
      for (; more; more = work.advance()) {
        const int row = work.row * kSharers + rank, block = row * kBlocks;
        // The second CTA of a pair may have no rows: it multiplies what is in its ring, and stores nothing.
        const int left = blocks - block, here = left < 0 ? 0 : left < kBlocks ? left : kBlocks;
        stage = uniform(stage), parity = uniform(parity);
#pragma unroll 1
        for (int step = work.begin; step < work.end; ++step) {
          mbarrier_wait(empty + stage, parity);
          if constexpr (kBits == 4) fence_async_proxy();
          if (elect_one()) {
            u8* const to = ring + stage * kStage + kXBytes;
            if constexpr (kBits == 8) {
              mbarrier_arrive_expect(full + stage, kWeightBytes);
              tensor_copy_2d(to, &w_map, step * kStep, row * kRows, full + stage, policy);
            } else {
              mbarrier_arrive_expect(full + stage, here * (kBlockBytes + kBlockScaleBytes));
              if (here > 0) {
                bulk_copy(to, packed + (static_cast<i64>(step) * blocks + block) * kBlockBytes, here * kBlockBytes, full + stage, policy);
                if constexpr (kGrouped) {
                  const int group = steps_per_group == 1 ? step : step / steps_per_group;
                  bulk_copy(scale_ring + stage * kScaleStage, scales + (static_cast<i64>(group) * blocks + block) * kBlockScaleBytes,
                            here * kBlockScaleBytes, full + stage, policy);
                }
              }
            }
          }
          __syncwarp();
          if (kMulticast && !said) barriers_initialised();
          said = true;
          if (++stage == stages) stage = 0, parity ^= 1;
        }
        pass_over();
      }
    } else if (warp == 1) {
      const u64 policy = work.rows == 1 ? policy_evict_first() : policy_evict_normal();
      wait_for_previous_kernel();
      if constexpr (kMulticast) wait_for_barriers_of_cluster();
      for (; more; more = work.advance()) {
        stage = uniform(stage), parity = uniform(parity);
        // Only tokens that exist: the copy engine takes as long for a row of zeros as for many that it loads.
        const int token = work.token * kTokens + rank * kShareTokens, left = static_cast<int>(m) - token;
        const int of_tile = static_cast<int>(m) - work.token * kTokens;
        const int expected = (of_tile < kTokens ? of_tile : kTokens) * kStep;
        const TensorMap* const map = left < kShareTokens ? &tail_map : &x_map;
#pragma unroll 1
        for (int step = work.begin; step < work.end; ++step) {
          mbarrier_wait(empty + stage, parity);
          if (elect_one()) {
            mbarrier_arrive_expect(full + stage, expected);
            u8* const to = ring + stage * kStage + rank * kShareTokens * kStep;
            if (left > 0) {
              if constexpr (kMulticast)
                tensor_copy_2d_multicast(to, map, step * kStep, token, full + stage, (1 << kSharers) - 1, policy);
              else
                tensor_copy_2d(to, map, step * kStep, token, full + stage, policy);
            }
          }
          __syncwarp();
          if (++stage == stages) stage = 0, parity ^= 1;
        }
        pass_over();
      }
      // A CTA whose barriers the other still arrives at must not go.
      if constexpr (kMulticast)
        for (int i = 0; i < stages; ++i) {
          mbarrier_wait(empty + stage, parity);
          if (++stage == stages) stage = 0, parity ^= 1;
        }
    }
#if LQ_ASIDE
    else if (warp == 2 && whole) {
      wait_for_previous_kernel();
      for (; more; more = work.advance()) {
        stage = (stage + work.end - work.begin) % stages;
        if (!aside()) continue;
        const int feature = (work.row * kSharers + rank) * kRows, second = (stage + 1) % stages;
#pragma unroll 1
        for (int part = 0; part < Results::kParts; ++part) {
          named_barrier(Results::kBarrier + part, kConsumers + 32);
          const int token = work.token * kTokens + part * Results::kPartTokens;
          if (lane == 0) {
            const u8* const from = ring + part * (Results::kPartTokens * 128);
            if (feature < n && token < m) tensor_store_2d(&y_map, feature, token, from + stage * kStage);
            // A group for each stage, the last part's; others are in the first.
            if (part == Results::kParts - 1) bulk_stores_commit();
            if (feature + 64 < n && token < m) tensor_store_2d(&y_map, feature + 64, token, from + second * kStage);
            if (part == Results::kParts - 1) bulk_stores_commit();
          }
        }
        Results::free<kSharers, kSharers * kConsumerWarps * kArrivingLanes>(empty, stage, stages, lane);
        if (lane == 0) mbarrier_arrive(taken);
      }
    }
#endif
    return;
  }

  increase_registers<kConsumerRegisters>();
  const int block = warp - 4, warpgroup = block / 4, g = lane / 4, t = lane % 4, thread = threadIdx.x - 128;
  const u32 ring_address = kAside ? uniform(shared_address(ring)) : 0;
  u8* const my_staging = staging + warpgroup * kChunk * kChunkPitch;
  const u8* const my_codes = ring + kXBytes + block * kBlockBytes + lane * 16;
  const u8* const my_scales = scale_ring + block * kBlockScaleBytes + 2 * g * static_cast<int>(sizeof(ScaleBits));
  const u64 token_descriptor = swizzled_descriptor(shared_address(ring));
  const u64 row_descriptor = swizzled_descriptor(shared_address(ring) + kXBytes + warpgroup * 64 * kStep);
  int stage = 0;
  u32 parity = 0, turn = 0;  // of the ring, of results that leave through it

  const auto release = [&](int stage) {
    if constexpr (kRacecheck) fence_async_proxy();
    if constexpr (kMulticast && kRacecheck) {
      for (int sharer = 0; sharer < kSharers; ++sharer) mbarrier_arrive_at(empty + stage, sharer);
    } else if constexpr (kMulticast) {
      if (lane < kSharers) mbarrier_arrive_at(empty + stage, lane);
    } else {
      if (lane < kArrivingLanes) mbarrier_arrive(empty + stage);
    }
  };

  // The scales of tokens are read and the workspace and y are written from here on, and tokens cannot come before.
  wait_for_previous_kernel();

  for (; more; more = work.advance()) {
    const i64 row0 = static_cast<i64>(work.row * kSharers + rank) * kRows, token0 = static_cast<i64>(work.token) * kTokens;
    float total[kSums];
    {
      Sum acc[kSums];
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        acc[i] = 0;
        if constexpr (kPromote) total[i] = 0.0f;
      }
      pin_sums(acc);
      stage = uniform(stage), parity = uniform(parity);
      int last = stage;

      if constexpr (kBits == 8) {
        const auto multiply = [&](bool more) {
          const u32 at = uniform(stage) * (kStage / 16);
          mbarrier_wait(full + stage, parity);
          wgmma_fence();
#pragma unroll
          for (int slice = 0; slice < kSlices; ++slice)
            WgmmaA8<kTokens>::run(Codes{}, acc, row_descriptor + at + slice * 2, token_descriptor + at + slice * 2, more || slice > 0);
          wgmma_commit();
        };
        const auto next_stage = [&] {
          last = stage;
          if (++stage == stages) stage = 0, parity ^= 1;
        };
        int step = work.begin;
        if constexpr (kPromote) {
#pragma unroll 1
          do {
            multiply(false);
            next_stage();
            const int first = last;
            const bool second = step + 1 < work.end;
            if (second) {
              multiply(true);
              next_stage();
            }
            wgmma_wait<0>();
            pin_sums(acc);
            release(first);
            if (second) release(last);
#pragma unroll
            for (int i = 0; i < kSums; ++i) total[i] += static_cast<float>(acc[i]);
          } while ((step += 2) < work.end);
        } else {
#pragma unroll 1
          do {
            multiply(true);
            wgmma_wait<1>();
            if (step > work.begin) release(last);
            next_stage();
          } while (++step < work.end);
        }
        if constexpr (!kPromote) {
          wgmma_wait<0>();
          pin_sums(acc);
          release(last);
        }
      } else {
        Weights weights;
        u32 a[kSlices][4];
        mbarrier_wait(full + stage, parity);
        weights.load(my_codes + stage * kStage, my_scales + stage * kScaleStage);
        int step = work.begin;
        if constexpr (kPromote) {
#pragma unroll 1
          do {
            const u64 tokens = token_descriptor + static_cast<u32>(uniform(stage) * (kStage / 16));
#pragma unroll
            for (int i = 0; i < 2 * kSlices; ++i) order_after(weights.words[i]);  // unpacked here, not where they are loaded
#pragma unroll
            for (int slice = 0; slice < kSlices; ++slice) weights.fragment(a[slice], slice);
            wgmma_fence();
#pragma unroll
            for (int slice = 0; slice < kSlices; ++slice) WgmmaA8<kTokens>::run(Codes{}, acc, a[slice], tokens + slice * 2, slice > 0);
            wgmma_commit();
            const float scale[2] = {weights.scale[0], weights.scale[1]};
            __syncwarp();  // all lanes have read what they unpack of the stage, which one will release for all
            last = stage;
            if (++stage == stages) stage = 0, parity ^= 1;
            if (step + 1 < work.end) {
              mbarrier_wait(full + stage, parity);
              weights.load(my_codes + stage * kStage, my_scales + stage * kScaleStage);
            }
            wgmma_wait<0>();
            pin_sums(acc);
            release(last);
#pragma unroll
            for (int i = 0; i < kSums; ++i) {
              const float sum = static_cast<float>(acc[i]);
              total[i] = kGrouped ? fmaf(sum, scale[i / 2 % 2], total[i]) : total[i] + sum;
            }
          } while (++step < work.end);
        } else {
#pragma unroll 1
          do {
            const u64 tokens = token_descriptor + static_cast<u32>(uniform(stage) * (kStage / 16));
            const int before = last;
            last = stage;
#pragma unroll
            for (int slice = 0; slice < kSlices; ++slice) {
              weights.fragment(a[slice], slice);
              wgmma_fence();
              WgmmaA8<kTokens>::run(Codes{}, acc, a[slice], tokens + slice * 2, 1);
              wgmma_commit();
              if (slice == kSlices - 1) {
                __syncwarp();  // all lanes have read what they unpack of `last`, which one will release for all
                if (++stage == stages) stage = 0, parity ^= 1;
                if (step + 1 < work.end) {
                  mbarrier_wait(full + stage, parity);
                  weights.load(my_codes + stage * kStage, my_scales);
                }
              }
              wgmma_wait<2>();  // so that the registers of the next slice's fragment are free
              // Of the stage before, no wgmma is in flight.
              if (slice == 1 && step > work.begin) release(before);
            }
          } while (++step < work.end);
          wgmma_wait<0>();
          pin_sums(acc);
          release(last);
        }
      }
      if constexpr (!kPromote) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) total[i] = static_cast<float>(acc[i]);
      }
    }

    if (work.first < work.last) {
      // Leave this part. The last to come adds up all of them, its own from memory as well: so the order does not depend on who it is.
      const bool cut = work.start(work.first) < work.tile * work.steps;  // the first worker has a tile before this one
      const auto part_of = [&](int worker) {
        const int part = 2 * worker + (cut && worker == work.first);
        return partials + static_cast<i64>(part * kSharers + rank) * (kUnits * kConsumers) + thread;
      };
      float4* const mine = part_of(cta);
      int* const arrival = arrivals + work.tile * kSharers + rank;
#pragma unroll
      for (int j = 0; j < kUnits; ++j)
        __stcg(mine + j * kConsumers, float4{total[4 * j], total[4 * j + 1], total[4 * j + 2], total[4 * j + 3]});
      named_barrier(3, kConsumers);
      if (thread == 0) *arrived = add_acquire_release(arrival, 1);
      named_barrier(3, kConsumers);
      if (uniform(*arrived) < work.last - work.first) continue;
      if (thread == 0) *arrival = 0;  // for the next launch
      constexpr int kAtOnce = kUnits < 4 ? kUnits : 4;
#pragma unroll
      for (int j0 = 0; j0 < kUnits; j0 += kAtOnce) {
        float4 sum[kAtOnce] = {};
#pragma unroll 1
        for (int worker = work.first; worker <= work.last; ++worker) {
          const float4* const from = part_of(worker) + j0 * kConsumers;
          float4 more[kAtOnce];
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) more[j] = __ldcg(from + j * kConsumers);
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j)
            sum[j].x += more[j].x, sum[j].y += more[j].y, sum[j].z += more[j].z, sum[j].w += more[j].w;
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int at = 4 * (j0 + j);
          total[at] = sum[j].x, total[at + 1] = sum[j].y, total[at + 2] = sum[j].z, total[at + 3] = sum[j].w;
        }
      }
    }

    float row_scale[2] = {kGrouped ? 1.0f : 0.0f, kGrouped ? 1.0f : 0.0f}, offset[2] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const i64 row = row0 + block * 16 + g + 8 * r;
      if (row < n) {
        if constexpr (kBits == 8)
          row_scale[r] = to_float(Scale{}, reinterpret_cast<const ScaleBits*>(scales)[row]);
        else if constexpr (!kGrouped)
          row_scale[r] =
              to_float(Scale{}, reinterpret_cast<const ScaleBits*>(scales)[row0 + block * 16 + 2 * g + r]) * int4_unit(Codes{});
        if (bias) offset[r] = to_float(Out{}, bias[row]);
      }
    }

    // Out: so many tokens at a time through shared memory, so that a token's 64 results are one piece of 128 bytes: to staging in rows of
    // kChunkPitch bytes, again and again, or to the ring, in the swizzle of 128 bytes in which the map of y takes it.
    const i64 first_row = row0 + warpgroup * 64;
    const int stored = static_cast<int>(m - token0 < kTokens ? m - token0 : kTokens);
    const bool by_ring = aside();
    const int my_part = block % 4 * 2 + lane / 8 % 2, my_token = lane / 16 * 8 + lane % 8;
    u32 to = shared_address(my_staging) + my_token * kChunkPitch + my_part * 16, pair_bytes = 16 * kChunkPitch, chunk_bytes = 0;
    if (by_ring) {
      int at = stage + warpgroup;
      const bool wraps = at >= stages;
      if (wraps) at -= stages;
      mbarrier_wait(full + at, parity ^ wraps);
      mbarrier_wait(taken, turn ^ 1);
      to = ring_address + at * kStage + my_token * 128 + (my_part ^ lane % 8) * 16;
      pair_bytes = 16 * 128, chunk_bytes = kChunk * 128;
    }
    // Scales of a chunk's tokens, two of each eight, come a chunk ahead.
    constexpr int kPairs = kChunk / 16;
    float token_scale[2][kPairs][2][2];
    const auto fetch = [&](int chunk) {
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = chunk * kChunk + pair * 16 + i / 2 * 8 + 2 * t + i % 2;
          token_scale[chunk % 2][pair][i / 2][i % 2] = token < stored ? token_scales[token0 + token] : 0.0f;
        }
    };
    fetch(0);
#pragma unroll
    for (int chunk = 0; chunk < kTokens / kChunk; ++chunk) {
      if (chunk * kChunk >= stored) {
        if (!by_ring) break;
        Results::leave<kChunk>(chunk);
        continue;
      }
      if (chunk + 1 < kTokens / kChunk) fetch(chunk + 1);
      if (!by_ring) named_barrier(1 + warpgroup, 128);
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        u32 r[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          // Eight tokens: two of this lane, in rows g and g + 8.
          const float* sums = total + (chunk * kChunk / 8 + pair * 2 + i) * 4;
          const float(&scale)[2] = token_scale[chunk % 2][pair][i];
#pragma unroll
          for (int row = 0; row < 2; ++row)
            r[2 * i + row] = from_floats(Out{}, fmaf(sums[2 * row] * scale[0], row_scale[row], offset[row]),
                                         fmaf(sums[2 * row + 1] * scale[1], row_scale[row], offset[row]));
        }
        store_matrix_x4_transposed(to + chunk * chunk_bytes + pair * pair_bytes, r);
      }
      if (by_ring) {
        Results::leave<kChunk>(chunk);
        continue;
      }
      named_barrier(1 + warpgroup, 128);
#pragma unroll
      for (int i = thread % 128; i < kChunk * 8; i += 128) {
        const int token = i / 8, part = i % 8;
        if (chunk * kChunk + token < stored) {
          const i64 row = first_row + part * 8;
          store_eight(y + (token0 + chunk * kChunk + token) * n + row,
                      *reinterpret_cast<const uint4*>(my_staging + token * kChunkPitch + part * 16), n - row, whole);
        }
      }
    }
    if (by_ring) {
      turn ^= 1;
#pragma unroll
      for (int i = 0; i < Results::kStages; ++i)
        if (++stage == stages) stage = 0, parity ^= 1;
    }
  }
}
