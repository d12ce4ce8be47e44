// Many tokens times a packed weight: y (m, n) = x (m, k) @ w (n, k).T for int4 and int8 weights in fragment order. Hopper.
//
// A tile is 128 out features (LQ_ROWS: or 192) by LQ_TOKENS tokens. Weights are the A operand of wgmma, from registers: what a lane
// reads from shared memory is its fragment, unpacked by bit tricks while earlier products run. Tokens are the B operand, in shared
// memory. So a weight is unpacked once for up to 256 tokens and never written to shared memory.
//
// - Warpgroup 0 loads a ring of stages: a K step (LQ_STEP: 128 in features for int4, 64 or 128 for int8) of the tile's codes and scales
//   (warp 0; bulk copies, which do not wait for the previous kernel) and of x (warp 1; a tensor map, which writes the 128-byte swizzle
//   and zeros past the end of K; a last tile that is not full has a map of its own, with fewer rows).
// - The other warpgroups, two or three, multiply 64 out features each. The next stage's codes are read, and unpacked, while up to three
//   groups of wgmmas are in flight.
// - Stream-K: the first `shared_tiles` tiles are cut into K steps and these into equal runs, one for each of the first `workers` CTAs, so
//   that all end at once whatever the shape. The CTAs that have a part of a tile leave their sums in a workspace; the last to come
//   adds them up, in the order of K. Nobody waits, so nothing can deadlock. The other tiles are taken whole, CTA after CTA. Of tiles of
//   more than 128 tokens, parts are loaded ahead of those that are stored, and where all have equally many parts, which come at once,
//   each section of a tile is added up by the one that comes last to it.
// - LQ_MULTICAST: two CTAs with neighbouring row tiles have the same tokens, and each loads half of them for both: L2 delivers 28 bytes a
//   clock and multiprocessor, and a step of 64 with 256 tokens is 40 KB of int8 weights and tokens in 1,024 clocks of products. A stage is
//   free when the consumers of both have released it. Pairs of CTAs walk as one, and a tile is a pair of row tiles.
// - LQ_SPLIT: two CTAs share the K of a tile, or of a part of one, half each, and add up through distributed shared memory: each sends
//   the other its sums of half of the tokens, and stores the rest, or leaves it in the workspace: half as much as without pairs.
// - LQ_MULTICAST and LQ_SPLIT: pairs have the same tokens, but where tiles are shared a pair takes one row tile of two so, in halves of K.
//   Of pairs of tiles that are left over, up to half as many as there are pairs of CTAs, each has two pairs of CTAs for half a tile's time.
//   Fewer are cut in more parts: each of four pairs takes half of a row tile's K, its CTAs a quarter, and of their sums, a half each of the
//   tokens, two parts are added up through the workspace.
// - LQ_RUNS: no tile is shared, but one CTA multiplies K in as many runs as there are `workers`, cut where they would cut it, and adds up
//   the sums of runs as the last of them to come would: the bits are those of tiles that are shared. For many tokens in the
//   batch-invariant mode.
// - LQ_ASIDE: a tile's results go to a stage of the ring, which the producers pass over, and from there to memory by warp 2, in bulk and
//   in parts, while the rest is written and the next tile is multiplied: x of a step of 128 has as many bytes as y of 128 rows, and of 64
//   half of them, so that two stages are passed over. What is added to the results was loaded there. Tiles that were shared, and y that
//   the copy engine cannot take, leave through staging.
// - LQ_TEAMS: two teams of consumers take the K steps of the ring by turns, up to 32 tokens, and the second hands its sums of a tile to the
//   first, which stores it. Weights that come from memory then wait less for what unpacks them. The ring has an even number of stages, as
//   each is always the same team's: or a team could take one that is not yet filled for what it was two rounds before.
// - Tiles are numbered in bands of `raster` row tiles, all tokens of a band before the next: what runs at once shares weights and
//   tokens in L2.
// - LQ_SCALED: one operation makes an int4 code, less its zero, a fragment, and the sums of a group are scaled, when they are complete:
//   few tokens have fewer of them than a thread has codes.
//
// Accuracy: a weight is (u - 8) * scale rounded once, as a dequantized weight is; u - 8 is exact. Zeros make it an fma with
// (8 - zero) * scale, which is rounded by itself as well: nothing, where zero is 8 less or more a power of two. With one scale a row,
// 8 - zero and its sum with u - 8 are rounded (exact for an integer zero) and the fp32 sum is scaled. A minimum is added likewise, as
// minimum + 8 * scale: the middle of a group is less than its minimum, and so is what rounding it to bf16 costs. Where sums of groups are
// scaled, in fp32, u - 8 and u - zero are exact, or u - zero rounded once, and nothing else is rounded. Sums are fp32.
// Bitwise reproducible: the order of all sums is fixed.
//
// How it came about (H200; clocks for 16 in features of 128 rows):
// - From registers alone, without shared memory or barriers, the loop takes 128 at 128 tokens, 85 at 64, 70 at 32, 62 at 16; wgmma by
//   itself 128, 64, 33, 28; unpacking by itself 50. A loop that waits for a stage, then reads codes, then unpacks took 140 at 64
//   tokens, though neither memory (removing all loads: 6%), nor the tensor cores (45% busy), nor instruction issue (45%) was full: two
//   warps a scheduler cannot hide those latencies one after the other.
// - Tiles of 64 rows, two CTAs a multiprocessor, were slower from 64 tokens on: x comes twice from L2, which gives 28 bytes a clock
//   and multiprocessor.
// - Clusters that share K through distributed shared memory (2 CTAs: 66 at once, 4: 30 of 132) left up to half of the machine idle.
// - 128 CTAs that fill their rings at once wait for L2: the first products begin 900 to 2,500 clocks after x may be read, and what is
//   asked for ahead is in the way. So rings are short (prefill_cuts.py). The CTAs that start last, where the kernel before ended last,
//   take longest; they asked for x 2,000 to 3,100 clocks after they began, and after 1,500 to 1,900 since what comes before is done by
//   several warps at once.
//   Weights of two stages before x, and the rest when x may be read: 1.6% slower (median of 84 products). All weights asked for in L2
//   beforehand: 1.7%, and 27% at worst.
// - Results that left by the ring in a loop, with branches around the sums of other chunks: 1% longer, 2 to 4% for K of 2048 and many tokens.
//   Copied out of staging by reads that are waited for one by one: 1.3% longer where pairs share K.
// - A division for each step of groups of 256 and more, between the copies of codes and of scales: 9 to 12% longer where weights come from
//   memory (14336x4096 and 28672x4096, 48 and 64 tokens). Everything that copies take found out before the wait for a stage, or copies without the proxy fence
//   that comes after it: nothing. Scales copied by the warp that copies x: 1.6% longer, up to 8%.
// - Two CTAs a multiprocessor, which up to 64 tokens have registers enough: up to 1.7 times as long. The CTAs of a pair come to the same
//   one, and those of the next kernel come in twos where one is idle.
// - Without moving registers (up to 128 tokens 168 are enough), or with one copy for all warps of what is before the first barrier, 32 to
//   96 tokens of int8 take 1 to 5% longer: the loop becomes other code.
//
// It is long on purpose: one CTA's life from its first copy to its last store, whose parts share sizes and registers.
//
// Compiled with LQ_BITS (4, 8), LQ_X (Bf16, Fp16), LQ_SCALE (Bf16, Fp16, Fp32), LQ_GROUPS (groups in a K step: 1, 2, 4; 0: one scale
// a row), LQ_ZERO (0, 1; 2: minima of groups), LQ_TOKENS (16, 32, 64, 96, 112, 128, 176, 192, 256), LQ_ROWS (192, up to 128 tokens; 128),
// LQ_STEP (128; 64 with 8 bits, where 128 takes one scale a row and up to 128 tokens), LQ_TRANSPOSED (1: y is fp32 (n, m), as ggml's
// products are here; 0), LQ_RESIDUAL (1: `residual` (m, n) is added before y is rounded; 0), LQ_GATED (1: rows of a gate and an up
// projection alternate by eights, y (m, n) is silu(gate) * up of the fp32 sums, and bias has n values for gates, then n for ups; 0),
// LQ_MULTICAST (0, 1), LQ_SPLIT (0, 1), LQ_RUNS (1: K in runs, of tiles of 64, 96 and 128 tokens; 0), LQ_TEAMS (2: up to 32 tokens, no
// pairs that share K; 1) and LQ_SCALED (1: int4 in groups, up to 64 tokens; 0).

#include "lq/bulk_store.cuh"
#include "lq/epilogue.cuh"
#include "lq/stream_k.cuh"
#include "lq/wgmma.cuh"

