#include "common.cuh"

namespace sirius::cuda {
namespace {

constexpr int kSelectThreads = 1024;
constexpr int kBins = 1 << 11;
constexpr int kGroups = kBins / kWarp;
// The first histogram's bins: 128 for each power of two, so that few threads meet in one. They reach from the largest score down
// to what is 2^16 times smaller; what is smaller still is in the last bin.
constexpr int kFirstShift = 23 - 7;
// So few scores in a bin are compared with one another.
constexpr int kFew = 128;
// So many rows are summed by the block that chooses: it would take longer to wait for others.
constexpr int kRowsAlone = 4;

struct SelectShared {
  uint64_t warps[kSelectThreads / kWarp];
  int32_t bins[kBins];
  int32_t groups[kGroups];
  uint32_t largest[kSelectThreads / kWarp];
  int32_t few[kFew], listed, found, wanted;
  int32_t last;
};

// score_i = sum of |values[m, i]| over `rows` rows.
struct ScoreSource {
  const float* values;  // [rows, candidates]
  int rows, candidates;
};

// The bits of the scores that a thread looks at, which order as the scores do; a warp's candidates stand side by side.
// `PerThread` of them are in registers; or with 0 any number, read again each time.
template <int PerThread>
struct Scores {
  ScoreSource source;
  int first, count;
  int32_t held[PerThread ? PerThread : 1];

  __device__ __forceinline__ explicit Scores(ScoreSource from)
      : source(from), count(PerThread ? PerThread : ceil_div(from.candidates, int(blockDim.x))) {
    first = int(threadIdx.x) / kWarp * kWarp * count + int(threadIdx.x) % kWarp;
    if constexpr (PerThread > 0) read(0, held);
  }

  __device__ __forceinline__ int candidate(int i) const { return first + i * kWarp; }

  // N from the begin-th on, -1 after the last neuron. All loads of a row are in flight at once.
  template <int N>
  __device__ __forceinline__ void read(int begin, int32_t (&bits)[N]) const {
    const int end = source.candidates - candidate(begin);
    const float* values = source.values + candidate(begin);
    float sums[N] = {};
#pragma unroll 1
    for (int row = 0; row < source.rows; ++row, values += source.candidates) {
#pragma unroll
      for (int i = 0; i < N; ++i) sums[i] += i * kWarp < end ? fabsf(values[i * kWarp]) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) bits[i] = i * kWarp < end ? int32_t(bits_of(sums[i])) : -1;
  }

  // body(candidate, bits) in rising order, as often in every lane of a warp.
  template <class Body>
  __device__ __forceinline__ void each(Body body) const {
    if constexpr (PerThread > 0) {
#pragma unroll
      for (int i = 0; i < PerThread; ++i) body(candidate(i), held[i]);
    } else {
      constexpr int step = 8;
      for (int begin = 0; begin < count; begin += step) {
        int32_t bits[step];
        read(begin, bits);
#pragma unroll
        for (int i = 0; i < step && begin + i < count; ++i) body(candidate(begin + i), bits[i]);
      }
    }
  }
};

// Over the lanes up to one's own.
template <class T>
__device__ __forceinline__ T warp_scan(T value) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const T before = __shfl_up_sync(kAllLanes, value, step);
    if (int(threadIdx.x) % kWarp >= step) value += before;
  }
  return value;
}

// Of counts, one a lane: the first lane up to which they are `wanted` or more. The counts before it are taken off `wanted`.
__device__ __forceinline__ int lane_that_reaches(int count, int* wanted) {
  const int up_to = warp_scan(count);
  const int lane = __ffs(int(__ballot_sync(kAllLanes, up_to >= *wanted))) - 1;
  *wanted -= __shfl_sync(kAllLanes, up_to - count, lane);
  return lane;
}

// The bin of the `wanted`-th largest entry of a histogram, in every thread; `wanted` then counts from that bin's entries.
__device__ __forceinline__ int bin_of(SelectShared& shared, int* wanted) {
  const int lane = int(threadIdx.x) % kWarp;
  for (int group = int(threadIdx.x) / kWarp; group < kGroups; group += int(blockDim.x) / kWarp) {
    const unsigned total = __reduce_add_sync(kAllLanes, unsigned(shared.bins[group * kWarp + lane]));
    if (lane == 0) shared.groups[group] = int(total);
  }
  __syncthreads();
  static_assert(kGroups == 2 * kWarp, "two groups a lane");
  const int upper = kGroups - 1 - 2 * lane, of_upper = shared.groups[upper];
  const int pair = lane_that_reaches(of_upper + shared.groups[upper - 1], wanted);
  int group = kGroups - 1 - 2 * pair;
  if (shared.groups[group] < *wanted) *wanted -= shared.groups[group--];
  return group * kWarp + kWarp - 1 - lane_that_reaches(shared.bins[group * kWarp + kWarp - 1 - lane], wanted);
}

