// Rows of logits, for `accept`, `argmax` and `tree_expand`: their largest, and the sum of their exponentials.
// A row is cut into parts, one a block, by the vocabulary alone; every sum has one order. So a row's bits do not depend on the
// rows beside it.
#pragma once

#include <limits>

#include "common.cuh"

namespace sirius::cuda {

constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr float kFault = std::numeric_limits<float>::infinity();  // what takes the place of a logit that is none

// ----------------------------------------------------------------------------------------------------------------- keys

// (value, index) as one number: the larger value is larger, of equals (zeros of both signs are) the lower index. No key is 0.
__device__ __forceinline__ uint64_t key_of(float value, int index) {
  const uint32_t bits = bits_of(value + 0.0f);
  return uint64_t(bits ^ (bits >> 31 ? ~0u : 1u << 31)) << 32 | ~uint32_t(index);
}

__device__ __forceinline__ float value_of(uint64_t key) {
  const uint32_t bits = uint32_t(key >> 32);
  return float_of(bits ^ (bits >> 31 ? 1u << 31 : ~0u));
}

__device__ __forceinline__ int index_of(uint64_t key) { return int(~uint32_t(key)); }

// A key, or 0 for what is not possible: no number, or minus infinity.
__device__ __forceinline__ uint64_t possible_key(float value, int index) { return value > kLowest ? key_of(value, index) : 0; }

__device__ __forceinline__ uint64_t warp_max_key(uint64_t key) {
  const uint32_t high = __reduce_max_sync(kAllLanes, uint32_t(key >> 32));
  return uint64_t(high) << 32 | __reduce_max_sync(kAllLanes, uint32_t(key >> 32) == high ? uint32_t(key) : 0u);
}

template <int N>
__device__ __forceinline__ uint64_t largest_below(const uint64_t (&keys)[N], uint64_t bound) {
  uint64_t largest = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) largest = keys[i] < bound && keys[i] > largest ? keys[i] : largest;
  return largest;
}

// Of the keys that a warp's lanes hold, all different but for zeros, lane i gets the i-th largest, if i < width <= kWarp.
template <int N>
__device__ uint64_t warp_largest(const uint64_t (&keys)[N], int width) {
  uint64_t found = 0, mine = largest_below(keys, ~uint64_t(0));
  for (int i = 0; i < width; ++i) {
    const uint64_t best = warp_max_key(mine);
    if (best == 0) break;  // in every lane
    if (int(threadIdx.x) % kWarp == i) found = best;
    if (mine == best) mine = largest_below(keys, best);
  }
  return found;
}

// The same of `count` keys in memory.
__device__ inline uint64_t warp_largest(const uint64_t* keys, int count, int width) {
  constexpr int kHeld = 8;
  uint64_t found = 0;
  for (int begin = int(threadIdx.x) % kWarp; begin - int(threadIdx.x) % kWarp < count; begin += kHeld * kWarp) {
    uint64_t part[kHeld + 1];
    part[kHeld] = found;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) part[i] = begin + i * kWarp < count ? keys[begin + i * kWarp] : 0;
    found = warp_largest(part, width);
  }
  return found;
}

// --------------------------------------------------------------------------------------------------------------- a part

// A thread's four vectors are loaded at once: 64 bytes in flight.
constexpr int kLogitVecs = 4;
constexpr int kLogitsPerThread = kLogitVecs * Vec<float>::size;
constexpr int kLogitWarps = 8;
constexpr int kLogitsPerPart = kLogitWarps * kWarp * kLogitsPerThread;

inline int logit_parts(int vocab) { return ceil_div(vocab, kLogitsPerPart); }
inline int logit_threads(int vocab) {
  const int warps = ceil_div(vocab, kWarp * kLogitsPerThread);
  return kWarp * (warps < kLogitWarps ? warps : kLogitWarps);
}
inline bool aligned_logits(const float* logits, int vocab) { return vocab % Vec<float>::size == 0 && aligned16(logits); }

// Where in its row the i-th logit of this thread stands; rising with i.
__device__ __forceinline__ int logit_index(int i) {
  constexpr int size = Vec<float>::size;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  return int(blockIdx.x) * kLogitsPerPart + (warp * kLogitVecs + i / size) * kWarp * size + lane * size + i % size;
}

