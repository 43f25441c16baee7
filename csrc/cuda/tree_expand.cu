#include "logits.cuh"

namespace sirius::cuda {
namespace {

constexpr int kMaxWidth = 16;

struct ExpandShared {
  uint64_t largest[kLogitWarps * kMaxWidth];
  LogitStats warps[kLogitWarps];
  int32_t last;
  // uint64_t [num_leaves, width]: keys of (likelihood, place in this array); then int32_t [num_leaves, width]: tokens
};

// What a block leaves of its part of a row.
struct ExpandParts {
  uint64_t* largest;  // [num_leaves, parts, width], keys of (logit, token); 0 where there are fewer
  LogitStats* stats;  // [num_leaves, parts]
};

// A warp writes what a leaf proposes: keys, 0 where it has fewer, and tokens.
__device__ void propose(const TreeExpandParams& p, const ExpandParts& parts, int num_parts, int leaf, uint64_t* keys,
                        int32_t* tokens) {
  const int lane = int(threadIdx.x) % kWarp;
  const float inverse_temperature = 1.0f / p.score_temperature;
  const LogitStats stats = row_stats<true>(parts.stats + size_t(leaf) * num_parts, num_parts, inverse_temperature);
  if (p.fault && lane == 0 && stats.argmax < 0 && p.scores[leaf] > kLowest) *p.fault = 1;
  const uint64_t* largest = parts.largest + size_t(leaf) * num_parts * p.width;
  const uint64_t found = warp_largest(largest, num_parts * p.width, p.width);
  const int count = 1.0f / stats.sum > p.prune ? 1 : p.width;
  if (lane >= p.width) return;
  const float likelihood = (value_of(found) - stats.max) * inverse_temperature - logf(stats.sum) + p.scores[leaf];
  const int at = leaf * p.width + lane;
  // Beside a fault, which is infinite, no likelihood is possible.
  keys[at] = found != 0 && lane < count ? possible_key(likelihood, at) : 0;
  tokens[at] = index_of(found);
}

// grid: [parts of a row, leaves]; a block reads one part, kLogitsPerPart * 4 bytes, and the last one takes a leaf a warp, then
// chooses among them
template <bool Aligned>
__global__ void __launch_bounds__(kLogitWarps* kWarp, 1)
    tree_expand_kernel(const TreeExpandParams p, ExpandParts parts, int32_t* counter) {
  ExpandShared& shared = shared_memory<ExpandShared>();
  wait_for_kernel_before();
  const int warp = int(threadIdx.x) / kWarp, warps = int(blockDim.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int num_parts = int(gridDim.x), part = int(blockIdx.y * gridDim.x + blockIdx.x);
  float x[kLogitsPerThread];
  load_logits<Aligned>(p.logits, p.vocab, p.fault != nullptr, x);
  {
    uint64_t keys[kLogitsPerThread];
#pragma unroll
    for (int i = 0; i < kLogitsPerThread; ++i) keys[i] = possible_key(x[i], logit_index(i));
    const uint64_t found = warp_largest(keys, p.width);
    if (lane < p.width) shared.largest[warp * p.width + lane] = found;
  }
  part_stats<true>(x, 1.0f / p.score_temperature, shared.warps, parts.stats + part);  // waits for the block
  if (warp == 0) {
    const uint64_t found = warp_largest(shared.largest, warps * p.width, p.width);
    if (lane < p.width) parts.largest[size_t(part) * p.width + lane] = found;
  }
  if (!last_block(counter, int(gridDim.x * gridDim.y), &shared.last)) return;

  uint64_t* keys = reinterpret_cast<uint64_t*>(&shared + 1);
  int32_t* tokens = reinterpret_cast<int32_t*>(keys + p.num_leaves * p.width);
  for (int leaf = warp; leaf < p.num_leaves; leaf += warps) propose(p, parts, num_parts, leaf, keys, tokens);
  __syncthreads();
  if (warp != 0) return;
  const uint64_t chosen = warp_largest(keys, p.num_leaves * p.width, p.width);
  const int count = __popc(__ballot_sync(kAllLanes, chosen != 0));
  if (lane == 0) *p.count = count;
  if (lane >= p.width) return;
  p.tokens[lane] = chosen != 0 ? tokens[index_of(chosen)] : 0;
  p.parents[lane] = chosen != 0 ? index_of(chosen) / p.width : 0;
  p.new_scores[lane] = chosen != 0 ? value_of(chosen) : kLowest;
}

}  // namespace

size_t tree_expand_workspace(int num_leaves, int vocab, int width) {
  return size_t(num_leaves) * logit_parts(vocab) * (width * sizeof(uint64_t) + sizeof(LogitStats)) / sizeof(float);
}

void tree_expand(const TreeExpandParams& p, Workspace workspace, StreamHandle stream) {
  const size_t proposals = size_t(p.num_leaves) * p.width;
  ExpandParts parts;
  parts.largest = reinterpret_cast<uint64_t*>(workspace.floats);
  parts.stats = reinterpret_cast<LogitStats*>(parts.largest + proposals * logit_parts(p.vocab));
  with_flag(aligned_logits(p.logits, p.vocab), [&](auto flag) {
    launch<tree_expand_kernel<flag.value>>("tree_expand", dim3(logit_parts(p.vocab), p.num_leaves), logit_threads(p.vocab),
                                           sizeof(ExpandShared) + proposals * (sizeof(uint64_t) + sizeof(int32_t)), stream, p,
                                           parts, workspace.counters);
  });
}

}  // namespace sirius::cuda