using namespace lq;

namespace {

using X = LQ_X;
using Scale = LQ_SCALE;
using ScaleBits = Scale::Bits;

constexpr int kBits = LQ_BITS;
constexpr int kGroups = LQ_GROUPS;
constexpr int kTokens = LQ_TOKENS;
#ifndef LQ_ROWS
#define LQ_ROWS 128
#endif
constexpr int kRows = LQ_ROWS;
constexpr bool kZero = LQ_ZERO != 0;
constexpr bool kMinimum = LQ_ZERO == 2;  // what is said of zeros is of minima
constexpr bool kPerRow = kGroups == 0;
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
#ifndef LQ_MULTICAST
#define LQ_MULTICAST 0
#endif
constexpr bool kMulticast = LQ_MULTICAST != 0;
#ifndef LQ_SPLIT
#define LQ_SPLIT 0
#endif
constexpr bool kSplit = LQ_SPLIT != 0 && !kMulticast;
constexpr bool kHalved = LQ_SPLIT != 0 && kMulticast;  // tiles that are shared
constexpr bool kExchanges = kSplit || kHalved;
#ifndef LQ_RUNS
#define LQ_RUNS 0
#endif
constexpr bool kRuns = LQ_RUNS != 0;
#ifndef LQ_TEAMS
#define LQ_TEAMS 1
#endif
constexpr int kTeams = LQ_TEAMS;  // of warpgroups, which take K steps by turns
// As in prefill_cuts.py and prefill_a16.py, which passes a map of y. Runs with a residual have no registers for it.
#define LQ_ASIDE \
  ((LQ_TOKENS >= (LQ_BITS == 4 ? 96 : 112) || LQ_RUNS) && !(LQ_RUNS && LQ_RESIDUAL) && LQ_ROWS == 128 && !(LQ_SPLIT && !LQ_MULTICAST) && !LQ_TRANSPOSED)
constexpr bool kAside = LQ_ASIDE != 0;
static_assert(!kSplit || (kTokens >= 32 && kTokens <= 128 && kTokens % 32 == 0), "pairs share K of tiles that leave room");
static_assert(!kHalved || (kTokens % 64 == 0 && kTokens >= 128 && kRows == 128), "pairs share K and tokens of tiles of 128 to 256");
static_assert(!kRuns || (!kExchanges && kTokens >= 64 && kTokens <= 128 && LQ_ROWS == 128),
              "runs: of many tokens, with sums twice in registers");
constexpr int kPair = kMulticast || kSplit ? 2 : 1;  // CTAs of a cluster
// Known to the compiler: otherwise the kernel looks, wherever it comes to a barrier of its cluster, whether it has one.
#if LQ_MULTICAST || LQ_SPLIT
#define LQ_PAIRS __cluster_dims__(2, 1, 1)
#else
#define LQ_PAIRS
#endif
constexpr int kSharers = kMulticast ? 2 : 1;      // CTAs that have the same tokens
constexpr int kShareTokens = kTokens / kSharers;  // of a tile, that a CTA loads
static_assert(kBits == 4 || !kZero, "8 bits: symmetric");
static_assert(!kMinimum || !kPerRow, "minima: in groups");
static_assert(kRows == 128 || (kRows == 192 && kTokens <= 128), "three warpgroups have registers for 128 tokens");
static_assert(kTeams == 1 || (kTeams == 2 && kRows == 128 && kTokens <= 32 && !kRuns && !kExchanges),
              "two teams have registers for few tokens");

constexpr int kWarpgroups = kRows / 64;  // that multiply, of a team
constexpr int kConsumerWarps = 4 * kWarpgroups;
constexpr int kConsumers = 32 * kConsumerWarps;
constexpr int kThreads = 128 + kTeams * kConsumers;
constexpr int kBlocks = kRows / 16;
constexpr int kBlockBytes = 1024;
#ifndef LQ_STEP
#define LQ_STEP (LQ_BITS == 4 ? 128 : 64)
#endif
constexpr int kStep = LQ_STEP;                // in features of a stage
constexpr int kPieces = kStep * kBits / 512;  // of codes, each of blocks of 1024 bytes
static_assert(kPieces == 1 || (kPieces == 2 && kPerRow && kTokens <= 128), "steps of 128 in features: no groups of int8, and few tokens");
constexpr int kSlices = kStep / 16;
constexpr int kBatch = kStep == 64 || kTokens > 128 ? 1 : 2;  // k16 steps in a group of wgmmas
// Tiles of many tokens are compiled longest, and of that each of their wgmmas, with 137 operands, 40 ms: the loop's body is half a stage.
constexpr int kHalves = kTokens > 128 && kStep == 128 ? 2 : 1;
constexpr int kBatches = kSlices / kBatch / kHalves;                         // of the loop's body
constexpr int kBodyGroups = kGroups < kHalves ? kGroups : kGroups / kHalves;  // ... whose scales are in registers
#ifndef LQ_SCALED
#define LQ_SCALED 0
#endif
constexpr bool kScaled = LQ_SCALED != 0;  // sums, not weights
static_assert(!kScaled || (kBits == 4 && !kPerRow && !kMinimum && !kRuns && kTokens <= 64), "sums of groups of int4 are scaled, of few tokens");
// What is left to multiply sums with. Weights of bf16 in groups are multiplied straight from their subnormal bits: with 2^-32, both
// that factor (the scale times 2^101) and its product with 8 are numbers for scales from 2^-97 to 2^26.
constexpr bool kFused = kSame<X, Bf16> && !kPerRow && !kZero && !kScaled;
constexpr float kUnit = kFused ? 4294967296.0f : kScaled && kZero ? zero_unit(X{}) : fragment_unit(X{});
// Groups of wgmmas in flight while the next is unpacked, and sets of registers for A. A group of many tokens takes long enough alone, and
// so does one beside another team's; but where unpacking takes longer, two.
constexpr int kPending = kTokens > 128 || (kTeams > 1 && kFused) ? 1 : 2;
constexpr int kSets = 2 * kPending;
constexpr int kBoxBytes = kTokens * 128;  // of x: 64 in features
constexpr int kXBytes = kStep / 64 * kBoxBytes;
constexpr int kScaleBytes = 16 * static_cast<int>(sizeof(ScaleBits));  // of a block and group
constexpr int kStepScales = kGroups * kScaleBytes;                     // of a block and K step, which lie together
constexpr int kBlockScaleBytes = kStepScales * (kZero ? 2 : 1);
constexpr int kPieceBytes = kBlocks * kBlockBytes;
constexpr int kStage = kXBytes + kPieces * kPieceBytes;
constexpr int kZeros = kBlocks * kStepScales;  // from a tile's scales
constexpr int kScaleStage = kBlocks * kBlockScaleBytes;
constexpr int kUnits = kTokens / 8;              // of tokens
constexpr int kOwnTokens = kSplit ? kTokens / 2 : kTokens;  // of a tile, that a CTA adds up and stores
constexpr int kOwnUnits = kOwnTokens / 8;
// Tokens that pass through shared memory at once on their way out: of pairs that share K all, for which the inbox has room.
constexpr int kChunk = kSplit && !kResidual ? kOwnTokens : kOwnTokens % 32 ? 16 : 32;
// Units and parts that are read at once where parts are added up.
constexpr int kAtOnce = kOwnUnits % 4 ? 2 : 4;
constexpr int kWorkers = kTokens > 128 && kResidual ? 1 : kTokens > 128 || kRows == 192 || kSplit || kTeams > 1 ? 2 : 4;
// ... and all chunks leave through the same instructions, where parts are added up too. Only what is in registers is told apart.
// Of runs it is how no register is spilled and no wgmma serialized: rolled where y is stored aside or transposed, not with a residual.
constexpr bool kRolled = kTokens > 128 || (kRuns && !kResidual);
static_assert(!kRolled || kChunk == 8 * kAtOnce, "a chunk is added up at once");
constexpr int kChunks = kOwnTokens / kChunk;
// Results that leave by the ring do so without a loop; not those of gates, of runs, and where registers do not suffice.
constexpr bool kStraight = kAside && !kGated && !kRuns && !(kHalved && kTokens == 256 && kBits == 4);
// Where parts are added up a chunk ahead: how many are on their way at once.
constexpr bool kAhead = kRolled && !kRuns && !kTransposed;
constexpr int kPartsAtOnce = kResidual ? 1 : 3;
constexpr int kPitch = 144;                      // bytes of 64 results of a token, padded against bank conflicts
constexpr int kParts = 8 / kFeatureRows;         // of 8 results, of a token and warpgroup
constexpr int kKeptUnits = kUnits / 2;      // of sums, that a CTA keeps in an exchange
constexpr int kPartUnits = kExchanges ? kKeptUnits : kUnits;  // ... and of what it leaves as part of a tile
constexpr int kPartChunks = kPartUnits / kAtOnce;
static_assert(kPartChunks <= 16, "prefill_a16.py makes so many counters");
constexpr int kWarpBox = kKeptUnits * 512;  // of sums that a warp sends to its like in the other CTA, and gets
constexpr int kBox = kConsumerWarps * kWarpBox;
// Results pass through the inbox, each warpgroup's through its own part.
constexpr int kStaging = kExchanges ? kBox : kWarpgroups * kChunk * kPitch;
static_assert(kStaging >= kWarpgroups * kChunk * kPitch, "the inbox has room for staging");
// The first time around the ring a stage's weights are asked for so many clocks after those of the one before, about as long as it is
// multiplied: all at once they keep x waiting. And where they are is counted, which takes 25 instructions a step less than finding it,
// beside the warps that multiply. Other tiles are no faster with either, and with both up to 8% slower (96 tokens where pairs share K).
constexpr bool kPaced = kTeams > 1 || kTokens == 128 || (kTokens == 64 && kRows == 128);
constexpr u32 kPace = kTokens <= 32 ? 300 : kTokens * kStep / 16;
constexpr int kHandBox = kUnits * 512;  // of sums that a warp of the second team hands to its like in the first
constexpr int kHandBoxes = (kTeams - 1) * kConsumerWarps * kHandBox;
// With 256 tokens, a stage's x is 64 KB, so its second half has a barrier of its own: the first product starts 1 us earlier. With fewer,
// a second wait in the loop costs more (40% at 16 tokens): unpacking does not move across it.
constexpr bool kRest = kTokens == 256 && kBits == 4;
constexpr int kOutBoxes = 2 / kFeatureRows;  // of y, of 64 out features, each where x of 64 in features was
constexpr int kStageBoxes = kStep / 64;
using Results = Leaving<kTokens, kOutBoxes, kStageBoxes, kConsumers>;
// Named barriers, behind which mbarriers are initialised; those of warpgroups and of parts of results have smaller numbers.
constexpr int kWeightsJoin = 13, kTokensJoin = 14, kConsumersJoin = 15;
static_assert(Results::kBarrier + Results::kParts <= kWeightsJoin, "each named barrier has a number of its own");
static_assert(!kAside || kRows == 128, "a tile's results are two boxes, or one");
// Whether the second piece of a stage's codes is read when the first product of the first is on its way: with all four reads at once the
// first unpacking waited for the last of them, in kernels that store in bulk, which ptxas gives a scoreboard less for loads.
constexpr bool kLater = kPieces == 2 && !kSplit;
static_assert(kBatches % kSets == 0, "a group's registers are known at compile time");
constexpr int kGroupBatches = kScaled ? kBatches / kBodyGroups : kBatches;  // whose sums are scaled together

template <int kValue>
struct Int {
  static constexpr int value = kValue;
};

// Numbers of rows g and g + 8.
__device__ __forceinline__ float2 load_two(const u8* from) {
  const ScaleBits* const bits = reinterpret_cast<const ScaleBits*>(from);
  return {to_float(Scale{}, bits[0]), to_float(Scale{}, bits[1])};
}

// Each of two as a pair in x's dtype.
__device__ __forceinline__ void spread(u32 (&to)[2], u32 pair) {
  to[0] = __byte_perm(pair, 0, 0x1010);
  to[1] = __byte_perm(pair, 0, 0x3232);
}

__device__ __forceinline__ void spread(u32 (&to)[2], float2 pair) {
  to[0] = from_floats(X{}, pair.x, pair.x);
  to[1] = from_floats(X{}, pair.y, pair.y);
}

// What is added to a scaled fragment: what its zero makes of it, or its minimum.
template <typename T>
__device__ __forceinline__ T offset_of(T zeros, T scales) {
  if constexpr (kMinimum)
    return fragment_minimum(X{}, zeros, scales);
  else
    return fragment_offset(X{}, zeros, scales);
}

// A thread's codes and scales of a stage, or of half of one. A K step of 128 costs 72 instructions of unpacking (9 for 8 codes), 104 with
// zeros.
struct Weights {
  static constexpr int kScales = kPerRow ? 1 : kBodyGroups;
  u32 words[8 * kPieces / kHalves];
  u32 scale[kScales][2], offset[kScales][2];  // a weight is a code in its place times the one plus the other
  float2 sum_scale[kScales];                  // where sums are scaled: a code in its place times a constant plus the offset is exact

