// A few tokens times a packed weight: y (m, n) = x (m, k) @ w (n, k).T for int4 and int8 weights in fragment order. Hopper.
//
// At this size the time is that of reading the weight once, so everything serves one stream of bytes that never pauses:
//
// - A producer warp fills a ring of stages (up to 16 KB of codes and their scales each) by bulk copies. Weights do not depend on
//   the previous kernel: the ring is filled while that kernel still runs. Filling it takes a microsecond to issue, so another warp
//   waits for that kernel and brings x.
// - Rows are shared among clusters in blocks of 16, which balances any matrix; the CTAs of a cluster share K. A CTA's part of x
//   is loaded once and stays in shared memory; or, where that would leave no room for the next kernel's CTAs, x passes by with the
//   weights (LQ_STREAMED): a stage has room for the x of its K steps, which comes when the previous kernel has ended.
// - Eight warps multiply on the tensor cores, weights as the A operand (16 rows a warp), tokens as columns. A lane's codes
//   are 16 consecutive bytes; unpacking is 9 instructions for 8 codes and exact. A group's scale multiplies the fp32 sum.
//   Few warps a scheduler hide little latency, so codes are loaded half a stage ahead. A warp has two K steps of a block in a
//   stage, or a step of two blocks (LQ_WARP_BLOCKS), which halves what it reads of x: with 16 tokens that is four times as many bytes
//   as codes. Zeros of x's type take the place of 8 where codes are unpacked, at no instruction more: exactly where they are integers,
//   else u - zero is rounded once. Others, and minima, multiply sums of x, which are the same for all rows: each is computed once, when its
//   chunk of x has come.
// - Partial sums go to the CTA that owns the row through distributed shared memory and are added in the order of K. No atomics,
//   no workspace in global memory, nothing to reset: results are bitwise reproducible, and a token's result does not depend on
//   the other tokens.
//
// A cluster walks through its rows in passes of `slots` blocks (a power of two, 8 a warp's blocks at most); the last has the least power
// of two that holds the rest, as an empty slot takes as long as another. A stage holds the blocks of a pass at 16 / slots consecutive K
// steps: two for each warp. A step is 128 in features for int4 and 64 for int8, 1 KB a block.
//
// It is long on purpose: one CTA's life from its first copy to its last store, whose parts share sizes and registers.
//
// Compiled with LQ_BITS (4, 8), LQ_X (Bf16, Fp16), LQ_SCALE (Bf16, Fp16, Fp32: the type of scales and zeros), LQ_GROUPS (groups in
// a step: 1, 2, 4; 0: one scale a row), LQ_ZERO (0, 1; 2: minima of groups, weights are u * scale + minimum), LQ_TILES (tiles of 8
// tokens: 1, 2), LQ_WARP_BLOCKS (1, 2), LQ_CTAS (CTAs of a multiprocessor that registers must do for), LQ_TRANSPOSED (1: y is fp32
// (n, m), as ggml's products are here; 0), LQ_RESIDUAL (1: `residual` (m, n) is added before y is rounded; 0), LQ_GATED (1: rows of a
// gate and an up projection alternate by eights, y (m, n) is silu(gate) * up of the fp32 sums, and bias has n values for gates, then n
// for ups; 0), LQ_STREAMED (1: x passes by, all passes have as many slots, there are two at most, and k is a multiple of a step; 0), and
// LQ_TOKENS_INT8 (1: x is what fragment_q8_1.cu makes: int8 in groups of 32, with a float each. Products are of
// integers, and exact; a group's sum is multiplied by that float and the weight's scale. Int4 in groups of 32; 0); and with LQ_QUANTIZED
// (Bf16, Fp16, Fp32) where x, of that type, becomes that in shared memory: the warps that multiply quantize their CTA's part of it.
// LQ_FEW (1: 4 int8 tokens in a tile at most, each in two columns, of which a lane scales the sums of one: 69 instructions for 16 rows x
// 128 in features in place of 92, and of 116 with tokens of 16 bits; 0).

#include "lq/dequantize.cuh"
#include "lq/epilogue.cuh"
#include "lq/hopper.cuh"
#include "lq/q8_1.cuh"

using namespace lq;

