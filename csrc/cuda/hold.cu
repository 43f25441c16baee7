// A sparse model's neurons from where there is room for all of them to where there is room for its set, and from both to where
// the full model reads them (weight_stream.h).
#include "common.cuh"

namespace sirius::cuda {
namespace {

constexpr int kPlaceThreads = 1024;  // at most
constexpr int kCopyThreads = 256, kCopyWarps = kCopyThreads / kWarp;
// So many that the link has no pause: 16 have 256 KB on their way, and of `hold` those of all layers run at a time.
constexpr int kFillBlocks = 16, kHoldBlocks = 2;

struct PlaceShared {
  int32_t warps[kPlaceThreads / kWarp];
  // After it, of every row: whether its neuron is listed.
  __device__ __forceinline__ uint8_t* listed() { return reinterpret_cast<uint8_t*>(this + 1); }
  static size_t bytes(int rows) { return sizeof(PlaceShared) + rows; }
};

// body(i, rank) for all i of [begin, end) for which is(i), in rising order of ranks from 0 on; returns how many there are.
// `is` is asked twice for each, before any body and then before its own.
template <class Is, class Body>
__device__ __forceinline__ int ranked(int begin, int end, PlaceShared& shared, Is&& is, Body&& body) {
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp, warps = int(blockDim.x) / kWarp;
  const int length = ceil_div(ceil_div(end - begin, warps), kWarp) * kWarp, first = begin + warp * length,
            last = first + length < end ? first + length : end;
  int count = 0;
  for (int i = first; i < last; i += kWarp) count += __popc(__ballot_sync(kAllLanes, i + lane < last && is(i + lane)));
  if (lane == 0) shared.warps[warp] = count;
  __syncthreads();
  int rank = 0, all = 0;
  for (int w = 0; w < warps; ++w) {
    if (w < warp) rank += shared.warps[w];
    all += shared.warps[w];
  }
  for (int i = first; i < last; i += kWarp) {
    const bool own = i + lane < last && is(i + lane);
    const unsigned each = __ballot_sync(kAllLanes, own);
    if (own) body(i + lane, rank + __popc(each & ((1u << lane) - 1)));
    rank += __popc(each);
  }
  __syncthreads();  // all have read the counts, and what the bodies wrote is there
  return all;
}

// grid: [layers]. Gives each listed neuron that has no row one whose neuron is not listed.
__global__ void __launch_bounds__(kPlaceThreads) place_kernel(const HoldParams p) {
  PlaceShared& shared = shared_memory<PlaceShared>();
  uint8_t* const listed = shared.listed();
  wait_for_kernel_before();
  const int layer = int(blockIdx.x), first = p.held[layer].first;
  const int32_t* const neurons = p.neurons + size_t(layer) * p.kept;
  int32_t* const row_of = p.row_of + size_t(layer) * p.intermediate;
  int32_t* const neuron_of = p.neuron_of + size_t(layer) * p.rows;
  int32_t* const taken = p.taken + size_t(layer) * p.rows;
  for (int row = int(threadIdx.x); row < p.rows; row += int(blockDim.x)) listed[row] = 0;
  __syncthreads();
  for (int i = int(threadIdx.x); i < p.kept; i += int(blockDim.x))
    if (const int row = row_of[neurons[i]]; row >= 0) listed[row] = 1;
  __syncthreads();
  ranked(first, p.rows, shared, [&](int row) { return !listed[row]; }, [&](int row, int rank) { taken[rank] = row; });
  const int count = ranked(
      0, p.kept, shared, [&](int i) { return row_of[neurons[i]] < 0; },
      [&](int i, int rank) {
        const int row = taken[rank];
        if (neuron_of[row] >= 0) row_of[neuron_of[row]] = -1;
        neuron_of[row] = neurons[i];
        row_of[neurons[i]] = row;
      });
  if (threadIdx.x == 0) p.count[layer] = count;
  for (int i = int(threadIdx.x); i < p.kept; i += int(blockDim.x)) {
    const int neuron = neurons[i], row = row_of[neuron];
    p.listed_rows[size_t(layer) * p.kept + i] = row;
    if (p.weights) p.row_weights[size_t(layer) * p.rows + row] = p.weights[size_t(layer) * p.intermediate + neuron];
  }
}

constexpr int kLaneBytes = 16;
constexpr int kInFlight = 4;  // loads of a lane

// Bytes [begin, end) of a neuron, multiples of 16, by one warp.
__device__ __forceinline__ void copy(const char* from, char* to, int64_t begin, int64_t end) {
  for (int64_t at = begin + int(threadIdx.x) % kWarp * kLaneBytes; at < end; at += kInFlight * kWarp * kLaneBytes) {
    Vec<uint32_t> loaded[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t place = at + i * kWarp * kLaneBytes;
      loaded[i] = load_streaming(reinterpret_cast<const uint32_t*>(from + place), place < end);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t place = at + i * kWarp * kLaneBytes;
      if (place < end) store(reinterpret_cast<uint32_t*>(to + place), loaded[i]);
    }
  }
}

// grid: [blocks, layers]. Copies what has got a row, a warp one neuron after another.
__global__ void __launch_bounds__(kCopyThreads) copy_kernel(const HoldParams p) {
  wait_for_kernel_before();
  const int layer = int(blockIdx.y), count = p.count[layer];
  const HeldLayer held = p.held[layer];
  for (int i = int(blockIdx.x) * kCopyWarps + int(threadIdx.x) / kWarp; i < count; i += int(gridDim.x) * kCopyWarps) {
    const int row = p.taken[size_t(layer) * p.rows + i], neuron = p.neuron_of[size_t(layer) * p.rows + row];
    copy(held.from + neuron * held.bundle, held.data + row * held.bundle, 0, held.bundle);
  }
}

// grid: [blocks]. A warp one neuron after another. Bytes that move: those of the image that are not resident, once in and once
// out; over the link those of neurons that have no row.
__global__ void __launch_bounds__(kCopyThreads) fill_kernel(const FillParams p) {
  wait_without_overlap();
  const HeldLayer held = *p.held;
  const int first = int(p.resident / held.bundle);  // some of it may be resident
  for (int neuron = first + int(blockIdx.x) * kCopyWarps + int(threadIdx.x) / kWarp; neuron < p.intermediate;
       neuron += int(gridDim.x) * kCopyWarps) {
    const int row = p.row_of[neuron];
    const int64_t at = neuron * held.bundle;
    copy(row < 0 ? held.from + at : held.data + row * held.bundle, p.image + at, neuron == first ? p.resident - at : 0,
         held.bundle);
  }
}

}  // namespace

void hold(const HoldParams& p, Workspace, StreamHandle stream) {
  const int threads = p.rows < kPlaceThreads ? ceil_div(p.rows, kWarp) * kWarp : kPlaceThreads;
  launch<place_kernel>("hold_place", p.layers, threads, PlaceShared::bytes(p.rows), stream, p);
  launch<copy_kernel>("hold_copy", dim3(kHoldBlocks, p.layers), kCopyThreads, 0, stream, p);
}

void fill(const FillParams& p, StreamHandle stream) { launch<fill_kernel>("fill", kFillBlocks, kCopyThreads, 0, stream, p); }

}  // namespace sirius::cuda
