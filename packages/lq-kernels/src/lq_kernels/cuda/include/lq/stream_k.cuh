// What the kernels for many tokens share: how a persistent CTA walks through tiles (stream-K), and how it stores one.
#pragma once

#include "lq/hopper.cuh"

namespace lq {

struct alignas(64) TensorMap {
  u8 opaque[128];
};

// The same value, known to the compiler as the same in all lanes. A quotient is not, and where the stage or a piece's bounds depend on
// one, descriptors and addresses of copies leave the uniform registers: 250 clocks more a step.
__device__ __forceinline__ int uniform(int value) { return static_cast<int>(__reduce_or_sync(0xffffffff, static_cast<u32>(value))); }

// A number that is divided by, without a division: cuda/work.py. What is divided is less than 2^31.
struct Divisor {
  u32 factor, shift;

  __device__ __forceinline__ explicit Divisor(i64 packed) : factor(static_cast<u32>(packed)), shift(static_cast<u32>(packed >> 32)) {}
  __device__ __forceinline__ int operator()(int value) const {
    return static_cast<int>(static_cast<u64>(static_cast<u32>(value)) * factor >> shift);
  }
};

// Whether what a kernel was given for a Divisor divides by 1.
__device__ __forceinline__ bool divides_by_one(i64 packed) { return packed >> 32 == 31; }

// What a CTA (a pair of them where they share tokens) does, one piece after the other: K steps [begin, end) of a tile.
struct Work {
  int rows, tokens, raster, steps;  // row tiles (or pairs), token tiles, ...
  int shared_tiles, workers;
  Divisor by_steps, by_band, by_raster, by_last;  // ... the tiles of a band, its rows and those of the last one, ...
  Divisor by_units, by_workers;                   // ... K steps of all shared tiles, and who shares them (or runs of K)
  int whole, stride;                              // the next whole tile
  int unit = 0, end_unit = 0;                     // what is left of the run of K steps of shared tiles

  int tile, row, token, begin, end;  // the current piece
  int first, last;                   // the CTAs that have a part of the tile

  // The first piece of CTA `cta` is the next.
  __device__ __forceinline__ void start_with(int cta) {
    if (cta < workers) unit = start(cta), end_unit = start(cta + 1);
  }

  // First unit of worker w.
  __device__ __forceinline__ int start(int w) const { return by_workers(w * (shared_tiles * steps)); }
  // The worker that has a unit.
  __device__ __forceinline__ int owner(int unit) const { return by_units((unit + 1) * workers - 1); }

  __device__ __forceinline__ bool advance() {
    if (unit < end_unit) {
      tile = by_steps(unit);
      begin = unit - tile * steps;
      end = end_unit - tile * steps < steps ? end_unit - tile * steps : steps;
      first = owner(tile * steps);
      last = owner(tile * steps + steps - 1);
      unit += end - begin;
    } else if (whole < rows * tokens) {
      tile = whole;
      begin = 0, end = steps;
      first = last = 0;
      whole += stride;
    } else {
      return false;
    }
    const int band = by_band(tile), in_band = tile - band * raster * tokens, first_row = band * raster;
    const bool full = rows - first_row >= raster;
    token = full ? by_raster(in_band) : by_last(in_band);
    row = first_row + in_band - token * (full ? raster : rows - first_row);
    return true;
  }

  // Leave the first half of the piece, or the second.
  __device__ __forceinline__ void halve(int half) {
    const int middle = (begin + end + 1) / 2;
    if (half == 0)
      end = middle;
    else
      begin = middle;
  }
};

// The parameters that cuda/work.py gives a kernel, in its order, and what a Work of them begins with. Macros: of a function that returns a
// Work ptxas makes other code, which was not measured.
#define LQ_WORK_PARAMETERS                                                                                                           \
  i64 row_tiles, i64 token_tiles, i64 steps, i64 raster, i64 shared_tiles, i64 workers, i64 by_steps, i64 by_band, i64 by_raster, \
      i64 by_last, i64 by_units, i64 by_workers
#define LQ_WORK(CTA, CTAS)                                                                                                           \
  {static_cast<int>(row_tiles), static_cast<int>(token_tiles), static_cast<int>(raster), static_cast<int>(steps),                   \
   static_cast<int>(shared_tiles), static_cast<int>(workers), Divisor(by_steps), Divisor(by_band), Divisor(by_raster),              \
   Divisor(by_last), Divisor(by_units), Divisor(by_workers), static_cast<int>(shared_tiles) + (CTA), CTAS}

// Eight results of neighbouring out features; `whole` says that they lie at a multiple of 16 bytes.
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

}  // namespace lq