namespace {

using X = LQ_X;
using Scale = LQ_SCALE;
using ScaleBits = Scale::Bits;

constexpr int kBits = LQ_BITS;
constexpr int kGroups = LQ_GROUPS;
constexpr bool kZero = LQ_ZERO != 0;
constexpr bool kMinimum = LQ_ZERO == 2;  // what is said of zeros is of minima
constexpr bool kPerRow = kGroups == 0;
// Zeros of x's type are subtracted from the codes, in place of 8. Others, and minima, would be rounded before: they multiply sums of x.
constexpr bool kZeroOfCodes = kZero && !kMinimum && kSame<X, Scale>;
constexpr bool kSums = kZero && !kZeroOfCodes;
static_assert(!kZero || kBits == 4, "int8 weights have no zeros");
static_assert(!kMinimum || (kBits == 4 && !kPerRow), "minima: 4 bits in groups");
#ifndef LQ_TRANSPOSED
#define LQ_TRANSPOSED 0
#endif
constexpr bool kTransposed = LQ_TRANSPOSED != 0;
#ifndef LQ_GATED
#define LQ_GATED 0
#endif
constexpr bool kGated = LQ_GATED != 0;
constexpr int kFeatureRows = kGated ? 2 : 1;  // of the weight, for an out feature
#ifndef LQ_RESIDUAL
#define LQ_RESIDUAL 0
#endif
constexpr bool kResidual = LQ_RESIDUAL != 0;
static_assert(kTransposed + kGated + kResidual < 2, "one epilogue");
#ifndef LQ_WARP_BLOCKS
#define LQ_WARP_BLOCKS 1
#endif
constexpr int kWarpBlocks = LQ_WARP_BLOCKS, kWarpSteps = 2 / kWarpBlocks;  // of a warp in a stage
#ifdef LQ_QUANTIZED
constexpr bool kQuantizes = true;
using Given = LQ_QUANTIZED;
#else
constexpr bool kQuantizes = false;
using Given = X;
#endif
#ifndef LQ_TOKENS_INT8
#define LQ_TOKENS_INT8 0
#endif
constexpr bool kTokensInt8 = LQ_TOKENS_INT8 != 0 || kQuantizes;
#ifndef LQ_FEW
#define LQ_FEW 0
#endif
constexpr bool kFew = LQ_FEW != 0;
static_assert(!kFew || (kTokensInt8 && LQ_TILES == 1), "few tokens: a tile of int8");
static_assert(!kTokensInt8 || (kBits == 4 && kGroups == 4 && !kZero), "int8 tokens: symmetric int4 in groups of 32");
#ifndef LQ_STREAMED
#define LQ_STREAMED 0
#endif
constexpr bool kStreamed = LQ_STREAMED != 0;
static_assert(!kStreamed || (!kQuantizes && !kSums), "x that passes by is multiplied as it comes, and not added up");

constexpr int kColumns = kFew ? 1 : 2;  // of a tile's eight, that a lane has sums of
constexpr int kWarps = 8;  // that multiply; warp 8 is the producer, warp 9 brings x and is the epilogue of all passes but the last
constexpr int kConsumers = kWarps * 32;
constexpr int kThreads = kConsumers + 64;
constexpr int kChunks = kSums ? 4 : 16;  // pieces of a CTA's share of x, at most: multiplication begins with the first
constexpr int kHeader = 512;             // bytes, of mbarriers and the magic number
constexpr int kMagicAt = kHeader - 16;   // where sums of integers begin: from memory, as the assembler makes constants anew for every step
static_assert((2 * kMaxStages + kChunks + 4) * static_cast<int>(sizeof(u64)) <= kMagicAt, "mbarriers do not fit");
constexpr int kBlockRows = 16;
constexpr int kBlockBytes = 1024;                // of codes in a K step
constexpr int kStep = kBits == 4 ? 128 : 64;     // in features
constexpr int kHalfQuads = kStep / 64;           // pieces of 32 in features (one ldmatrix.x4 of tokens) in half a step
constexpr int kScaleBytes = kBlockRows * static_cast<int>(sizeof(ScaleBits));  // of a block and group
constexpr int kStepScales = kGroups * kScaleBytes;                             // of a block and step, which lie together
constexpr int kSlotScales = kStepScales * (kZero ? 2 : 1);                     // ... and its zeros
constexpr int kStage = 2 * kWarps * (kBlockBytes + kSlotScales);
constexpr int kScaleCount = kPerRow ? 1 : kGroups;
constexpr int kTokenSums = kSums ? kScaleCount : 0;  // of x in a step, for a token
constexpr bool kSumsAtOnce = kSums && kGroups > 1;  // of a step, by the tensor cores
constexpr float kUnit = kTokensInt8 ? 0.0625f : kZeroOfCodes ? zero_unit(X{}) : fragment_unit(X{});  // what is left to multiply sums with

template <int kValue>
struct Int {
  static constexpr int value = kValue;
};

struct Arguments {
  const u8* x;
  const u8* packed;
  const u8* scales;
  const u8* zeros;
  const u16* bias;
  const u16* residual;
  u16* y;
  i64 m, n, k;
  i64 blocks;      // of 16 rows: `cluster_blocks` for a cluster, one more for each of the first `more_blocks`
  i64 cluster_blocks, more_blocks;
  i64 last_pass;   // log2 of its slots, and 256 times that of clusters with a block more
  i64 group_size;  // used where a group is a whole number of steps
  i64 slots;       // blocks in a pass, at most
  i64 stages;
  i64 boxes;  // 1 where every cluster has one pass, else 2
  i64 pitch;  // bytes from token to token of x in shared memory
};

// Sums of a group of in features, not scaled yet; two chains where few tokens would leave the tensor cores waiting, and there are
// registers.
template <int kTokenTiles>
struct Sums {
  static constexpr int kChains = (kTokenTiles == 1 && kGroups != 4) || (kTokenTiles == 2 && kWarpBlocks == 1 && kGroups < 2) ? 2 : 1;
  float part[kChains][kTokenTiles][4];
  float scale[2];  // of rows g and g + 8

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int c = 0; c < kTokenTiles; ++c)
#pragma unroll
      for (int j = 0; j < 4; ++j) part[0][c][j] = part[kChains - 1][c][j] = 0.0f;
  }

  // Add them, scaled, to acc.
  __device__ __forceinline__ void finish(float (&acc)[kTokenTiles][4]) const {
#pragma unroll
    for (int c = 0; c < kTokenTiles; ++c)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float sum = part[0][c][j];
        if constexpr (kChains == 2) sum += part[1][c][j];
        acc[c][j] = fmaf(scale[j / 2], sum, acc[c][j]);
      }
  }
};

// Zeros, or minima, to what two rows' weights are more than (u - 8) * scale.
__device__ __forceinline__ void excess(float (&zero)[2], const float (&scale)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) zero[r] = kMinimum ? fmaf(8.0f, scale[r], zero[r]) : (8.0f - zero[r]) * scale[r];
}

// Holds a value in a register: the compiler would else compute it again in every round of a loop.
template <typename Value>
__device__ __forceinline__ void keep(Value& value) {
  asm("" : "+r"(value));
}