  __device__ __forceinline__ void load(const u8* codes, const u8* scales) {
    load_codes(codes);
    load_scales(scales);
  }

  __device__ __forceinline__ void load_codes(const u8* codes) {
#pragma unroll
    for (int piece = 0; piece < (kLater ? 1 : kPieces); ++piece) load_piece(codes, piece);
  }

  __device__ __forceinline__ void load_piece(const u8* codes, int piece) {
#pragma unroll
    for (int half = 0; half < 2 / kHalves; ++half) {
      const uint4 v = *reinterpret_cast<const uint4*>(codes + piece * kPieceBytes + half * 512);
      u32* const to = words + 8 * piece + 4 * half;
      to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }
  }

  __device__ __forceinline__ void load_scales(const u8* scales) {
#pragma unroll
    for (int group = 0; group < kBodyGroups; ++group) {
      const u8* const scale_at = scales + group * kScaleBytes;
      const u8* const zero_at = scale_at + kZeros;
      if constexpr (kScaled && kSame<X, Scale>) {
        sum_scale[group] = to_floats(X{}, *reinterpret_cast<const u32*>(scale_at));
        if constexpr (kZero) spread(offset[group], less_zero(X{}, *reinterpret_cast<const u32*>(zero_at)));
      } else if constexpr (kScaled) {
        sum_scale[group] = load_two(scale_at);
        if constexpr (kZero) {
          const float2 zero = load_two(zero_at);
          spread(offset[group], float2{zero.x * (-1.0f / zero_unit(X{})), zero.y * (-1.0f / zero_unit(X{}))});
        }
      } else if constexpr (kSame<X, Scale>) {
        const u32 pair = *reinterpret_cast<const u32*>(scale_at);
        spread(scale[group], pair);
        if constexpr (kZero) spread(offset[group], offset_of(*reinterpret_cast<const u32*>(zero_at), pair));
      } else {
        const float2 pair = load_two(scale_at);
        spread(scale[group], pair);
        if constexpr (kZero) spread(offset[group], offset_of(load_two(zero_at), pair));
      }
      if constexpr (kFused) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          offset[group][r] = mul2(X{}, scale[group][r], kBits == 4 ? 0xb100b100u : 0xb300b300u);  // -8, -128 * 2^-32
          // 2^101; of a nibble in the upper half of a byte 2^97.
          scale[group][r] = mul2(X{}, scale[group][r], kBits == 4 && r == 1 ? 0x70007000u : 0x72007200u);
        }
      }
    }
  }

  // The A fragment of k16 step `slice` of what was loaded.
  __device__ __forceinline__ void fragment(u32 (&a)[4], int slice) const {
    const int group = kPerRow ? 0 : slice * kBodyGroups / (kBatches * kBatch);
    if constexpr (kScaled) {
      if constexpr (kZero)
        int4_fragment(X{}, a, words[slice], offset[group]);
      else
        int4_fragment(X{}, a, words[slice]);
      return;
    }
    if constexpr (kBits == 8 && kFused)
      int8_places(a, words[2 * slice], words[2 * slice + 1]);
    else if constexpr (kBits == 8)
      int8_fragment(X{}, a, words[2 * slice], words[2 * slice + 1]);
    else if constexpr (kFused)
      int4_places(a, words[slice]);
    else
      int4_fragment(X{}, a, words[slice]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kPerRow && kZero)
        a[i] = add2(X{}, a[i], offset[0][i % 2]);
      else if constexpr (kFused || kZero)
        a[i] = fma2(X{}, a[i], scale[group][i % 2], offset[group][i % 2]);
      else if constexpr (!kPerRow)
        a[i] = mul2(X{}, a[i], scale[group][i % 2]);
    }
  }
};

