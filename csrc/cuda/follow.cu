// A set that follows the text: what a verification's tokens used joins the statistic, and the set is chosen anew.
#include "common.cuh"

namespace sirius::cuda {
namespace {

constexpr int kSumWarps = 8;
constexpr int kBlendThreads = 128;

struct SumShared {
  float warps[kSumWarps];
};

// Row i of those that joined the sequence, in one layer; null beyond their number. After a fault none has joined: the set stays,
// so that the host can go over the period again.
template <class T>
__device__ __forceinline__ const T* followed_row(const FollowParams& p, int layer, int i) {
  if ((p.fault && *p.fault) || i >= (p.count_at ? *p.count_at : p.count)) return nullptr;
  return static_cast<const T*>(p.z) + (size_t(layer) * p.num_rows + p.rows[i]) * p.intermediate;
}

// grid: [layers, rows]; a block sums up the squares of one row in one layer
template <class T, bool Aligned>
__global__ void __launch_bounds__(kSumWarps* kWarp) follow_sums_kernel(const FollowParams p, float* sums) {
  SumShared& shared = shared_memory<SumShared>();
  wait_for_kernel_before();
  const T* z = followed_row<T>(p, int(blockIdx.x), int(blockIdx.y));
  if (!z) return;
  float squares = 0.0f;
#pragma unroll 4
  for (int c = int(threadIdx.x) * Vec<T>::size; c < p.intermediate; c += int(blockDim.x) * Vec<T>::size) {
    const Vec<T> part = load_part<Aligned>(z, c, p.intermediate);
#pragma unroll
    for (int i = 0; i < Vec<T>::size; ++i) squares += part[i] * part[i];
  }
  squares = warp_sum(squares);
  if (threadIdx.x % kWarp == 0) shared.warps[threadIdx.x / kWarp] = squares;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float sum = 0.0f;
  for (float each : shared.warps) sum += each;
  sums[blockIdx.x * gridDim.y + blockIdx.y] = sum;
}

// grid: [layers, intermediate / (threads * Vec)]; a thread has 16 bytes of each row, and their neurons' statistic
template <class T, bool Aligned>
__global__ void __launch_bounds__(kBlendThreads) follow_blend_kernel(const FollowParams p, const float* sums, float* scores) {
  wait_for_kernel_before();
  constexpr int size = Vec<T>::size;
  const int layer = int(blockIdx.x), first = int(blockIdx.y * blockDim.x + threadIdx.x) * size;
  const size_t at = size_t(layer) * p.intermediate + first;
  const int n = Aligned ? size : min(size, p.intermediate - first);
  if (first >= p.intermediate) return;
  float statistic[size];
#pragma unroll
  for (int j = 0; j < size; ++j) statistic[j] = j < n ? p.statistic[at + j] : 0.0f;
  for (int i = 0; i < p.num_rows; ++i) {
    const T* z = followed_row<T>(p, layer, i);
    if (!z) break;
    const float sum = sums[layer * p.num_rows + i];
    // A row that is all zero uses no neuron, and adds nothing.
    const float add = sum > 0.0f ? (1.0f - p.decay) / sum : 0.0f;
    const Vec<T> part = load_part<Aligned>(z, first, p.intermediate);
#pragma unroll
    for (int j = 0; j < size; ++j) {
      const float value = part[j];
      statistic[j] = fmaf(value * add, value, p.decay * statistic[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < size; ++j) {
    // Not as above: eight predicates would live through the loop, and there are seven.
    if (!Aligned && at + j >= size_t(layer + 1) * p.intermediate) continue;
    p.statistic[at + j] = statistic[j];
    scores[at + j] = statistic[j] * p.down_squares[at + j];
  }
}

}  // namespace

size_t follow_workspace(int layers, int num_rows, int intermediate) { return size_t(layers) * (num_rows + intermediate); }

void follow(const FollowParams& p, Workspace workspace, StreamHandle stream) {
  float *scores = workspace.floats, *sums = scores + size_t(p.layers) * p.intermediate;
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_flag(p.intermediate % Vec<T>::size == 0 && aligned16(p.z), [&](auto flag) {
      launch<follow_sums_kernel<T, flag.value>>("follow_sums", dim3(p.layers, p.num_rows), kSumWarps * kWarp, sizeof(SumShared),
                                                stream, p, sums);
      launch<follow_blend_kernel<T, flag.value>>("follow_blend",
                                                 dim3(p.layers, ceil_div(p.intermediate, kBlendThreads * Vec<T>::size)),
                                                 kBlendThreads, 0, stream, p, sums, scores);
    });
  });
  const SelectParams best{.values = scores,
                          .neurons = p.neurons,
                          .num_rows = 1,
                          .intermediate = p.intermediate,
                          .candidates = p.intermediate,
                          .kept = p.kept};
  select_each(best, p.layers, workspace, stream);
}

}  // namespace sirius::cuda