__device__ __forceinline__ u32 load_word(u32 address) {
  u32 value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ float load_float(u32 address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ void load_words_x4(u32 (&words)[4], u32 address) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// Eight unsigned int4 codes u to 16 (u - 8) in int8: four of row g, and four of row g + 8.
__device__ __forceinline__ void int4_to_int8(u32& low, u32& high, u32 word) {
  low = and_xor(word << 4, 0xf0f0f0f0u, 0x80808080u);
  high = and_xor(word, 0xf0f0f0f0u, 0x80808080u);
}

// A pass over the rows: what its power of two of slots makes of a stage, which has 16 places of 1 KB.
struct Pass {
  int log_slots;

  __device__ __forceinline__ int slots() const { return 1 << log_slots; }
  __device__ __forceinline__ int k_parts() const { return kWarps * kWarpBlocks >> log_slots; }  // warps that share a block's K
  __device__ __forceinline__ int stage_steps() const { return 16 >> log_slots; }
  __device__ __forceinline__ int stages(int steps) const { return (steps + stage_steps() - 1) >> (4 - log_slots); }
};

// Bytes of so many steps of a token.
template <typename Count>
__device__ constexpr Count x_bytes(Count steps) {
  return steps * (kTokensInt8 ? kQ8_1StepBytes : kStep * 2);
}

template <int kTokenTiles>
__device__ __forceinline__ void decode(const Arguments& p) {
  constexpr int kTokens = 8 * kTokenTiles;
  // Floats; padded against bank conflicts. A row's sums of two tiles lie as a thread has them, two of each.
  constexpr bool kPairs = kTokenTiles == 2;
  constexpr int kPitch = kTokens + (kPairs ? 4 : 2), kBuffer = 128 * kWarpBlocks * kPitch;
  extern __shared__ __align__(128) u8 shared[];
  u64* full = reinterpret_cast<u64*>(shared);
  u64* empty = full + kMaxStages;
  u64* x_full = empty + kMaxStages;
  u64* received = x_full + kChunks;  // two: a pass's sums are in the inbox
  u64* released = received + 2;      // two: every CTA has read them
  u8* ring = shared + kHeader;
  const int stages = static_cast<int>(p.stages), pitch = static_cast<int>(p.pitch);
  // Of a stage: weights, and x of the same steps if it passes by with them.
  const int most_tokens = static_cast<int>(p.m < kTokens ? p.m : kTokens);
  const int stage_bytes = kStage + (kStreamed ? (most_tokens * pitch + 127) / 128 * 128 : 0);

  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int rank = static_cast<int>(cluster_rank()), ranks = static_cast<int>(cluster_size());

  // What comes before the first copies is a large part of a launch's life: a CTA often starts when its predecessor has left. So warps that
  // have time initialise the barriers, while the others find out what to copy.
  if (warp < 4) {
    if (elect_one()) {
      if (warp == 0) mbarriers_init_ring(full, kStreamed ? 2 : 1, empty, kWarps * kArrivingLanes, stages);
      if (!kStreamed && !kQuantizes && warp == 1) mbarriers_init<kChunks>(x_full, 1);
      if (kTokensInt8 && warp == 2) *reinterpret_cast<uint4*>(shared + kMagicAt) = uint4{kMagicBits, kMagicBits, kMagicBits, kMagicBits};
      if (warp == 3) {
        mbarriers_init<2>(received, ranks > 1 ? 1 : 1 + kWarps * kArrivingLanes);
        mbarriers_init<2>(released, ranks * kArrivingLanes);
      }
      mbarrier_init_fence();
    }
    __syncwarp();
  }

  const int log_ranks = __ffs(ranks) - 1;  // cluster sizes are powers of two, and so are slots
  const int steps_all = static_cast<int>((p.k + kStep - 1) / kStep);
  const int first_step = steps_all * rank >> log_ranks, steps = (steps_all * (rank + 1) >> log_ranks) - first_step;
  const int blocks = static_cast<int>(p.blocks);
  const int cluster = static_cast<int>(blockIdx.x) >> log_ranks, more_blocks = static_cast<int>(p.more_blocks);
  const int first_block = cluster * static_cast<int>(p.cluster_blocks) + (cluster < more_blocks ? cluster : more_blocks);
  const int my_blocks = static_cast<int>(p.cluster_blocks) + (cluster < more_blocks);
  const int slots = static_cast<int>(p.slots), log_slots = __ffs(slots) - 1;
  const int passes = (my_blocks + slots - 1) >> log_slots;  // every pass but the last is full, which has no more slots than it needs
  const Pass full_pass{log_slots}, last_pass{static_cast<int>(p.last_pass) >> (cluster < more_blocks ? 8 : 0) & 0xff};
  auto pass_of = [&](int pass) { return pass + 1 < passes ? full_pass : last_pass; };
  const int total = (passes - 1) * full_pass.stages(steps) + last_pass.stages(steps);  // stages of all passes, 0 of no blocks

  __syncthreads();  // one for all: synccheck reports warps that wait at places of their own

  if (warp == kWarps) {
    // The producer. Control flow and addresses are uniform, so that copies are issued without a loop over lanes.
    const u64 policy = policy_evict_first();
    const int steps_per_group = static_cast<int>(p.group_size / kStep);
    const i64 code_pitch = static_cast<i64>(blocks) * kBlockBytes, scale_pitch = static_cast<i64>(blocks) * kStepScales;
    int stage = 0, filled = 0, block = first_block, left = my_blocks, step = 0;
    Pass now = pass_of(0);
    u32 parity = 1;  // of the empty barrier to wait for, from the second round on

    // One loop for the ring's first round and the others: its instructions come from memory too.
#pragma unroll 1
    for (; filled < total; ++filled) {
      const int stride = now.slots(), here = left < stride ? left : stride;
      const int parts = steps - step < now.stage_steps() ? steps - step : now.stage_steps();
      if (filled >= stages) {
        mbarrier_wait(empty + stage, parity);
        fence_async_proxy();
      }
      if (elect_one()) {
        mbarrier_arrive_expect(full + stage, parts * here * (kBlockBytes + kSlotScales));
        // Copies are issued as fast as their addresses are there: the next ones by an addition.
        int k_step = first_step + step, group_steps = 0;
        u8* to = ring + stage * stage_bytes;
        u8* scale_to = to + 2 * kWarps * kBlockBytes;
        const u8* from = p.packed + (static_cast<i64>(k_step) * blocks + block) * kBlockBytes;
        i64 scale_from = 0;
        if constexpr (!kPerRow) {
          const int group = kGroups > 1 || steps_per_group == 1 ? k_step : k_step / steps_per_group;  // or all of a step
          if (kGroups == 1 && steps_per_group > 1) group_steps = steps_per_group - (k_step - group * steps_per_group);
          scale_from = (static_cast<i64>(group) * blocks + block) * kStepScales;
        }
#pragma unroll 2
        for (int part = 0; part < parts; ++part) {
          bulk_copy(to, from, here * kBlockBytes, full + stage, policy);
          to += stride * kBlockBytes, from += code_pitch;
          if constexpr (!kPerRow) {
            bulk_copy(scale_to, p.scales + scale_from, here * kStepScales, full + stage, policy);
            if constexpr (kZero)
              bulk_copy(scale_to + stride * kStepScales, p.zeros + scale_from, here * kStepScales, full + stage, policy);
            scale_to += stride * kSlotScales;
            if (kGroups > 1 || steps_per_group == 1)
              scale_from += scale_pitch;
            else if (--group_steps == 0)
              scale_from += scale_pitch, group_steps = steps_per_group;
          }
        }
      }
      __syncwarp();
      step += now.stage_steps();
      if (step >= steps) {
        step = 0, block += slots, left -= slots;
        if (left <= full_pass.slots()) now = last_pass;
      }
      if (++stage == stages) stage = 0, parity ^= 1;
      if (filled == 0) barriers_initialised();
    }
    return;
  }

  float* inbox = reinterpret_cast<float*>(ring + stages * stage_bytes);  // buffers of sums of the warps' rows x kTokens, by source
  u8* tokens = reinterpret_cast<u8*>(inbox + p.boxes * kBuffer);
  const i64 token0 = static_cast<i64>(blockIdx.y) * kTokens;
  const int m = static_cast<int>(p.m - token0 < kTokens ? p.m - token0 : kTokens);
  float* token_sums = reinterpret_cast<float*>(tokens + m * p.pitch);  // by step, group and token
  const int chunk_stages = (pass_of(0).stages(steps) + kChunks - 1) / kChunks, chunk_steps = chunk_stages * pass_of(0).stage_steps();
  const i64 k_left = p.k - static_cast<i64>(first_step) * kStep;
  const int k_here = static_cast<int>(k_left < 0 ? 0 : k_left < steps * kStep ? k_left : steps * kStep);  // in features of x
  const int token_pairs = (m + 1) / 2, part_of_buffer = kBuffer >> log_ranks;

  barriers_initialised();
  let_next_kernel_start();

  // Add what the CTAs of the cluster sent of a pass's rows that this one owns, and store it; `count` threads share the work.
  auto finish = [&](int pass, int thread, int count) {
    const Pass now = pass_of(pass);
    const int box = pass % 2, sources = ranks * now.k_parts();
    const int owned_shift = now.log_slots + 4 - log_ranks, owned_rows = 1 << owned_shift;
    if (thread == 0)
      mbarrier_arrive_expect(received + box, ranks > 1 ? kWarps * kWarpBlocks * kBlockRows * (kPairs ? 64 : token_pairs * 8) : 0);
    mbarrier_wait(received + box, pass / 2 % 2);
    const int rows_left = (my_blocks - pass * slots) * kBlockRows - rank * owned_rows;
    const i64 row0 = static_cast<i64>(first_block + pass * slots) * kBlockRows + rank * owned_rows;
    for (int i = thread; i < owned_rows / kFeatureRows * token_pairs; i += count) {
      const int row = kFeatureRows * (i & (owned_rows / kFeatureRows - 1)), token = 2 * (i >> (owned_shift - kGated));
      const float* from = inbox + box * kBuffer + row * kPitch + (kPairs ? token % 8 * 2 + token / 8 * 2 : token);
      float total[kFeatureRows][2] = {};
#pragma unroll 4
      for (int s = 0; s < sources; ++s)
#pragma unroll
        for (int r = 0; r < kFeatureRows; ++r) {
          const float2 value = *reinterpret_cast<const float2*>(from + ((s << owned_shift) + r) * kPitch);
          total[r][0] += value.x;
          total[r][1] += value.y;
        }
      const i64 feature = (row0 + row) / kFeatureRows;
      if (row < rows_left && feature < p.n) {
        const float bias = p.bias ? to_float(X{}, p.bias[feature]) : 0.0f;
        if constexpr (kTransposed) {
          float* to = reinterpret_cast<float*>(p.y) + feature * p.m + token0 + token;
          to[0] = total[0][0] + bias;
          if (token + 1 < m) to[1] = total[0][1] + bias;
        } else {
          u16* to = p.y + (token0 + token) * p.n + feature;
          float result[2] = {total[0][0] + bias, total[0][1] + bias};
          if constexpr (kGated) {
            const float up_bias = p.bias ? to_float(X{}, p.bias[p.n + feature]) : 0.0f;
            result[0] = silu_multiply(result[0], total[kFeatureRows - 1][0] + up_bias);
            result[1] = silu_multiply(result[1], total[kFeatureRows - 1][1] + up_bias);
          }
          if constexpr (kResidual) {
            const u16* add = p.residual + (token0 + token) * p.n + feature;
            result[0] += to_float(X{}, add[0]);
            if (token + 1 < m) result[1] += to_float(X{}, add[p.n]);
          }
          to[0] = from_float(X{}, result[0]);
          if (token + 1 < m) to[p.n] = from_float(X{}, result[1]);
        }
      }
    }
  };

  auto tile_tokens = [&](int c) { return m - 8 * c < 8 ? m - 8 * c : 8; };  // of int8 tokens, whose tiles lie one after another

  if (warp == kWarps + 1) {
    const u64 keep = policy_evict_last();
    // Steps [step, step + parts) of this CTA's share of x to where they lie in `to`: in a stage at its start.
    auto bring = [&](u64* barrier, u8* to, int step, int parts) {
      if (elect_one()) {
        const int in_place = kStreamed ? 0 : x_bytes(step);
        if constexpr (kTokensInt8) {
          mbarrier_arrive_expect(barrier, m * x_bytes(parts));
#pragma unroll
          for (int c = 0; c < kTokenTiles; ++c) {
            const int here = tile_tokens(c);
            const u8* const from = p.x + x_bytes((token0 + 8 * c) * steps_all + static_cast<i64>(first_step + step) * here);
            if (here > 0) bulk_copy(to + 8 * c * pitch + in_place * here, from, x_bytes(parts) * here, barrier, keep);
          }
        } else {
          const int end = (step + parts) * kStep, bytes = ((kStreamed || end < k_here ? end : k_here) - step * kStep) * 2;
          mbarrier_arrive_expect(barrier, m * bytes);
          const u8* from = p.x + (token0 * p.k + static_cast<i64>(first_step + step) * kStep) * 2;
          to += in_place;
#pragma unroll 4
          for (int token = 0; token < m; ++token, from += p.k * 2, to += pitch) bulk_copy(to, from, bytes, barrier, keep);
        }
      }
      __syncwarp();
    };
    wait_for_previous_kernel();
    if constexpr (kStreamed) {
      // As the producer does, to the same barriers.
      int stage = 0, step = 0;
      u32 parity = 1;
#pragma unroll 1
      for (int filled = 0; filled < total; ++filled) {
        if (filled >= stages) {
          mbarrier_wait(empty + stage, parity);
          fence_async_proxy();
        }
        const int most = full_pass.stage_steps();
        bring(full + stage, ring + stage * stage_bytes + kStage, step, steps - step < most ? steps - step : most);
        step += most;
        if (step >= steps) step = 0;
        if (++stage == stages) stage = 0, parity ^= 1;
      }
    } else if constexpr (!kQuantizes) {
#pragma unroll 1
      for (int chunk = 0, step = 0; step < steps; ++chunk, step += chunk_steps)
        bring(x_full + chunk, tokens, step, steps - step < chunk_steps ? steps - step : chunk_steps);
    }
    wait_for_barriers_of_cluster();
    for (int pass = 0; pass + 1 < passes; ++pass) {
      finish(pass, lane, 32);
      __syncwarp();
      // Nobody waits for the last two passes, and the CTAs may have gone.
      if constexpr (kRacecheck) {
        for (int owner = 0; pass + 2 < passes && owner < ranks; ++owner) mbarrier_arrive_remote(released + pass % 2, owner);
      } else {
        if (pass + 2 < passes && lane < ranks) mbarrier_arrive_remote(released + pass % 2, lane);
      }
    }
    return;
  }

  // The consumers. In features past the end are read, and must be zero.
  if constexpr (kQuantizes) {
    wait_for_previous_kernel();
    // Halves of blocks, token by token: a thread always has the same of a step. Loads take longer than the rest, so several are on
    // their way at once.
    constexpr int kAtOnce = 4, kSteps = kConsumers / kQ8_1StepHalves;
    using Half = Q8_1Half<Given>;
    const int mine = lane % kQ8_1StepHalves, exist = k_here / 16;
    const Q8_1Place place(mine, m);
    const u8* const from = p.x + (token0 * p.k + static_cast<i64>(first_step) * kStep) * Half::kElement;
    int token = 0, step = static_cast<int>(threadIdx.x) / kQ8_1StepHalves;
#pragma unroll 1
    for (int first = warp * (32 / kQ8_1StepHalves); first < m * steps; first += kAtOnce * kSteps) {
      Half values[kAtOnce] = {};
      int tokens_here[kAtOnce], steps_here[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i, step += kSteps) {
        while (step >= steps && token < m) step -= steps, ++token;
        const int half = step * kQ8_1StepHalves + mine;
        if (token < m && half < exist) values[i].load(from + (token * p.k + half * 16) * Half::kElement);
        tokens_here[i] = token, steps_here[i] = step;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i * kSteps >= m * steps) break;
        const Q8_1Fragment made = values[i].quantize();
        if (tokens_here[i] < m) made.store(tokens + steps_here[i] * x_bytes(m), tokens_here[i], place);
      }
    }
    named_barrier(1, kConsumers);
  } else if constexpr (!kStreamed && !kTokensInt8) {
    for (int token = warp; token < m; token += kWarps)
      for (int unit = k_here / 8 + lane; unit < steps * kStep / 8; unit += 32)
        *reinterpret_cast<uint4*>(tokens + token * p.pitch + unit * 16) = uint4{0, 0, 0, 0};
    named_barrier(1, kConsumers);
  }

  const int g = lane / 4, t = lane % 4;
  auto slot_of = [&](Pass pass) { return kWarpBlocks * warp & (pass.slots() - 1); };
  auto step_of = [&](Pass pass) { return kWarpSteps * (kWarpBlocks * warp >> pass.log_slots); };  // of a stage, this warp's first
  auto codes_of = [&](Pass pass) { return (step_of(pass) * pass.slots() + slot_of(pass)) * kBlockBytes + lane * 16; };
  // This lane's row of a token tile, in a stage if x passes by; a token that does not exist reads the last, its sums are not stored.
  // Of int8 tokens: 16 bytes of column g's in half a step, and where the floats of columns 2 t and 2 t + 1 are from there.
  u32 tokens_at[kTokenTiles], half_step[kTokenTiles], whole_step[kTokenTiles], to_floats[kTokenTiles][2];
#pragma unroll
  for (int c = 0; kTokensInt8 && c < kTokenTiles; ++c) {
    const int tile = 8 * c < m ? c : 0, last = tile_tokens(tile) - 1, column = kFew ? g / 2 : g, mine = column < last ? column : last;
    half_step[c] = 64 * (last + 1), whole_step[c] = kQ8_1StepBytes * (last + 1);
    tokens_at[c] = (kStreamed ? kStage : shared_address(tokens)) + 8 * tile * static_cast<u32>(pitch) + mine * 64 + t * 16;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int token = kColumns * t + j;
      to_floats[c][j] = 2 * half_step[c] + (token < last ? token : last) * 16 - (mine * 64 + t * 16);
      keep(to_floats[c][j]);
    }
    keep(half_step[c]), keep(whole_step[c]);
  }
  u32 magic[4];
  if constexpr (kTokensInt8) load_words_x4(magic, shared_address(shared) + kMagicAt);
#pragma unroll
  for (int c = 0; !kTokensInt8 && c < kTokenTiles; ++c) {
    const int token = c * 8 + lane % 8;
    tokens_at[c] = (kStreamed ? kStage : shared_address(tokens)) + (token < m ? token : m - 1) * static_cast<u32>(pitch) + lane / 8 * 16;
  }

  int stage = 0, next_chunk = 0;
  u64* chunk_ready = x_full;
  u32 parity = 0, stage_at = shared_address(ring), at_codes, next_codes;  // this lane's codes in a stage, and from a step to the next
  auto enter = [&](Pass pass) {
    at_codes = codes_of(pass), next_codes = pass.slots() * kBlockBytes;
    keep(at_codes), keep(next_codes);
  };
  u32 words[2][2][4];  // this lane's codes of a stage: two steps, or blocks, of two halves

  const u32 my_sums = shared_address(token_sums) + (kSumsAtOnce ? g : 2 * t) * 4;

  // Sums of x over the groups of steps [from, to), as fragments are, for all rows and passes: products with ones.
  auto sum_tokens = [&](int from, int to) {
    constexpr int kGroupQuads = 2 * kHalfQuads / kScaleCount;
    const u32 one = ones2(X{}), ones[4] = {one, one, one, one};
#pragma unroll 1
    for (int step = from + warp; step < to; step += kWarps)
#pragma unroll
      for (int c = 0; c < kTokenTiles; ++c) {
        u32 at = tokens_at[c] + step * kStep * 2;
        order_after(at);
#pragma unroll
        for (int group = 0; group < kTokenSums; ++group) {
          float low[4], high[4];  // every row of them is the same
#pragma unroll
          for (int quad = 0; quad < kGroupQuads; ++quad) {
            u32 b[4];
            load_matrix_x4(b, at + (group * kGroupQuads + quad) * 64);
            if (quad == 0) {
              mma_k16_first(X{}, low, ones, b[0], b[1]);
              mma_k16_first(X{}, high, ones, b[2], b[3]);
            } else {
              mma_k16(X{}, low, ones, b[0], b[1]);
              mma_k16(X{}, high, ones, b[2], b[3]);
            }
          }
          float* const sum = token_sums + (step * kTokenSums + group) * kTokens + c * 8 + 2 * t;
          if (g == 0) *reinterpret_cast<float2*>(sum) = float2{(low[0] + high[0]) * (1.0f / kUnit), (low[1] + high[1]) * (1.0f / kUnit)};
        }
      }
    named_barrier(1, kConsumers);
  };

  auto load_words = [&] {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        load_words_x4(words[i][h], stage_at + at_codes + i * (kWarpBlocks == 1 ? next_codes : kBlockBytes) + h * 512);
  };

  auto next_stage = [&] {
    ++stage, stage_at += stage_bytes;
    if (stage == stages) stage = 0, parity ^= 1, stage_at = shared_address(ring);
    mbarrier_wait(full + stage, parity);
    load_words();
  };

  const auto wait_for_others = [] {
    wait_for_previous_kernel();      // y is written from here on, and x cannot come before
    wait_for_barriers_of_cluster();  // of CTAs that started with this one
  };
  if (!kPerRow || passes == 0) wait_for_others();
  if (passes > 0) {
    enter(pass_of(0));
    mbarrier_wait(full, 0);
    load_words();
  }
  for (int pass = 0; pass < passes; ++pass) {
    const Pass now = pass_of(pass);
    const int slot = slot_of(now), first = step_of(now), stages_here = now.stages(steps);
    u32 to_zeros = now.slots() * kStepScales, step_scales = now.slots() * kSlotScales;  // from scales
    u32 to_scales = 2 * kWarps * kBlockBytes + first * step_scales + slot * kStepScales + 2 * g * static_cast<int>(sizeof(ScaleBits));
    int stage_steps = now.stage_steps();
    keep(to_zeros), keep(step_scales), keep(to_scales), keep(stage_steps);
    const int block = first_block + pass * slots + slot;
    const bool rows_exist = pass * slots + slot < my_blocks;
    float acc[kWarpBlocks][kTokenTiles][4] = {};
    Sums<kTokenTiles> sums[kWarpBlocks];
    u32 zeros[kWarpBlocks][2];  // of rows g and g + 8 of a group: what int4_fragment adds to each of a pair of codes
    float row_offset[kWarpBlocks][2], row_tokens[kTokenTiles][2] = {};  // of one scale a row: 8 less the zero, sums of x
#pragma unroll
    for (int b = 0; b < kWarpBlocks; ++b) {
      sums[b].clear();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        sums[b].scale[r] = row_offset[b][r] = 0.0f;
        if constexpr (kPerRow) {
          const i64 at = static_cast<i64>(pass * slots + slot + b < my_blocks ? block + b : 0) * kBlockRows + 2 * g + r;
          if constexpr (kZeroOfCodes) zeros[b][r] = less_zero(X{}, reinterpret_cast<const ScaleBits*>(p.zeros)[at] * 0x10001u);
          sums[b].scale[r] = to_float(Scale{}, reinterpret_cast<const ScaleBits*>(p.scales)[at]);
          if constexpr (kSums) row_offset[b][r] = 8.0f - to_float(Scale{}, reinterpret_cast<const ScaleBits*>(p.zeros)[at]);
        }
      }
    }

    // A step of the warp's blocks, the first or second of the stage.
    auto multiply = [&](auto which, u32 step_scale, u32 step_sums, const u32(&x_at)[kTokenTiles]) {
      constexpr int kStepInStage = decltype(which)::value;
      constexpr int kQuads = 2 * kHalfQuads;
      if constexpr (kTokensInt8) {
        float scale_of_x[kTokenTiles][2][4];  // by group
        u32 here[kTokenTiles];
#pragma unroll
        for (int c = 0; c < kTokenTiles; ++c) {
          here[c] = x_at[c] + (kStepInStage ? whole_step[c] : 0);
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            u32 bits[4];
            load_words_x4(bits, here[c] + to_floats[c][j]);
#pragma unroll
            for (int i = 0; i < 4; ++i) scale_of_x[c][j][i] = __uint_as_float(bits[i]);
          }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          u32 q[kTokenTiles][4];
#pragma unroll
          for (int c = 0; c < kTokenTiles; ++c) load_words_x4(q[c], here[c] + h * half_step[c]);
#pragma unroll
          for (int group = 0; group < 2; ++group)
#pragma unroll
            for (int b = 0; b < kWarpBlocks; ++b) {
              const u32(&code)[2][4] = words[kWarpBlocks == 1 ? kStepInStage : b];
              u32 a[4];
              int4_to_int8(a[0], a[1], code[h][2 * group]);
              int4_to_int8(a[2], a[3], code[h][2 * group + 1]);
              float scale[2];
              load_pair<Scale>(scale, step_scale + (2 * h + group) * kScaleBytes + b * kStepScales);
#pragma unroll
              for (int c = 0; c < kTokenTiles; ++c) {
                const u32 tile[2] = {q[c][2 * group], q[c][2 * group + 1]};
                float sum[4];
                mma_s8_magic(sum, a, tile, magic);
#pragma unroll
                for (int j = 0; j < 4; j += 3 - kColumns) {
                  // A float of 11 bits times an integer, exactly: 1.5 * 2^23 has two.
                  const float d = scale_of_x[c][j % 2][2 * h + group];
                  acc[b][c][j] = fmaf(scale[j / 2], fmaf(d, sum[j], -kMagic * d), acc[b][c][j]);
                }
              }
            }
        }
        return;
      }
      if constexpr (kPerRow && kSums) {
#pragma unroll
        for (int c = 0; c < kTokenTiles; ++c) {
          float sum[2];
          load_pair<Fp32>(sum, step_sums + c * 32);
          row_tokens[c][0] += sum[0], row_tokens[c][1] += sum[1];
        }
      }
#pragma unroll
      for (int quad = 0; quad < kQuads; ++quad) {
        constexpr int kGroupQuads = kQuads / kScaleCount, kLast = Sums<kTokenTiles>::kChains - 1;
        const int h = quad / kHalfQuads, q = quad % kHalfQuads;
        // A group's first products clear nothing: they have no sum to add to.
        const bool first = !kPerRow && quad % kGroupQuads == 0;
        if constexpr (kZeroOfCodes) {
          if (first) {
#pragma unroll
            for (int b = 0; b < kWarpBlocks; ++b) {
              const u32 pair = less_zero(X{}, load_word(step_scale + to_zeros + quad / kGroupQuads * kScaleBytes + b * kStepScales));
              zeros[b][0] = __byte_perm(pair, pair, 0x1010);
              zeros[b][1] = __byte_perm(pair, pair, 0x3232);
            }
          }
        }
        u32 x[kTokenTiles][4];
#pragma unroll
        for (int c = 0; c < kTokenTiles; ++c) load_matrix_x4(x[c], x_at[c] + (kStepInStage * kStep + quad * 32) * 2);
#pragma unroll
        for (int b = 0; b < kWarpBlocks; ++b) {
          const u32(&code)[2][4] = words[kWarpBlocks == 1 ? kStepInStage : b];
          u32 a[2][4];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if constexpr (kZeroOfCodes)
              int4_fragment(X{}, a[i], code[h][2 * q + i], zeros[b]);
            else if constexpr (kBits == 4)
              int4_fragment(X{}, a[i], code[h][2 * q + i]);
            else
              int8_fragment(X{}, a[i], code[h][2 * i], code[h][2 * i + 1]);
          }
#pragma unroll
          for (int c = 0; c < kTokenTiles; ++c) {
            if (first)
              mma_k16_first(X{}, sums[b].part[0][c], a[0], x[c][0], x[c][1]);
            else
              mma_k16(X{}, sums[b].part[0][c], a[0], x[c][0], x[c][1]);
            if (first && kLast > 0)
              mma_k16_first(X{}, sums[b].part[kLast][c], a[1], x[c][2], x[c][3]);
            else
              mma_k16(X{}, sums[b].part[kLast][c], a[1], x[c][2], x[c][3]);
          }
        }
        if constexpr (!kPerRow) {
          if ((quad + 1) % kGroupQuads == 0) {
#pragma unroll
            for (int b = 0; b < kWarpBlocks; ++b) {
              const u32 at = step_scale + quad / kGroupQuads * kScaleBytes + b * kStepScales;
              load_pair<Scale>(sums[b].scale, at);
              if constexpr (kSums && !kSumsAtOnce) {
                // What zeros that are not 8, or minima, add: their share of the sums of x.
                float zero[2];
                load_pair<Scale>(zero, at + to_zeros);
                excess(zero, sums[b].scale);
#pragma unroll
                for (int c = 0; c < kTokenTiles; ++c) {
                  float sum[2];
                  load_pair<Fp32>(sum, step_sums + (quad / kGroupQuads * kTokens + c * 8) * 4);
#pragma unroll
                  for (int j = 0; j < 4; ++j) acc[b][c][j] = fmaf(zero[j / 2], sum[j % 2], acc[b][c][j]);
                }
              }
              sums[b].finish(acc[b]);
            }
          }
        }
      }
      if constexpr (kSumsAtOnce) {
        // The same of all groups of the step: a product of 16 rows and up to 4 groups with as many sums of 8 tokens.
        const bool exists = t < kGroups;
        const int group = exists ? t : 0;
        float sum[kTokenTiles];
#pragma unroll
        for (int c = 0; c < kTokenTiles; ++c) sum[c] = exists ? load_float(step_sums + (group * kTokens + c * 8) * 4) : 0.0f;
#pragma unroll
        for (int b = 0; b < kWarpBlocks; ++b) {
          const u32 at = step_scale + group * kScaleBytes + b * kStepScales;
          float scale[2], zero[2];
          load_pair<Scale>(scale, at);
          load_pair<Scale>(zero, at + to_zeros);
          excess(zero, scale);
          if (!exists) zero[0] = zero[1] = 0.0f;
#pragma unroll
          for (int c = 0; c < kTokenTiles; ++c) mma_k4_fp32(acc[b][c], zero, sum[c]);
        }
      }
    };

    if (kPerRow && pass == 0) wait_for_others();  // the scales above need not wait
    u32 x_at[kTokenTiles];