// The inverse; zeros past the end.
__device__ __forceinline__ uint4 load_eight(const u16* from, i64 left, bool whole) {
  u32 words[4] = {};
  if (whole) {
    if (left > 0) return *reinterpret_cast<const uint4*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < left) words[i / 2] |= static_cast<u32>(from[i]) << (16 * (i % 2));
  }
  return {words[0], words[1], words[2], words[3]};
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) LQ_PAIRS
    prefill_a16(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap tail_map, const u8* packed, const u8* scales,
                const u8* zeros, const u16* bias, const u16* residual, u16* y, float4* partials, int* arrivals,
#if LQ_ASIDE
                const __grid_constant__ TensorMap y_map,
#if LQ_RESIDUAL
                const __grid_constant__ TensorMap residual_map,
#endif
#endif
                i64 m, i64 n, i64 k,
                i64 all_blocks, i64 by_steps_of_group, i64 ring_stages, LQ_WORK_PARAMETERS, i64 steps_of_group) {
  extern __shared__ __align__(1024) u8 ring[];
  const int stages = static_cast<int>(ring_stages);
  u8* const scale_ring = ring + stages * kStage;
  u8* const staging = scale_ring + stages * kScaleStage;
  u64* const full = reinterpret_cast<u64*>(staging + kStaging + kHandBoxes);  // a stage is there
  u64* const rest = full + kMaxStages;                                        // ... the second half of its x, if it has its own barrier
  u64* const empty = rest + kMaxStages;
  int* const arrived = reinterpret_cast<int*>(empty + kMaxStages + (kSplit ? kConsumerWarps + 1 : kHalved ? kConsumerWarps : 0));
  u64* const taken = empty + kMaxStages + (kHalved ? kConsumerWarps + 1 : 1);  // a tile's results are on their way from the ring
  u64* const received = empty + kMaxStages;             // a warp's sums of the other CTA are in the inbox
  u64* const acknowledged = received + kConsumerWarps;  // the other CTA has what was sent, and room for more
  u64* const handed = empty + kMaxStages + 3;      // a warp's sums of the other team are in its box
  u64* const accepted = handed + kConsumerWarps;   // ... have been read there

  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int blocks = static_cast<int>(all_blocks), cta = static_cast<int>(blockIdx.x) / kPair;
  const int rank = kMulticast ? static_cast<int>(cluster_rank()) : 0;  // among CTAs that share tokens
  const int k_half = kSplit ? static_cast<int>(cluster_rank()) : 0;
  Work work LQ_WORK(cta, static_cast<int>(gridDim.x) / kPair);
  [[maybe_unused]] bool alone = false, second_row = false;  // of a tile that is shared: a row tile by itself, and which
  const auto advance = [&] {
    if (!work.advance()) return false;
    if constexpr (kSplit) work.halve(k_half);
    if constexpr (kHalved)
      if (work.first < work.last) {
        // The first half of the pairs that share a pair of tiles has the first row tile; first and last are then of that half.
        const int parts = (work.last - work.first + 1) / 2;
        second_row = cta - work.first >= parts;
        work.first += second_row ? parts : 0, work.last = work.first + parts - 1;
        const int length = work.end - work.begin;
        work.begin = (2 * (cta - work.first) + rank) * length, work.end = work.begin + length;
        alone = true;
      } else {
        alone = false;
      }
    return true;
  };
  // Then the row tile is the one or the other of a pair's.
  const auto halved = [&] { return kHalved && alone; };

  const auto is_whole = [&] { return n % 8 == 0 && reinterpret_cast<u64>(y) % 16 == 0; };
  const auto aside = [&] {
    const bool aligned = is_whole() && (!kResidual || reinterpret_cast<u64>(residual) % 16 == 0);
    return kAside && aligned && work.first == work.last && !halved();
  };

  const auto begin = [&] {
    work.start_with(cta);
    return advance();
  };
  // Warps 2 and 3 initialise mbarriers and say so; others wait for that alone. Each place that waits has a barrier of its own, as synccheck
  // reports warps that wait for one, __syncthreads or a named one, at several.
  const auto initialised = [&] {
    named_barrier_arrive(kWeightsJoin, 96);
    named_barrier_arrive(kTokensJoin, 96);
    named_barrier_arrive(kConsumersJoin, 64 + kTeams * kConsumers);
  };
  const auto tell_cluster = [&] {
    if constexpr (kPair > 1) barriers_initialised();
  };

  // What has to be done before the first copies is not hidden: a CTA starts when its predecessor has left, and those that start last end
  // last. So warps find out what to copy while others, that copy nothing, initialise the barriers, and nothing else comes before a copy.
  if (warp < 4) {
    decrease_registers<kWarpgroups == 3 || kTeams == 2 ? 32 : 40>();
    int stage = 0;
    u32 parity = 1;
    if (warp == 0) {
      bool more = begin();
      // What is read once must not push out what is read again.
      const u64 policy = work.tokens == 1 ? policy_evict_first() : policy_evict_normal();
      const Divisor by_group(by_steps_of_group);
      const bool one_step = divides_by_one(by_steps_of_group);
      bool said = false;  // that the barriers are initialised: a matter for others, after the first copies
      bool again = false;  // the ring has been filled once: what comes next takes the place of what was read
      [[maybe_unused]] u32 asked = 0;  // when weights were asked for last
      named_barrier(kWeightsJoin, 96);
      for (; more; more = advance()) {
        // The second CTA of a pair may have no rows: it multiplies what is in its ring, and stores nothing.
        const int block = (work.row * kSharers + (halved() ? second_row : rank)) * kBlocks, left = blocks - block;
        const int here = left < kBlocks ? (kMulticast && left < 0 ? 0 : left) : kBlocks;
        stage = uniform(stage), parity = uniform(parity);
        const u8* next_codes = packed + (static_cast<i64>(kPieces * work.begin) * blocks + block) * kBlockBytes;
        const int first_group = kGroups > 1 ? work.begin : by_group(work.begin);
        int left_of_group = kGroups > 1 ? 1 : (first_group + 1) * static_cast<int>(steps_of_group) - work.begin;
        i64 next_scales = (static_cast<i64>(first_group) * blocks + block) * kStepScales;
#pragma unroll 1
        for (int step = work.begin; step < work.end; ++step) {
          mbarrier_wait(empty + stage, parity);
          if (again) fence_async_proxy();
          if constexpr (kPaced)
            if (!again) {
              while (said && clock_now() - asked < kPace) continue;
              asked = clock_now();
            }
          if (elect_one()) {
            const auto codes_of = [&](int piece) {
              return kPaced ? next_codes + static_cast<i64>(piece) * blocks * kBlockBytes
                            : packed + (static_cast<i64>(kPieces * step + piece) * blocks + block) * kBlockBytes;
            };
            if constexpr (kPieces == 1) {
              mbarrier_arrive_expect(full + stage, here * (kBlockBytes + kBlockScaleBytes));
              if (!kMulticast || here > 0)
                bulk_copy(ring + stage * kStage + kXBytes, codes_of(0), here * kBlockBytes, full + stage, policy);
            } else {
              // The last step may have one piece. What an earlier step left of the other is multiplied by zeros.
              const int pieces = (2 * step + 1) * (kStep / 2) < static_cast<int>(k) ? 2 : 1;
              mbarrier_arrive_expect(full + stage, here * pieces * kBlockBytes);
              if (!kMulticast || here > 0)
                for (int piece = 0; piece < pieces; ++piece)
                  bulk_copy(ring + stage * kStage + kXBytes + piece * kPieceBytes, codes_of(piece), here * kBlockBytes, full + stage,
                            policy);
            }
            if (!kPerRow && (!kMulticast || here > 0)) {
              const int group = kGroups > 1 || one_step ? step : by_group(step);  // or all of a step
              const i64 from = kPaced ? next_scales : (static_cast<i64>(group) * blocks + block) * kStepScales;
              u8* const to = scale_ring + stage * kScaleStage;
              bulk_copy(to, scales + from, here * kStepScales, full + stage, policy);
              if constexpr (kZero) bulk_copy(to + kZeros, zeros + from, here * kStepScales, full + stage, policy);
            }
          }
          if constexpr (kPaced) {
            next_codes += static_cast<i64>(kPieces) * blocks * kBlockBytes;
            if (!kPerRow && --left_of_group == 0)
              next_scales += static_cast<i64>(blocks) * kStepScales, left_of_group = kGroups > 1 ? 1 : static_cast<int>(steps_of_group);
          }
          __syncwarp();
          if (!said) tell_cluster();
          said = true;
          if (++stage == stages) stage = 0, parity ^= 1, again = true;
        }
        for (int i = 0; i < Results::kStages && aside(); ++i) {
          mbarrier_wait(empty + stage, parity);
          if (elect_one()) mbarrier_arrive(full + stage);
          __syncwarp();
          if (++stage == stages) stage = 0, parity ^= 1, again = true;
        }
      }
    } else if (warp == 1) {
      bool more = begin();
      // Few tokens are read again and again while weights stream through L2: 0 to 15% for up to 256 tokens.
      const bool few = m * k <= 4 << 20;
      const u64 policy = work.rows == 1 ? policy_evict_first() : few ? policy_evict_last() : policy_evict_normal();
      named_barrier(kTokensJoin, 96);
      tell_cluster();
      wait_for_previous_kernel();
      if constexpr (kMulticast) wait_for_barriers_of_cluster();
      for (; more; more = advance()) {
        stage = uniform(stage), parity = uniform(parity);
        // Of the last tile, only the tokens that exist: the copy engine takes as long for a row of zeros as for many that it loads.
        const bool last = work.token + 1 == work.tokens;
        const int box = last ? (static_cast<int>(m) - work.token * kTokens) * 128 : kBoxBytes;
        const int token = work.token * kTokens + rank * kShareTokens, left = static_cast<int>(m) - token;  // of this CTA's share
        const bool tail = kMulticast ? left < kShareTokens : last;
        const TensorMap* const map = tail ? &tail_map : &x_map;
        const bool alone = halved();
#pragma unroll 1
        for (int step = work.begin; step < work.end; ++step) {
          mbarrier_wait(empty + stage, parity);
          if (elect_one()) {
#pragma unroll
            for (int half = 0; half < kStep / 64; ++half) {
              u64* const barrier = (half && kRest ? rest : full) + stage;
              if (half == 0 || kRest) mbarrier_arrive_expect(barrier, kRest ? box : kStep / 64 * box);
              u8* const to = ring + stage * kStage + half * kBoxBytes + rank * kShareTokens * 128;
              if (kHalved && alone) {
#pragma unroll
                for (int share = 0; share < kSharers; ++share) {
                  const int from = work.token * kTokens + share * kShareTokens, more = static_cast<int>(m) - from;
                  u8* const there = ring + stage * kStage + half * kBoxBytes + share * kShareTokens * 128;
                  if (more > 0)
                    tensor_copy_2d(there, more < kShareTokens ? &tail_map : &x_map, step * kStep + half * 64, from, barrier, policy);
                }
              } else if constexpr (!kMulticast)
                tensor_copy_2d(to, map, step * kStep + half * 64, token, barrier, policy);
              else if (left > 0)
                tensor_copy_2d_multicast(to, map, step * kStep + half * 64, token, barrier, (1 << kSharers) - 1, policy);
            }
          }
          __syncwarp();
          if (++stage == stages) stage = 0, parity ^= 1;
        }
        for (int i = 0; i < Results::kStages && aside(); ++i) {
          mbarrier_wait(empty + stage, parity);
          if (elect_one()) {
#if LQ_ASIDE && LQ_RESIDUAL
            // What is added to the results waits where they will be.
            const int feature = (work.row * kSharers + rank) * kRows + i * kStageBoxes * 64;
            const int left = static_cast<int>(n) - feature, boxes = left > 64 ? kOutBoxes / Results::kStages : left > 0 ? 1 : 0;
            mbarrier_arrive_expect(full + stage, boxes * (m < kTokens ? static_cast<int>(m) : kTokens) * 128);
            for (int half = 0; half < boxes; ++half)
              tensor_copy_2d(ring + stage * kStage + half * kBoxBytes, &residual_map, feature + half * 64, work.token * kTokens,
                             full + stage, policy);
#else
            mbarrier_arrive(full + stage);
#endif
            if constexpr (kRest) mbarrier_arrive(rest + stage);
          }
          __syncwarp();
          if (++stage == stages) stage = 0, parity ^= 1;
        }
      }
      // A CTA whose barriers the other still arrives at must not go.
      if constexpr (kMulticast)
        for (int i = 0; i < stages; ++i) {
          mbarrier_wait(empty + stage, parity);
          if (++stage == stages) stage = 0, parity ^= 1;
        }
    } else if (warp == 2) {
      if (elect_one()) {
        mbarriers_init_ring(full, 2, empty, kSharers * kConsumerWarps * kArrivingLanes, stages);
        mbarrier_init_fence();
      }
      __syncwarp();
      initialised();
      tell_cluster();
#if LQ_ASIDE
      if (!is_whole()) return;
      wait_for_previous_kernel();
      for (bool more = begin(); more; more = advance()) {
        stage = (stage + work.end - work.begin) % stages;
        if (!aside()) continue;
        const int feature = (work.row * kSharers + rank) * (kRows / kFeatureRows);
#pragma unroll 1
        for (int part = 0; part < Results::kParts; ++part) {
          named_barrier(Results::kBarrier + part, kConsumers + 32);
          const int token = work.token * kTokens + part * Results::kPartTokens;
          if (lane == 0) {
#pragma unroll
            for (int box = 0; box < kOutBoxes; ++box) {
              const int at = (stage + box / kStageBoxes) % stages;
              const u8* const from = ring + at * kStage + box % kStageBoxes * kBoxBytes + part * (Results::kPartTokens * 128);
              if (feature + box * 64 < n && token < m) tensor_store_2d(&y_map, feature + box * 64, token, from);
              // A group for each stage, the last part's; others are in the first.
              if (part == Results::kParts - 1 && (box % kStageBoxes == kStageBoxes - 1 || box == kOutBoxes - 1)) bulk_stores_commit();
            }
          }
        }
        Results::free<kSharers, kSharers * kConsumerWarps * kArrivingLanes>(empty, stage, stages, lane);
        if (lane == 0) mbarrier_arrive(taken);
      }
#endif
    } else {
      if (elect_one()) {
        prefetch_tensor_map(&x_map), prefetch_tensor_map(&tail_map);
        if constexpr (kRest) mbarriers_init<kMaxStages>(rest, 1);
        if constexpr (kExchanges) mbarriers_init<kConsumerWarps>(received, 1);
        if constexpr (kSplit) mbarrier_init(acknowledged, kConsumerWarps * kArrivingLanes);
        if constexpr (kTeams > 1) mbarriers_init<2 * kConsumerWarps>(handed, kArrivingLanes);
#if LQ_ASIDE
        mbarrier_init(taken, 1), prefetch_tensor_map(&y_map);
#endif
        mbarrier_init_fence();
      }
      __syncwarp();
      initialised();
      tell_cluster();
      let_next_kernel_start();
    }
    return;
  }

  increase_registers<kTeams == 2 ? 112 : kWarpgroups == 3 ? 160 : 232>();
  bool more = begin();
  const int team = kTeams > 1 ? (warp - 4) / kConsumerWarps : 0;
  const int block = warp - 4 - team * kConsumerWarps, warpgroup = block / 4, g = lane / 4, thread = threadIdx.x - 128 - team * kConsumers;
  const bool whole = is_whole();
  u8* const my_staging = staging + warpgroup * (kExchanges ? kBox / kWarpgroups : kChunk * kPitch);
  const u8* const my_codes = ring + kXBytes + block * kBlockBytes + lane * 16;
  const u8* const my_scales = scale_ring + block * kStepScales + 2 * g * static_cast<int>(sizeof(ScaleBits));
  const u64 first_descriptor = swizzled_descriptor(shared_address(ring));
  // For the results. Without it the compiler has the ring's address computed in every K step (int8, 256 tokens).
  const u32 ring_address = kAside ? uniform(shared_address(ring)) : 0;
  int stage = team;
  u32 parity = 0, turn = 0;  // of the ring, of exchanges
  [[maybe_unused]] int ahead = team;  // K steps of a tile before the team's first
  [[maybe_unused]] u32 hand = 0;      // of what teams hand over
  Weights weights;
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

  // Each CTA of a pair that shares K keeps one half of the tokens, and adds what the other has of them: two numbers, in either order.
  const auto exchange = [&](auto kept_half, float(&acc)[kTokens / 2]) {
    constexpr int kKept = decltype(kept_half)::value * kKeptUnits, kSent = kKeptUnits - kKept;
    const u32 there = static_cast<u32>(decltype(kept_half)::value ^ 1), to = map_shared(staging + block * kWarpBox, there);
    const u32 barrier = map_shared(received + block, there);
    const float4* const inbox = reinterpret_cast<const float4*>(staging + block * kWarpBox) + lane;
    const auto sums = [&](int unit) { return float4{acc[4 * unit], acc[4 * unit + 1], acc[4 * unit + 2], acc[4 * unit + 3]}; };
    if (lane == 0) mbarrier_arrive_expect(received + block, kWarpBox);
    if constexpr (kSplit) mbarrier_wait(acknowledged, turn ^ 1);
#pragma unroll
    for (int j = 0; j < kKeptUnits; ++j) store_async(to + (j * 32 + lane) * 16, sums(kSent + j), barrier);
    mbarrier_wait(received + block, kSplit ? turn : 0);  // of tiles that are halved a CTA has one, and first
#pragma unroll
    for (int j = 0; j < kKeptUnits; ++j) {
      const float4 mine = sums(kKept + j), other = inbox[j * 32];
      acc[4 * j] = mine.x + other.x, acc[4 * j + 1] = mine.y + other.y;
      acc[4 * j + 2] = mine.z + other.z, acc[4 * j + 3] = mine.w + other.w;
    }
    if constexpr (kSplit) turn ^= 1;
  };
  const auto acknowledge = [&] {
    __syncwarp();
    if (lane < kArrivingLanes) mbarrier_arrive_at(acknowledged, static_cast<u32>(k_half ^ 1));
  };
  [[maybe_unused]] bool cluster_known = false;  // that the other CTA's barriers are initialised
  named_barrier(kConsumersJoin, 64 + kTeams * kConsumers);
  tell_cluster();

  for (; more; more = advance()) {
    const i64 row0 = static_cast<i64>(work.row * kSharers + (halved() ? second_row : rank)) * kRows;
    const int own_tokens = halved() ? kTokens / 2 : kOwnTokens;
    const i64 token0 = static_cast<i64>(work.token) * kTokens + (halved() ? rank : k_half) * own_tokens;  // of those that are stored
    // The inbox is free when it has been read or, where results pass through it and another tile follows, when the tile is stored.
    const bool keep_inbox = kSplit && !kTransposed && (work.unit < work.end_unit || work.whole < work.rows * work.tokens);
    [[maybe_unused]] ScaleBits scale_of_row[2] = {};  // which nobody waits for before the tile is done
    if constexpr (kPerRow) {
      if (row0 / 16 + block < blocks) {
        const i64 at = row0 + block * 16 + 2 * g;
#pragma unroll
        for (int r = 0; r < 2; ++r) scale_of_row[r] = reinterpret_cast<const ScaleBits*>(scales)[at + r];
        if constexpr (kZero) {
          const float2 zero = load_two(zeros + at * static_cast<int>(sizeof(ScaleBits)));
          spread(weights.offset[0], fragment_offset(X{}, zero, float2{1.0f, 1.0f}));
        }
      }
    }

    float acc[kTokens / 2];
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) acc[i] = 0.0f;
    pin_sums(acc);
    // The sums of runs that are done, from zero on as where parts are added up, or of groups, scaled.
    [[maybe_unused]] float total[kRuns || kScaled ? kTokens / 2 : 1] = {};
    // What the sums of the present group are multiplied by, when they go to the total.
    [[maybe_unused]] float2 scale_of_sums = {};
    [[maybe_unused]] const auto scale_sums = [&] {
      wgmma_wait<0>();
      pin_sums(acc);
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) total[i] = fmaf(acc[i], i / 2 % 2 ? scale_of_sums.y : scale_of_sums.x, total[i]);
    };
    [[maybe_unused]] int run = 0, run_begin = 0, run_end = 0;  // the present run's K steps
    const auto next_run = [&] {
      run_begin = run_end;
      run_end = work.by_workers(++run * work.steps);
    };
    if constexpr (kRuns) next_run();
    u32 a[kSets][kBatch][4];
    wait_for_previous_kernel();  // the workspace and y are written from here on, and x cannot come before
    const int first = work.begin + (kTeams > 1 ? ahead : 0);
    if (kTeams == 1 || first < work.end) {
      mbarrier_wait(full + stage, parity);
      weights.load(my_codes + stage * kStage, my_scales + stage * kScaleStage);
    }
    stage = uniform(stage), parity = uniform(parity);
    int last = stage;