template <int PerThread>
__device__ __forceinline__ int32_t largest_of(const Scores<PerThread>& scores, SelectShared& shared) {
  const int warps = int(blockDim.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  int32_t largest = 0;
  scores.each([&](int, int32_t bits) { largest = bits > largest ? bits : largest; });
  const unsigned of_warp = __reduce_max_sync(kAllLanes, unsigned(largest));
  if (lane == 0) shared.largest[threadIdx.x / kWarp] = of_warp;
  __syncthreads();
  return int32_t(__reduce_max_sync(kAllLanes, lane < warps ? shared.largest[lane] : 0));
}

// The bits of the `wanted`-th largest score: they order as the numbers do. `wanted` then counts among the equals of it. A
// histogram of a range of bits says in which of its bins that score is, which is the next range, until few scores are in it.
template <int PerThread>
__device__ __forceinline__ int32_t nth_largest(const Scores<PerThread>& scores, SelectShared& shared, int* wanted) {
  int32_t first = 0, last = largest_of(scores, shared);  // of the range
  int32_t zero = last - ((kBins << kFirstShift) - 1);    // where bin 0 would begin if nothing smaller were in it
  int shift = kFirstShift;
  if (zero < 0) zero = 0;
  for (;;) {
    for (int i = int(threadIdx.x); i < kBins; i += int(blockDim.x)) shared.bins[i] = 0;
    __syncthreads();
    scores.each([&](int, int32_t bits) {
      if (first <= bits && bits <= last) atomicAdd(&shared.bins[bits < zero ? 0 : (bits - zero) >> shift], 1);
    });
    __syncthreads();
    const int bin = bin_of(shared, wanted), count = shared.bins[bin];
    const int32_t from = zero + (bin << shift), size = 1 << shift;
    if (last - from >= size) last = from + size - 1;
    if (bin > 0) first = from;
    __syncthreads();
    if (first == last) return first;
    if (count <= kFew) break;
    zero = first;
    shift = 0;
    while ((last - first) >> shift >= kBins) ++shift;
  }
  if (threadIdx.x == 0) shared.listed = 0;
  __syncthreads();
  scores.each([&](int, int32_t bits) {
    if (first <= bits && bits <= last) shared.few[atomicAdd(&shared.listed, 1)] = bits;
  });
  __syncthreads();
  const int listed = shared.listed, own = int(threadIdx.x);
  for (int i = own; i < listed; i += int(blockDim.x)) {
    int larger = 0, equal = 0;
    for (int j = 0; j < listed; ++j) {
      larger += shared.few[j] > shared.few[i];
      equal += shared.few[j] == shared.few[i];
    }
    if (larger < *wanted && *wanted <= larger + equal) {
      shared.found = shared.few[i];
      shared.wanted = *wanted - larger;
    }
  }
  __syncthreads();
  *wanted = shared.wanted;
  return shared.found;
}

// A value to its place in an array of elements of `dtype`, rounded.
__device__ __forceinline__ void put(Dtype dtype, void* array, size_t place, float value) {
  switch (dtype) {
    case Dtype::f32: static_cast<float*>(array)[place] = value; break;
    case Dtype::f16: static_cast<f16_t*>(array)[place] = from_float<f16_t>(value); break;
    case Dtype::bf16: static_cast<bf16_t*>(array)[place] = from_float<bf16_t>(value); break;
  }
}

// grid: [1, sets]; or where others make the scores before it chooses, [candidates / threads, 1]. Values of rows that are alive
// are read once, 4 bytes each, with PerThread 0 five times or more. all_scores: [candidates], or null for a block alone. Of
// several sets each has values and `kept` neurons of its own, side by side; then count is null.
template <int PerThread>
__global__ void __launch_bounds__(kSelectThreads, 1) select_kernel(SelectParams p, float* all_scores, int32_t* counter) {
  SelectShared& shared = shared_memory<SelectShared>();
  wait_for_kernel_before();
  p.values += size_t(blockIdx.y) * p.num_rows * p.intermediate;
  p.neurons += size_t(blockIdx.y) * p.kept;
  const int warp = int(threadIdx.x) / kWarp, warps = int(blockDim.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int rows = p.alive ? *p.alive : p.num_rows;
  const auto neuron = [&](int candidate) { return p.among ? p.among[candidate] : candidate; };
  ScoreSource source{p.values, rows, p.candidates};
  if (all_scores) {
    const int candidate = int(blockIdx.x * blockDim.x + threadIdx.x);
    if (candidate < p.candidates) {
      const int place = neuron(candidate);
      float score = 0.0f;
#pragma unroll 8
      for (int row = 0; row < rows; ++row) score += fabsf(p.values[size_t(row) * p.intermediate + place]);
      // A product of what is not finite may be a NaN with a sign, which counts as no score at all.
      all_scores[candidate] = p.weights ? fabsf(score * p.weights[place]) : score;
    }
    if (!last_block(counter, int(gridDim.x), &shared.last)) return;
    source = {all_scores, 1, p.candidates};
  }
  const Scores<PerThread> scores(source);

  // All whose bits are larger than `least` are chosen, and the first `equals` of those that have them.
  int equals = p.threshold ? 0 : p.kept;
  int32_t least;
  if (p.threshold) {
    const float threshold = float(rows) * *p.threshold;
    least = threshold > 0.0f ? int32_t(bits_of(threshold)) - 1 : -1;
  } else {
    least = nth_largest(scores, shared, &equals);
  }

  uint32_t above = 0, equal = 0;
  scores.each([&](int, int32_t bits) {
    above += bits > least;
    equal += bits == least;
  });
  above = __reduce_add_sync(kAllLanes, above);
  equal = __reduce_add_sync(kAllLanes, equal);
  if (lane == 0) shared.warps[warp] = uint64_t(above) << 32 | equal;
  __syncthreads();
  const uint64_t mine = lane < warps ? shared.warps[lane] : 0, up_to = warp_scan(mine);
  const uint64_t before = __shfl_sync(kAllLanes, up_to - mine, warp), all = __shfl_sync(kAllLanes, up_to, kWarp - 1);
  if (threadIdx.x == 0 && p.count) *p.count = int(all >> 32) + min(int(uint32_t(all)), equals);

  int above_before = int(before >> 32), equal_before = int(uint32_t(before));
  scores.each([&](int candidate, int32_t bits) {
    const unsigned lower = (1u << lane) - 1, all_above = __ballot_sync(kAllLanes, bits > least),
                   all_equal = __ballot_sync(kAllLanes, bits == least);
    const int equal_here = equal_before + __popc(all_equal & lower);
    if (bits > least || (bits == least && equal_here < equals))
      p.neurons[above_before + __popc(all_above & lower) + min(equal_here, equals)] = candidate;
    above_before += __popc(all_above);
    equal_before += __popc(all_equal);
  });
  // From candidates to neurons: here, since the loops above have no register to spare.
  if (!p.among && !p.taken) return;
  __syncthreads();
  const int count = *p.count;
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
    const int chosen = neuron(p.neurons[i]);
    p.neurons[i] = chosen;
    if (!p.taken) continue;
    // Of all rows, alive or not: the pass goes on with all of them.
#pragma unroll 8
    for (int row = 0; row < p.num_rows; ++row)
      put(p.dtype, p.taken, size_t(row) * p.kept + i, p.values[size_t(row) * p.intermediate + chosen]);
  }
}

template <int PerThread>
void launch_select(const SelectParams& p, int sets, float* scores, int32_t* counter, StreamHandle stream) {
  const int threads = PerThread ? kWarp * ceil_div(p.candidates, kWarp * PerThread) : kSelectThreads;
  launch<select_kernel<PerThread>>("select", dim3(scores ? ceil_div(p.candidates, threads) : 1, sets), threads,
                                   sizeof(SelectShared), stream, p, scores, counter);
}

// The kernel for so many candidates.
auto select_launcher(int candidates) {
  return candidates <= 2 * kSelectThreads    ? launch_select<2>
         : candidates <= 8 * kSelectThreads  ? launch_select<8>
         : candidates <= 16 * kSelectThreads ? launch_select<16>
         : candidates <= 28 * kSelectThreads ? launch_select<28>
                                             : launch_select<0>;
}

}  // namespace

size_t select_workspace(int candidates) { return candidates; }

void select(const SelectParams& p, Workspace workspace, StreamHandle stream) {
  // What is gathered is gathered by many blocks: one would wait for its list, and then for the values.
  const bool alone = p.num_rows <= kRowsAlone && !p.among && !p.weights;
  select_launcher(p.candidates)(p, 1, alone ? nullptr : workspace.floats, workspace.counters, stream);
}

void select_each(const SelectParams& p, int sets, Workspace, StreamHandle stream) {
  select_launcher(p.candidates)(p, sets, nullptr, nullptr, stream);
}

}  // namespace sirius::cuda