#pragma unroll
    for (int c = 0; c < kTokenTiles; ++c) {
      x_at[c] = tokens_at[c] + first * (kTokensInt8 ? whole_step[c] : kStep * 2);
      if constexpr (kStreamed) keep(x_at[c]);  // in a stage
    }
    u32 x_sums = my_sums + first * (kTokenSums * kTokens * 4);
    int mine = rows_exist ? steps - first : 0;  // this warp's steps from here on, and the other warps' between them
    if (pass > 0) next_chunk = stages_here;  // x is there
    for (int at = 0;;) {
      const u32 scale = stage_at + to_scales;
      u64* const used = empty + stage;
      if (!kStreamed && !kQuantizes && at == next_chunk) {
        // The next chunk of x; what lies past the end of K was zeroed.
        const int from = next_chunk * stage_steps;
        if (from * kStep < k_here) mbarrier_wait(chunk_ready++, 0);
        next_chunk += chunk_stages;
        const int to = next_chunk * stage_steps < steps ? next_chunk * stage_steps : steps;
        if constexpr (kSums) sum_tokens(from, to);
#pragma unroll
        for (int c = 0; c < kTokenTiles; ++c) order_after(x_at[c]);
      }
      u32 x_here[kTokenTiles];
#pragma unroll
      for (int c = 0; c < kTokenTiles; ++c) {
        x_here[c] = x_at[c] + (kStreamed ? stage_at : 0);
        if constexpr (kStreamed) order_after(x_here[c]);
      }
      if (mine > 0) multiply(Int<0>{}, scale, x_sums, x_here);
      if constexpr (kWarpSteps == 2) {
        if (mine > 1) multiply(Int<1>{}, scale + step_scales, x_sums + kTokenSums * kTokens * 4, x_here);
      }
      if constexpr (kRacecheck) fence_async_proxy();
      __syncwarp();
      if (lane < kArrivingLanes) mbarrier_arrive(used);
      if (++at == stages_here) break;
      next_stage();
      mine -= stage_steps;
      x_sums += stage_steps * (kTokenSums * kTokens * 4);
      if constexpr (!kStreamed)
#pragma unroll
        for (int c = 0; c < kTokenTiles; ++c) x_at[c] += stage_steps * (kTokensInt8 ? whole_step[c] : kStep * 2);
    }
    if (pass + 1 < passes) {
      enter(pass_of(pass + 1));
      next_stage();
    }
    if constexpr (kPerRow) {
#pragma unroll
      for (int b = 0; b < kWarpBlocks; ++b) {
        if constexpr (kSums) {
#pragma unroll
          for (int c = 0; c < kTokenTiles; ++c)
#pragma unroll
            for (int j = 0; j < 4; ++j)
              sums[b].part[0][c][j] = fmaf(row_offset[b][j / 2], row_tokens[c][j % 2], sums[b].part[0][c][j]);
        }
        sums[b].finish(acc[b]);
      }
    }

    if constexpr (kFew) {
      // Token t's sums to lanes that have those of a pair, as they do otherwise.
#pragma unroll
      for (int b = 0; b < kWarpBlocks; ++b)
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          const float sum = acc[b][0][j];
#pragma unroll
          for (int i = 0; i < 2; ++i) acc[b][0][j + i] = __shfl_sync(0xffffffff, sum, g * 4 + (2 * t + i) % 4);
        }
    }

    // Send this pass's sums to the CTAs that own the rows. The boxes were last used two passes ago: the epilogues of all CTAs must
    // have read those.
    const int box = pass % 2, owned_shift = now.log_slots + 4 - log_ranks, k_part = kWarpBlocks * warp >> now.log_slots;
    if (pass > 1) {
      mbarrier_wait(released + box, (pass / 2 - 1) % 2);
      __syncwarp();  // a lane that sends nothing must not fall behind by a phase
    }