#pragma unroll 1
    for (int step = first; step < work.end; step += kTeams) {
      u64 tokens = first_descriptor + static_cast<u32>(stage * (kStage / 16));
      const int before = last;
      const u32 rest_parity = kRest ? parity : 0;
      last = stage;
#pragma unroll 1
      for (int half = 0;; ++half) {
#pragma unroll
        for (int batch = 0; batch < kBatches; ++batch) {
#pragma unroll
          for (int i = 0; i < kBatch; ++i) weights.fragment(a[batch % kSets][i], batch * kBatch + i);
          if constexpr (kScaled)
            if (batch % kGroupBatches == 0) {
              scale_sums();
              scale_of_sums = weights.sum_scale[batch / kGroupBatches];
            }
          wgmma_fence();
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            const int slice = batch * kBatch + i;
            const u64 at = tokens + (slice / 4 * kBoxBytes + slice % 4 * 32) / 16;
            const bool adds = !(kScaled && i == 0 && batch % kGroupBatches == 0) && (!kRuns || slice > 0 || step > run_begin);
            Wgmma<kTokens>::run(X{}, acc, a[batch % kSets][i], at, adds);
          }
          wgmma_commit();
          if (kLater && batch == 0) weights.load_piece(my_codes + last * kStage, 1);
          if (batch == kBatches - 1) {
            if (half + 1 < kHalves) {
              if constexpr (kRest) mbarrier_wait(rest + last, rest_parity);
              weights.load_codes(my_codes + last * kStage + 512);
              if constexpr (kGroups > 1) weights.load_scales(my_scales + last * kScaleStage + kBodyGroups * kScaleBytes);
              tokens += kBoxBytes / 16;
            } else {
              // All lanes have read what they unpack of `last`, and one will release it for all. Here that is a NOP; in release(), which
              // a condition guards, up to 48 instructions more.
              __syncwarp();
              if constexpr (kTeams > 1) {
                if ((stage += kTeams) >= stages) stage -= stages, parity ^= 1;
              } else {
                if (++stage == stages) stage = 0, parity ^= 1;
              }
              if (step + kTeams < work.end) {
                mbarrier_wait(full + stage, parity);
                weights.load(my_codes + stage * kStage, my_scales + stage * kScaleStage);
              }
            }
          }
          wgmma_wait<kPending>();
          // Of the stage before, no wgmma is in flight.
          if (batch == kPending - 1 && half == 0 && step > first) release(before);
        }
        if (half + 1 == kHalves) break;
      }
      if constexpr (kRuns)
        if (step + 1 == run_end) {
          next_run();
          wgmma_wait<0>();
          pin_sums(acc);
#pragma unroll
          for (int i = 0; i < kTokens / 2; ++i) total[i] += acc[i];
        }
    }
    if constexpr (kScaled) scale_sums();
    wgmma_wait<0>();
    pin_sums(acc);
    if constexpr (kRuns || kScaled)
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) acc[i] = total[i];
    if (kTeams == 1 || first < work.end) release(last);
    if constexpr (kTeams > 1) {
      // The first team adds up and stores; the other goes on with the next tile.
      ahead = (ahead + work.end - work.begin) & 1;
      float4* const box = reinterpret_cast<float4*>(staging + kStaging + block * kHandBox) + lane;
      if (team > 0) {
        mbarrier_wait(accepted + block, hand ^ 1);
#pragma unroll
        for (int j = 0; j < kUnits; ++j) box[j * 32] = {acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]};
      } else {
        mbarrier_wait(handed + block, hand);
#pragma unroll
        for (int j = 0; j < kUnits; ++j) {
          const float4 other = box[j * 32];
          acc[4 * j] += other.x, acc[4 * j + 1] += other.y, acc[4 * j + 2] += other.z, acc[4 * j + 3] += other.w;
        }
      }
      __syncwarp();
      if (lane < kArrivingLanes) mbarrier_arrive((team > 0 ? handed : accepted) + block);
      hand ^= 1;
      if (team > 0) continue;
    }
    float row_scale[2] = {kUnit, kUnit};
    if constexpr (kPerRow)
