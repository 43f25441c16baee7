// One chunk of split-KV attention: some queries against up to kSlots cache slots, computed by one block.
//
// Nothing here depends on which queries stand beside one another: a query's score is summed over the same tree of lanes, and its
// values over the same tree of slots, in every position.
#pragma once

#include "common.cuh"

namespace sirius::cuda {

constexpr int kSlots = 128;   // of a chunk
constexpr int kColumns = 16;  // queries of a block, at most
constexpr int kTogether = 4;  // queries that a thread computes at once: 4 * 8 sums or query elements in registers
constexpr int kAttentionWarps = 8;
constexpr int kAttentionThreads = kAttentionWarps * kWarp;

// How a warp reads rows of K and V: `Lanes` lanes share a row, each reads `Parts` times 16 bytes of it.
template <class T_, bool Aligned_, int Lanes_, int Parts_>
struct RowReader {
  using T = T_;
  static constexpr bool aligned = Aligned_;
  static constexpr int lanes = Lanes_, parts = Parts_, part = Vec<T>::size;
  static constexpr int width = lanes * part;                            // elements that the lanes read at once
  static constexpr int slots_a_step = kAttentionThreads / lanes;        // by the block
  static constexpr int steps = kSlots / slots_a_step;                   // a chunk takes
  static constexpr int batch = steps * parts > 16 ? steps / 2 : steps;  // steps whose keys are in flight together: 64 registers
  static constexpr int resident = aligned && lanes <= 16 ? 2 : 1;  // blocks of a multiprocessor: 128 registers a thread, or 255
  static_assert(lanes >= 8 && batch % 2 == 0, "keys are reduced two steps at a time");

  // The place in a chunk that this thread reads in a step. Steps go over all warps, so that a short chunk takes few of them.
  static __device__ __forceinline__ int place(int step) { return step * slots_a_step + int(threadIdx.x) / lanes; }
  // The first of the elements that this thread reads.
  static __device__ __forceinline__ int begin(int part_index) { return part_index * width + int(threadIdx.x) % lanes * part; }
};

// A query vector and where its results go: column i is row `row + i / heads`, head `head + i % heads`.
struct Columns {
  int row, head, heads, count;

  __device__ __forceinline__ int row_of(int column) const { return row + column / heads; }
  __device__ __forceinline__ int head_of(int column) const { return head + column % heads; }
};

// Chunk results: index(...) is where one query's are.
struct Partials {
  float *values, *max, *sum;  // [chunks, num_rows, heads], values times `stride`
  int stride, num_rows, heads;

  __device__ __forceinline__ size_t index(int chunk, int row, int head) const {
    return (size_t(chunk) * num_rows + row) * heads + head;
  }
};

template <class Reader>
struct AttentionMemory {
  float weights[kColumns / kTogether][kSlots][kTogether];  // scores, then their exponentials
  float sums[kAttentionWarps][kTogether][Reader::width];
  int32_t slots[kSlots];
  int32_t last;
};

// The first n slots of memory.slots; or from `first` on, if first is not negative.
struct SlotList {
  int first, n;
};

__device__ __forceinline__ void prefetch([[maybe_unused]] const void* at) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#endif
}

template <int N>
struct Floats {
  float v[N];
};

// Becomes what the lane brought whose number differs in the bit `flip`.
template <int N>
__device__ __forceinline__ void exchange(Floats<N>& mine, int flip) {
#if defined(__CUDACC__)
#pragma unroll
  for (int i = 0; i < N; ++i) mine.v[i] = __shfl_xor_sync(kAllLanes, mine.v[i], flip);
#else
  mine = __shfl_xor_sync(kAllLanes, mine, flip);  // at once: every exchange takes simt a turn of all lanes
#endif
}

// Sums each of v's first `Count` entries over the lanes that differ in the bits Flip, Flip / 2, ..., Last. Each halving leaves a
// lane half of the entries, until it has one: those with the upper half of the indices go to the lanes whose bit is set.
template <int Flip, int Last, int Count, int N, int Capacity>
__device__ __forceinline__ void fold(float (&v)[Capacity][N]) {
  if constexpr (Flip >= Last) {
    constexpr int kLeft = Count > 1 ? Count / 2 : 1, kOther = Count / 2;
    const bool upper = Count > 1 && threadIdx.x & Flip;
    Floats<kLeft * N> given;
#pragma unroll
    for (int c = 0; c < kLeft; ++c)
#pragma unroll
      for (int i = 0; i < N; ++i) {
        given.v[c * N + i] = upper ? v[c][i] : v[kOther + c][i];
        v[c][i] = upper ? v[kOther + c][i] : v[c][i];
      }
    exchange(given, Flip);
#pragma unroll
    for (int c = 0; c < kLeft; ++c)
#pragma unroll
      for (int i = 0; i < N; ++i) v[c][i] += given.v[c * N + i];
    fold<Flip / 2, Last, kLeft>(v);
  }
}