#pragma unroll
    for (int i = 0; i < 2 * kWarpBlocks; ++i) {
      const int b = i / 2, r = i % 2;
      // A gate and its up are sent as neighbours, so that one CTA owns both.
      const int row = (slot + b) * kBlockRows + (kGated ? 2 * g + r : g + 8 * r), owner = row >> owned_shift;
      const int at = box * kBuffer + ((k_part << owned_shift) + (row & ((1 << owned_shift) - 1))) * kPitch + (kPairs ? 4 : 2) * t;
      // A cluster of one CTA has no asynchronous stores.
      const float(&first)[4] = acc[b][0];
      if constexpr (kPairs) {
        const float(&second)[4] = acc[b][kTokenTiles - 1];
        const float4 value{kUnit * first[2 * r], kUnit * first[2 * r + 1], kUnit * second[2 * r], kUnit * second[2 * r + 1]};
        if (ranks == 1)
          *reinterpret_cast<float4*>(inbox + at) = value;
        else
          store_async(map_shared(inbox + rank * part_of_buffer + at, owner), value, map_shared(received + box, owner));
      } else if (t < token_pairs) {
        const float2 value{kUnit * first[2 * r], kUnit * first[2 * r + 1]};
        if (ranks == 1)
          *reinterpret_cast<float2*>(inbox + at) = value;
        else
          store_async(map_shared(inbox + rank * part_of_buffer + at, owner), value.x, value.y, map_shared(received + box, owner));
      }
    }
    __syncwarp();
    if (lane < kArrivingLanes && ranks == 1) mbarrier_arrive(received + box);
  }
  if (passes > 0) finish(passes - 1, threadIdx.x, kConsumers);
}

#ifndef LQ_CTAS
#define LQ_CTAS 1
#endif
static_assert(LQ_TILES * LQ_WARP_BLOCKS <= 2, "threads send what they have of one row at once");

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, LQ_CTAS)
    decode_a16(const u8* x, const u8* packed, const u8* scales, const u8* zeros, const u16* bias, const u16* residual, u16* y, i64 m,
               i64 n, i64 k, i64 blocks, i64 cluster_blocks, i64 more_blocks, i64 last_pass, i64 group_size, i64 slots, i64 stages,
               i64 boxes, i64 pitch) {
  decode<LQ_TILES>(Arguments{x, packed, scales, zeros, bias, residual, y, m, n, k, blocks, cluster_blocks, more_blocks, last_pass,
                             group_size, slots, stages, boxes, pitch});
}