#pragma unroll
      for (int r = 0; r < 2; ++r) row_scale[r] *= to_float(Scale{}, scale_of_row[r]);

    if constexpr (kExchanges) {
      if (kSplit || halved()) {
        if (!cluster_known) wait_for_barriers_of_cluster();
        cluster_known = true;
        if (k_half + rank == 0)
          exchange(Int<0>{}, acc);
        else
          exchange(Int<1>{}, acc);
        if (kSplit && !keep_inbox) acknowledge();
      }
    }
    const bool in_parts = !kRuns && work.first < work.last;
    bool cut = false;  // the first worker has a tile before this one
    const auto part_of = [&](int worker) {
      const i64 part = static_cast<i64>(2 * worker + (cut && worker == work.first)) * kPair + rank + k_half;
      return partials + part * (kOwnUnits * kConsumers) + thread;
    };
    const auto sums = [&](int unit) { return float4{acc[4 * unit], acc[4 * unit + 1], acc[4 * unit + 2], acc[4 * unit + 3]}; };
    // The sums of some units, in the order of K.
    const auto add_up = [&](float4(&total)[kAtOnce], int j0) {
#pragma unroll 1
      for (int worker = work.first; worker <= work.last; worker += kWorkers) {
        float4 more[kWorkers][kAtOnce] = {};
#pragma unroll
        for (int w = 0; w < kWorkers; ++w)
          if (worker + w <= work.last) {
            const float4* const from = part_of(worker + w) + j0 * kConsumers;
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) more[w][j] = __ldcg(from + j * kConsumers);
          }
#pragma unroll
        for (int w = 0; w < kWorkers; ++w)
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j)
            total[j].x += more[w][j].x, total[j].y += more[w][j].y, total[j].z += more[w][j].z, total[j].w += more[w][j].w;
      }
    };
    [[maybe_unused]] int to_add = 0;  // chunks that this CTA adds up, where that is done a chunk ahead
    if constexpr (kAhead)
      if (in_parts) {
        cut = !kHalved && work.start(work.first) < work.tile * work.steps;
        // Leave this part. The last to come adds up all of them, its own from memory as well: so the order does not depend on who it is.
        // Equal parts, which come at once, have about as many sections, and each CTA begins with another: so each is the last to come to
        // about one of them, and adds that up.
        const int parts = work.last - work.first + 1;
        int chunks = kPartChunks;  // of a section
        if (parts * work.shared_tiles * (kHalved ? 2 : 1) == work.workers)
          for (chunks = 1; chunks * parts < kPartChunks;) ++chunks;
        int begin = (cta - work.first) * chunks;
        if (begin >= kPartChunks) begin = 0;
#pragma unroll 1
        for (int left = kPartChunks; left > 0; left -= chunks) {
          float4* const mine = part_of(cta);
#pragma unroll
          for (int chunk = 0; chunk < kPartChunks; ++chunk)
            if (begin <= chunk && chunk < begin + chunks)
#pragma unroll
              for (int j = chunk * kAtOnce; j < (chunk + 1) * kAtOnce; ++j) __stcg(mine + j * kConsumers, sums(j));
          named_barrier(1 + kWarpgroups, kConsumers);
          if (thread == 0) {
            int* const counter = arrivals + ((kHalved ? 2 * work.tile + second_row : work.tile) * kPair + rank) * kPartChunks + begin;
            if (add_acquire_release(counter, 1) == work.last - work.first) to_add |= ((1 << chunks) - 1) << begin, *counter = 0;
          }
          begin = begin + chunks < kPartChunks ? begin + chunks : 0;
        }
        if (thread == 0) *arrived = to_add;
        named_barrier(1 + kWarpgroups, kConsumers);
        to_add = uniform(*arrived);
        if (to_add == 0) continue;
      }
    if (!kAhead && in_parts) {
      cut = !kHalved && work.start(work.first) < work.tile * work.steps;
      // Leave this part. The last to come adds up all of them, its own from memory as well: so the order does not depend on who it is.
      float4* const mine = part_of(cta);
#pragma unroll
      for (int j = 0; j < kPartUnits; ++j) __stcg(mine + j * kConsumers, sums(j));
      named_barrier(1 + kWarpgroups, kConsumers);
      int* const counter = arrivals + (kHalved ? 2 * work.tile + second_row : work.tile) * kPair + rank + k_half;
      if (thread == 0) *arrived = add_acquire_release(counter, 1);
      named_barrier(1 + kWarpgroups, kConsumers);
      if (uniform(*arrived) < work.last - work.first) {
        if (keep_inbox) acknowledge();
        continue;
      }
      if (thread == 0) *counter = 0;  // for the next launch
      if constexpr (!kRolled)
#pragma unroll
        for (int j0 = 0; j0 < kPartUnits; j0 += kAtOnce) {
          float4 total[kAtOnce] = {};
          add_up(total, j0);
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
            const int at = 4 * (j0 + j);
            acc[at] = total[j].x, acc[at + 1] = total[j].y, acc[at + 2] = total[j].z, acc[at + 3] = total[j].w;
          }
        }
    }

    // Out: so many tokens at a time through shared memory, so that a warpgroup's 64 results of a token are one piece of 128 bytes (a
    // warp's own 32 bytes would need no barrier, but take half as long again).
    float offset[2] = {};
    if (bias)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const i64 feature = kGated ? (row0 + block * 16) / 2 + g : row0 + block * 16 + g + 8 * r;
        if (feature < n) offset[r] = to_float(X{}, bias[kGated ? r * n + feature : feature]);
      }
    const i64 first_feature = (row0 + warpgroup * 64) / kFeatureRows;
    const int stored = static_cast<int>(m - token0 < own_tokens ? m - token0 : own_tokens);
    // Results of a chunk before its epilogue, where chunks are rolled.
    const auto take = [&](float(&to)[kChunk / 2], int chunk) {
      const auto scale = [&](int i, float sum) { to[i] = fmaf(sum, row_scale[i / 2 % 2], offset[i / 2 % 2]); };
      if (!kAhead && in_parts) {
        float4 total[kAtOnce] = {};
        add_up(total, chunk * kAtOnce);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j)
          scale(4 * j, total[j].x), scale(4 * j + 1, total[j].y), scale(4 * j + 2, total[j].z), scale(4 * j + 3, total[j].w);
      } else {
#pragma unroll
        for (int each = 0; each < kChunks; ++each)
          if (each == chunk)
#pragma unroll
            for (int i = 0; i < kChunk / 2; ++i) scale(i, acc[each * (kChunk / 2) + i]);
      }
    };
    const auto scaled = [&](float sum, int r) { return kRolled ? sum : fmaf(sum, row_scale[r], offset[r]); };
    if constexpr (kTransposed) {
      // Eight tokens of a row are 32 bytes.
      float* const to = reinterpret_cast<float*>(y);
      constexpr int kTurnUnits = kRolled ? kChunk / 8 : kOwnUnits;
#pragma unroll 1
      for (int turn = 0; turn < kOwnUnits / kTurnUnits; ++turn) {
        float rolled[kChunk / 2];
        if constexpr (kRolled) take(rolled, turn);
        const float* const sums = kRolled ? rolled : acc;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const i64 row = row0 + block * 16 + g + 8 * r;
#pragma unroll
          for (int unit = 0; unit < kTurnUnits; ++unit) {
            const int token = (turn * kTurnUnits + unit) * 8 + lane % 4 * 2;
            float* const at = to + row * m + token0 + token;
            const float2 pair = {scaled(sums[4 * unit + 2 * r], r), scaled(sums[4 * unit + 2 * r + 1], r)};
            if (row < n && token + 1 < stored && m % 2 == 0) {
              *reinterpret_cast<float2*>(at) = pair;
            } else if (row < n) {
              if (token < stored) at[0] = pair.x;
              if (token + 1 < stored) at[1] = pair.y;
            }
          }
        }
      }
      continue;
    }
    // Sixteen tokens of a warp's rows to shared memory: each lane has the address of eight results, of part my_part() of token my_token().
    const auto my_token = [&] { return (kGated ? lane / 8 % 2 : lane / 16) * 8 + lane % 8; };
    const auto my_part = [&] { return kGated ? block % 4 : block % 4 * 2 + lane / 8 % 2; };
    const auto leave = [&](const float* sums, u32 to) {
      if constexpr (kGated) {
        u32 r[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float* const gate = sums + 4 * i;
          float result[2];
#pragma unroll
          for (int j = 0; j < 2; ++j)
            result[j] = silu_multiply(scaled(gate[j], 0), scaled(gate[j + 2], 1));
          r[i] = from_floats(X{}, result[0], result[1]);
        }
        store_matrix_x2_transposed(to, r);
      } else {
        u32 r[4];
        if constexpr (kResidual) load_matrix_x4_transposed(r, to);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float2 result = {scaled(sums[2 * i], i % 2), scaled(sums[2 * i + 1], i % 2)};
          if constexpr (kResidual) {
            const float2 more = to_floats(X{}, r[i]);
            result.x += more.x, result.y += more.y;
          }
          r[i] = from_floats(X{}, result.x, result.y);
        }
        store_matrix_x4_transposed(to, r);
      }
    };
    // To staging in rows of kPitch bytes, again and again; or to the ring, in the swizzle of 128 bytes in which the map of y takes it. There
    // gates and ups of both warpgroups make one box; otherwise each has its own, in this stage or the next.
    const bool by_ring = aside();
    u32 to = shared_address(my_staging) + my_token() * kPitch + my_part() * 16, pair_bytes = 16 * kPitch, chunk_bytes = 0;
    if (by_ring) {
      int at = stage;
      mbarrier_wait(full + stage, parity);
      if constexpr (kRest) mbarrier_wait(rest + stage, parity);  // which says nothing more, but no phase goes by unseen
      if (Results::kStages > 1 && warpgroup > 0) {
        const bool wraps = ++at == stages;
        if (wraps) at = 0;
        mbarrier_wait(full + at, parity ^ wraps);
      }
      mbarrier_wait(taken, turn ^ 1);
      const int column = (kGated ? warpgroup * 4 + my_part() : my_part()) ^ lane % 8;
      to = ring_address + at * kStage + (kGated || Results::kStages > 1 ? 0 : warpgroup * kBoxBytes) + my_token() * 128 + column * 16;
      pair_bytes = 16 * 128, chunk_bytes = kChunk * 128;
    }
    const auto pass_results = [&] {
      turn ^= 1;
#pragma unroll
      for (int i = 0; i < Results::kStages; ++i)
        if (++stage == stages) stage = 0, parity ^= 1;
    };
    // The residual comes in through shared memory as the results go out, a chunk ahead.
    constexpr int kCopies = kChunk * 8 / 128;  // of 8 results, by a thread
    const bool aligned = whole && (!kResidual || reinterpret_cast<u64>(residual) % 16 == 0);
    uint4 added[kCopies];
    auto fetch = [&](int chunk) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int at = thread % 128 + i * 128, token = chunk * kChunk + at / kParts;
        const i64 feature = first_feature + at % kParts * 8;
        if (token < stored) added[i] = load_eight(residual + (token0 + token) * n + feature, n - feature, aligned);
      }
    };
    // What happens to a chunk from both loops below. Macros: with a lambda or a function, tiles of up to 128 tokens become other machine code,
    // which was not measured.