// Where in v the first entry stood that `fold` left this lane.
template <int Flip, int Last, int Count>
__device__ __forceinline__ int folded() {
  if constexpr (Flip < Last || Count == 1)
    return 0;
  else
    return (threadIdx.x & Flip ? Count / 2 : 0) + folded<Flip / 2, Last, Count / 2>();
}

// Else the compiler converts a vector once for all queries, and holds floats in twice the registers.
template <class T>
__device__ __forceinline__ void keep_packed([[maybe_unused]] Vec<T>& v) {
#if defined(__CUDA_ARCH__)
#pragma unroll
  for (int i = 0; i < 4; ++i) asm("" : "+r"(v.words[i]));
#endif
}

template <class Reader, class Memory>
__device__ __forceinline__ const typename Reader::T* row_at(const typename Reader::T* cache, int place, SlotList slots,
                                                            int head_dim, const Memory& memory) {
  const int slot = place >= slots.n ? 0 : slots.first >= 0 ? slots.first + place : memory.slots[place];
  return cache + size_t(slot) * head_dim;
}

// memory.weights: the dot products.
template <class Reader, class Memory>
__device__ __forceinline__ void score(const AttentionParams& p, const Columns& columns, const typename Reader::T* keys,
                                      SlotList slots, Memory& memory) {
  using T = typename Reader::T;
  const int head_dim = p.cache.head_dim;
#pragma unroll
  for (int step = 0; step < Reader::steps; step += Reader::batch) {
    Vec<T> k[Reader::batch][Reader::parts];
#pragma unroll
    for (int t = 0; t < Reader::batch; ++t) {
      const int place = Reader::place(step + t);
      const T* const row = row_at<Reader>(keys, place, slots, head_dim, memory);
#pragma unroll
      for (int r = 0; r < Reader::parts; ++r)
        k[t][r] = load_part<Reader::aligned>(row, Reader::begin(r), place < slots.n ? head_dim : 0);
    }
    for (int first = 0; first < columns.count; first += kTogether) {
      float q[kTogether][Reader::parts][Reader::part];
#pragma unroll
      for (int c = 0; c < kTogether; ++c) {
        const int column = first + c < columns.count ? first + c : first;
        const T* const vector =
            static_cast<const T*>(p.q) + size_t(columns.row_of(column)) * p.q_stride + size_t(columns.head_of(column)) * head_dim;
#pragma unroll
        for (int r = 0; r < Reader::parts; ++r) {
          const Vec<T> part = load_part<Reader::aligned>(vector, Reader::begin(r), head_dim);
#pragma unroll
          for (int i = 0; i < Reader::part; ++i) q[c][r][i] = part[i];
        }
      }
#pragma unroll
      for (int t = 0; t < Reader::batch; t += 2) {
        if ((step + t) * Reader::slots_a_step >= slots.n) continue;
#pragma unroll
        for (int r = 0; r < Reader::parts; ++r) {
          keep_packed(k[t][r]);
          keep_packed(k[t + 1][r]);
        }
        float dots[2 * kTogether][1] = {};
#pragma unroll
        for (int u = 0; u < 2; ++u)
#pragma unroll
          for (int r = 0; r < Reader::parts; ++r) {
#pragma unroll
            for (int i = 0; i < Reader::part; ++i)
#pragma unroll
              for (int c = 0; c < kTogether; ++c)
                dots[u * kTogether + c][0] = fmaf(k[t + u][r][i], q[c][r][i], dots[u * kTogether + c][0]);
          }
        fold<Reader::lanes / 2, 1, 2 * kTogether>(dots);
        const int at = folded<Reader::lanes / 2, 1, 2 * kTogether>();
        if (threadIdx.x % (Reader::lanes / (2 * kTogether)) == 0)
          memory.weights[first / kTogether][Reader::place(step + t + at / kTogether)][at % kTogether] = dots[0][0];
      }
    }
  }
}

// memory.weights: from scores to exponentials, 0 after the last slot. One warp a column.
template <class Memory>
__device__ __forceinline__ void softmax(const AttentionParams& p, const Columns& columns, int chunk, int n,
                                        const Partials& partials, Memory& memory) {
  constexpr int kEach = kSlots / kWarp;
  const int lane = int(threadIdx.x) % kWarp;
  for (int column = int(threadIdx.x) / kWarp; column < columns.count; column += kAttentionWarps) {
    float (&weights)[kSlots][kTogether] = memory.weights[column / kTogether];
    float x[kEach], max = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      x[i] = lane + i * kWarp < n ? weights[lane + i * kWarp][column % kTogether] * p.scale : -INFINITY;
      if (p.softcap != 0.0f && lane + i * kWarp < n) x[i] = capped(x[i], p.softcap);
      max = x[i] > max ? x[i] : max;
    }
    max = warp_max(max);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      x[i] = expf(x[i] - max);
      sum += x[i];
      weights[lane + i * kWarp][column % kTogether] = x[i];
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      const size_t at = partials.index(chunk, columns.row_of(column), columns.head_of(column));
      partials.max[at] = max;
      partials.sum[at] = sum;
    }
  }
}