// A fault is larger than every logit, so that a row that has one shows it as its largest: NaN becomes one, plus infinity is one,
// and minus infinity becomes one in `raw` logits, which nothing has processed.
__device__ __forceinline__ float logit_or_fault(float x, bool raw) { return (raw ? fabsf(x) : x) < kFault ? x : kFault; }

// This thread's share of row blockIdx.y; minus infinity after its end.
template <bool Aligned>
__device__ __forceinline__ void load_logits(const float* logits, int vocab, bool raw, float (&x)[kLogitsPerThread]) {
  constexpr int size = Vec<float>::size;
  const float* row = logits + size_t(blockIdx.y) * vocab;
#pragma unroll
  for (int i = 0; i < kLogitsPerThread; i += size) {
    // Behind the end the row's last ones, so that no branch stands between the loads.
    Vec<float> part{};
    if constexpr (Aligned) part = load(row + min(logit_index(i), vocab - size));
#pragma unroll
    for (int j = 0; j < size; ++j) {
      if constexpr (!Aligned) part.put(j, row[min(logit_index(i + j), vocab - 1)]);
      x[i + j] = logit_index(i + j) < vocab ? logit_or_fault(part[j], raw) : kLowest;
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- statistics

struct LogitStats {
  float max;
  int32_t argmax;  // the first of equals; of a whole row, -1 where there is none: a fault, or nothing but minus infinity
  float sum;       // of exp((logit - max) / tau), if `Sums`; 0 where every logit is minus infinity, NaN with a fault
};

__device__ __forceinline__ LogitStats no_logits() { return {kLowest, INT32_MAX, 0.0f}; }

template <bool Sums>
__device__ __forceinline__ LogitStats thread_stats(const float (&x)[kLogitsPerThread], float inverse_temperature) {
  LogitStats out{kLowest, logit_index(0), 0.0f};
#pragma unroll
  for (int i = 0; i < kLogitsPerThread; ++i) {
    if (!(x[i] > out.max)) continue;
    out.max = x[i];
    out.argmax = logit_index(i);
  }
  if (Sums && out.max > kLowest) {
#pragma unroll
    for (int i = 0; i < kLogitsPerThread; ++i) out.sum += expf((x[i] - out.max) * inverse_temperature);
  }
  return out;
}

// Of what the lanes know; every lane gets the result.
template <bool Sums>
__device__ __forceinline__ LogitStats warp_stats(LogitStats mine, float inverse_temperature) {
  const uint64_t key = warp_max_key(key_of(mine.max, mine.argmax));
  LogitStats out{value_of(key), index_of(key), 0.0f};
  if (Sums) out.sum = warp_sum(mine.max > kLowest ? mine.sum * expf((mine.max - out.max) * inverse_temperature) : 0.0f);
  return out;
}

// Of this block's part; `out` is written by thread 0. `memory`: [kLogitWarps], shared.
template <bool Sums>
__device__ __forceinline__ void part_stats(const float (&x)[kLogitsPerThread], float inverse_temperature, LogitStats* memory,
                                           LogitStats* out) {
  const int warps = int(blockDim.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const LogitStats mine = warp_stats<Sums>(thread_stats<Sums>(x, inverse_temperature), inverse_temperature);
  if (lane == 0) memory[threadIdx.x / kWarp] = mine;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  const LogitStats total = warp_stats<Sums>(lane < warps ? memory[lane] : no_logits(), inverse_temperature);
  if (lane == 0) *out = total;
}

// Of a row, by one warp from its parts.
template <bool Sums>
__device__ LogitStats row_stats(const LogitStats* parts, int count, float inverse_temperature) {
  const int lane = int(threadIdx.x) % kWarp;
  LogitStats mine = lane < count ? parts[lane] : no_logits();
  for (int i = lane + kWarp; i < count; i += kWarp) {
    const LogitStats part = parts[i];
    const bool larger = part.max > mine.max;  // parts stand in order: of equals the first
    const LogitStats low = larger ? mine : part;
    if (larger) mine = part;
    if (Sums && low.max > kLowest) mine.sum += low.sum * expf((low.max - mine.max) * inverse_temperature);
  }
  LogitStats out = warp_stats<Sums>(mine, inverse_temperature);
  if (out.max == kLowest || out.max == kFault) out.argmax = -1;
  return out;
}

}  // namespace sirius::cuda