#define LQ_ADD_RESIDUAL(NEXT) \
  _Pragma("unroll") \
  for (int i = 0; i < kCopies; ++i) { \
    const int at = thread % 128 + i * 128; \
    *reinterpret_cast<uint4*>(my_staging + at / kParts * kPitch + at % kParts * 16) = added[i]; \
  } \
  named_barrier(1 + warpgroup, 128); \
  fetch(NEXT);
    // All that a thread copies is read before it is stored, so that it waits once; rolled where results lie anywhere, and of tiles that need
    // their registers.
    constexpr int kOutTokens = 128 / kParts;  // that a warpgroup copies at once
    const int out_token = thread % 128 / kParts;
    const i64 out_feature = first_feature + thread % 128 % kParts * 8;
    u16* const my_y = y + (token0 + out_token) * n + out_feature;
    const u8* const my_results = my_staging + out_token * kPitch + thread % 128 % kParts * 16;
#define LQ_COPY_OUT \
  if (!kRolled && whole) { \
    const int left = out_feature < n ? stored - chunk * kChunk - out_token : 0; \
    uint4 out[(kChunk + kOutTokens - 1) / kOutTokens]; \
    _Pragma("unroll") \
    for (int i = 0; i < kChunk; i += kOutTokens) \
      if (kChunk % kOutTokens == 0 || i + out_token < kChunk) \
        out[i / kOutTokens] = *reinterpret_cast<const uint4*>(my_results + i * kPitch); \
    _Pragma("unroll") \
    for (int i = 0; i < kChunk; i += kOutTokens) \
      if (i < left && (kChunk % kOutTokens == 0 || i + out_token < kChunk)) \
        __stcg(reinterpret_cast<uint4*>(my_y + (chunk * kChunk + i) * n), out[i / kOutTokens]); \
  } else { \
    _Pragma("unroll 1") \
    for (int i = thread % 128; i < kChunk * kParts; i += 128) { \
      const int token = i / kParts, part = i % kParts; \
      const i64 feature = first_feature + part * 8; \
      if (chunk * kChunk + token >= stored) continue; \
      u16* const to = y + (token0 + chunk * kChunk + token) * n + feature; \
      const u8* const from = my_staging + token * kPitch + part * 16; \
      if (whole) { \
        if (feature < n) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from); \
      } else { \
        _Pragma("unroll 1") \
        for (int j = 0; j < 8 && feature + j < n; ++j) to[j] = reinterpret_cast<const u16*>(from)[j]; \
      } \
    } \
  }
    if constexpr (kAhead)
      if (in_parts) {
        // The sums in registers are no longer needed: so a chunk's parts are on their way while the one before is stored.
        float4 parts[kPartsAtOnce][kAtOnce];
        const auto load = [&](int chunk, int first) {
#pragma unroll
          for (int w = 0; w < kPartsAtOnce; ++w) {
            const float4* const from = part_of(first + w) + chunk * kAtOnce * kConsumers;
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) parts[w][j] = first + w <= work.last ? __ldcg(from + j * kConsumers) : float4{};
          }
        };
        // The next chunk from this one on that the CTA adds up.
        const auto find = [&](int chunk) {
          while (chunk * kChunk < stored && (to_add >> chunk & 1) == 0) ++chunk;
          return chunk;
        };
        int next = find(0);
        if (next * kChunk < stored) {
          load(next, work.first);
          if constexpr (kResidual) fetch(next);
        }