template <class Reader, class Memory>
__device__ __forceinline__ void load_values(const typename Reader::T* values, int head_dim, int part_index, SlotList slots,
                                            const Memory& memory, Vec<typename Reader::T> (&v)[Reader::steps]) {
#pragma unroll
  for (int t = 0; t < Reader::steps; ++t) {
    const int place = Reader::place(t);
    v[t] = load_part<Reader::aligned>(row_at<Reader>(values, place, slots, head_dim, memory), Reader::begin(part_index),
                                      place < slots.n ? head_dim : 0);
  }
}

// partials.values: the weighted sums of one part of every value.
template <class Reader, class Memory>
__device__ __forceinline__ void add_values(const Columns& columns, int chunk, int n, int head_dim, int part_index,
                                           Vec<typename Reader::T> (&v)[Reader::steps], const Partials& partials,
                                           Memory& memory) {
  constexpr int kTop = kWarp / 2, kLevels = Reader::lanes == 8 ? 2 : Reader::lanes == 16 ? 1 : 0, kKept = kTogether >> kLevels;
  const int warp = int(threadIdx.x) / kWarp, kept = folded<kTop, Reader::lanes, kTogether>();
  for (int first = 0; first < columns.count; first += kTogether) {
    float sums[kTogether][Reader::part] = {};
#pragma unroll
    for (int t = 0; t < Reader::steps; ++t) {
      if (t * Reader::slots_a_step >= n) continue;
      keep_packed(v[t]);
      const Vec<float> weights = load(memory.weights[first / kTogether][Reader::place(t)]);
#pragma unroll
      for (int i = 0; i < Reader::part; ++i)
#pragma unroll
        for (int c = 0; c < kTogether; ++c) sums[c][i] = fmaf(weights[c], v[t][i], sums[c][i]);
    }
    fold<kTop, Reader::lanes, kTogether>(sums);
#pragma unroll
    for (int c = 0; c < kKept; ++c)
#pragma unroll
      for (int i = 0; i < Reader::part; ++i) memory.sums[warp][kept + c][Reader::begin(0) + i] = sums[c][i];
    __syncthreads();
    for (int at = int(threadIdx.x); at < kTogether * Reader::width; at += kAttentionThreads) {
      const int c = at / Reader::width, d = at % Reader::width, element = part_index * Reader::width + d;
      if (first + c >= columns.count || element >= head_dim) continue;
      float total = memory.sums[0][c][d];
      for (int w = 1; w < kAttentionWarps; ++w) total += memory.sums[w][c][d];
      const size_t to = partials.index(chunk, columns.row_of(first + c), columns.head_of(first + c));
      partials.values[to * partials.stride + element] = total;
    }
    __syncthreads();
  }
}

// The chunk's results, for every column. Reads each key and value once, more than once only from registers.
template <class Reader, class Memory>
__device__ __forceinline__ void attend(const AttentionParams& p, const Columns& columns, int kv_head, int chunk, SlotList slots,
                                       const Partials& partials, Memory& memory) {
  using T = typename Reader::T;
  const int head_dim = p.cache.head_dim;
  const size_t head = size_t(kv_head) * p.cache.capacity * head_dim;
  const T *const keys = static_cast<const T*>(p.k_cache) + head, *const values = static_cast<const T*>(p.v_cache) + head;
#pragma unroll
  for (int t = 0; t < Reader::steps; ++t)
#pragma unroll
    for (int r = 0; r < Reader::parts; ++r)
      if (Reader::place(t) < slots.n && Reader::begin(r) < head_dim)
        prefetch(row_at<Reader>(values, Reader::place(t), slots, head_dim, memory) + Reader::begin(r));
  score<Reader>(p, columns, keys, slots, memory);
  Vec<T> v[Reader::steps];
  load_values<Reader>(values, head_dim, 0, slots, memory, v);
  __syncthreads();
  softmax(p, columns, chunk, slots.n, partials, memory);
  __syncthreads();
  add_values<Reader>(columns, chunk, slots.n, head_dim, 0, v, partials, memory);
  if constexpr (Reader::parts > 1) {
    load_values<Reader>(values, head_dim, 1, slots, memory, v);
    add_values<Reader>(columns, chunk, slots.n, head_dim, 1, v, partials, memory);
  }
}

}  // namespace sirius::cuda