#pragma unroll 1
        while (next * kChunk < stored) {
          const int chunk = next;
          next = find(chunk + 1);
          float4 total[kAtOnce] = {};
#pragma unroll 1
          for (int worker = work.first;;) {
#pragma unroll
            for (int w = 0; w < kPartsAtOnce; ++w)
#pragma unroll
              for (int j = 0; j < kAtOnce; ++j)
                total[j].x += parts[w][j].x, total[j].y += parts[w][j].y, total[j].z += parts[w][j].z, total[j].w += parts[w][j].w;
            worker += kPartsAtOnce;
            if (worker > work.last) break;
            load(chunk, worker);
          }
          if (next * kChunk < stored) load(next, work.first);
          float results[kChunk / 2];
#pragma unroll
          for (int i = 0; i < kChunk / 2; ++i) {
            const float4& four = total[i / 4];
            results[i] = fmaf(i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w, row_scale[i / 2 % 2], offset[i / 2 % 2]);
          }
          named_barrier(1 + warpgroup, 128);
          if constexpr (kResidual) {
            LQ_ADD_RESIDUAL(next)
          }
#pragma unroll
          for (int pair = 0; pair < kChunk / 16; ++pair) leave(results + pair * 8, to + pair * pair_bytes);
          named_barrier(1 + warpgroup, 128);
          LQ_COPY_OUT
        }
        continue;
      }
    if constexpr (kStraight)
      if (by_ring) {
        // Nothing is asked for each chunk: what it has of tokens past the last is of what was in the ring, and the copy engine leaves it out.
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
          for (int pair = 0; pair < kChunk / 16; ++pair) {
            float results[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              const float sum = acc[(chunk * kChunk + pair * 16) / 2 + i];
              results[i] = kRolled ? fmaf(sum, row_scale[i / 2 % 2], offset[i / 2 % 2]) : sum;
            }
            leave(results, to + chunk * (kChunk * 128) + pair * (16 * 128));
          }
          Results::leave<kChunk>(chunk);
        }
        pass_results();
        continue;
      }
    if (kResidual && !by_ring) fetch(0);
#pragma unroll (kRolled ? 1 : kChunks)
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (chunk * kChunk >= stored) {
        if (!by_ring) break;
        Results::leave<kChunk>(chunk);
        continue;
      }
      float rolled[kChunk / 2];
      if constexpr (kRolled) take(rolled, chunk);
      if (!by_ring) named_barrier(1 + warpgroup, 128);
      if (kResidual && !by_ring) {
        LQ_ADD_RESIDUAL(chunk + 1)
      }
#pragma unroll
      for (int pair = 0; pair < kChunk / 16; ++pair) {
        const float* const sums = kRolled ? rolled + pair * 8 : acc + (chunk * kChunk + pair * 16) / 2;
        leave(sums, to + chunk * chunk_bytes + pair * pair_bytes);
      }
      if (by_ring) {
        Results::leave<kChunk>(chunk);
        continue;
      }
      named_barrier(1 + warpgroup, 128);
      LQ_COPY_OUT
    }
    if (by_ring) pass_results();
    if (keep_inbox) {
      fence_async_proxy();
      acknowledge();
    }
  }
  // A CTA that the other still reads from, or acknowledges to, must not go.
  if constexpr (kSplit) mbarrier_wait(acknowledged, turn ^ 1);
}
