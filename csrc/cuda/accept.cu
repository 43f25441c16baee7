#include "logits.cuh"

namespace sirius::cuda {
namespace {

// A node of the tree, and what is known of its row of logits.
struct AcceptNode {
  float max, sum;
  int32_t argmax;
  float logit;  // of its token, in its parent's row
  int32_t token;
  int32_t up;   // its parent; -1 once the node is rejected
  int32_t run;  // the length of the run that ends here; -1 where a node on the way is rejected
};

struct AcceptShared {
  LogitStats warps[kLogitWarps];
  int32_t last;
  // AcceptNode [num_rows]
};

// A warp writes the longest run; of equally long ones that of the larger last score, then the first.
__device__ void write_longest(const AcceptParams& p, const AcceptNode* nodes) {
  const int lane = int(threadIdx.x) % kWarp;
  int length = 0;
  for (int i = lane; i < p.num_rows; i += kWarp) length = nodes[i].run > length ? nodes[i].run : length;
  length = warp_reduce(length, [](int a, int b) { return a > b ? a : b; });
  uint64_t best = 0;
  for (int i = lane; i < p.num_rows; i += kWarp) {
    const uint64_t key = nodes[i].run == length ? key_of(p.scores ? p.scores[i] : 0.0f, i) : 0;
    best = key > best ? key : best;
  }
  int node = index_of(warp_max_key(best));
  if (lane != 0) return;
  *p.accepted = length;
  for (int i = length - 1; i >= 0; --i, node = nodes[node].up) p.path[i] = node;
}

// All that follows the statistics of the parts, by one block.
__device__ void accept_tree(const AcceptParams& p, const LogitStats* parts, int num_parts, AcceptNode* nodes) {
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  const float inverse_temperature = 1.0f / p.score_temperature;
  for (int i = thread + 1; i < p.num_rows; i += threads) {
    nodes[i].up = p.parents ? p.parents[i] : i - 1;
    nodes[i].token = p.drafts[i - 1];
    nodes[i].logit = nodes[i].token < 0 ? kLowest : p.logits[size_t(nodes[i].up) * p.vocab + nodes[i].token];
  }
  for (int i = thread / kWarp; i < p.num_rows; i += threads / kWarp) {
    const LogitStats stats = row_stats<true>(parts + size_t(i) * num_parts, num_parts, inverse_temperature);
    if (thread % kWarp != 0) continue;
    nodes[i].max = stats.max;
    nodes[i].sum = stats.sum;
    nodes[i].argmax = p.argmax[i] = stats.argmax;
  }
  __syncthreads();

  for (int i = thread + 1; i < p.num_rows; i += threads) {
    const AcceptNode& parent = nodes[nodes[i].up];
    const float likelihood = expf((nodes[i].logit - parent.max) * inverse_temperature) / parent.sum;
    p.likelihoods[i - 1] = likelihood;
    const bool kept = nodes[i].token >= 0 && (p.match ? nodes[i].token == parent.argmax : likelihood >= p.threshold);
    const bool drafted = !p.limit || !p.scores || p.scores[i] > kLowest;
    if (!kept || !drafted) nodes[i].up = -1;
    if (p.fault && drafted && (nodes[i].token < 0 || nodes[i].argmax < 0)) *p.fault = 1;
  }
  if (p.fault && thread == 0 && nodes[0].argmax < 0) *p.fault = 1;
  __syncthreads();

  const int most = p.limit ? *p.limit : p.num_rows;
  for (int i = thread; i < p.num_rows; i += threads) {
    int at = i, length = 0;
    for (; at > 0; at = nodes[at].up) ++length;
    nodes[i].run = at == 0 && length <= most ? length : -1;
  }
  __syncthreads();
  if (thread < kWarp) write_longest(p, nodes);
}

// grid: [parts of a row, rows]; a block reads one part, kLogitsPerPart * 4 bytes, and the last one does the rest
template <bool Aligned>
__global__ void __launch_bounds__(kLogitWarps* kWarp) accept_kernel(const AcceptParams p, LogitStats* parts, int32_t* counter) {
  AcceptShared& shared = shared_memory<AcceptShared>();
  wait_for_kernel_before();
  float x[kLogitsPerThread];
  load_logits<Aligned>(p.logits, p.vocab, p.fault != nullptr, x);
  part_stats<true>(x, 1.0f / p.score_temperature, shared.warps, parts + blockIdx.y * gridDim.x + blockIdx.x);
  if (!last_block(counter, int(gridDim.x * gridDim.y), &shared.last)) return;
  accept_tree(p, parts, int(gridDim.x), reinterpret_cast<AcceptNode*>(&shared + 1));
}

// grid: [parts of a row, rows]; a block reads one part, kLogitsPerPart * 4 bytes, and the last one finds the rows' largest
template <bool Aligned, bool Likelihoods>
__global__ void __launch_bounds__(kLogitWarps* kWarp) argmax_kernel(const ArgmaxParams p, LogitStats* parts, int32_t* counter) {
  AcceptShared& shared = shared_memory<AcceptShared>();
  wait_for_kernel_before();
  const int num_parts = int(gridDim.x);
  float x[kLogitsPerThread];
  load_logits<Aligned>(p.logits, p.vocab, true, x);
  part_stats<Likelihoods>(x, 1.0f / p.score_temperature, shared.warps, parts + blockIdx.y * gridDim.x + blockIdx.x);
  if (!last_block(counter, int(gridDim.x * gridDim.y), &shared.last)) return;
  for (int i = int(threadIdx.x) / kWarp; i < p.num_rows; i += int(blockDim.x) / kWarp) {
    const LogitStats stats = row_stats<Likelihoods>(parts + size_t(i) * num_parts, num_parts, 1.0f / p.score_temperature);
    if (threadIdx.x % kWarp != 0) continue;
    p.argmax[i] = stats.argmax;
    if (Likelihoods) p.likelihoods[i] = 1.0f / stats.sum;
  }
}

}  // namespace

size_t accept_workspace(int num_rows, int vocab) {
  return size_t(num_rows) * logit_parts(vocab) * (sizeof(LogitStats) / sizeof(float));
}

void accept(const AcceptParams& p, Workspace workspace, StreamHandle stream) {
  with_flag(aligned_logits(p.logits, p.vocab), [&](auto flag) {
    launch<accept_kernel<flag.value>>("accept", dim3(logit_parts(p.vocab), p.num_rows), logit_threads(p.vocab),
                                      sizeof(AcceptShared) + size_t(p.num_rows) * sizeof(AcceptNode), stream, p,
                                      reinterpret_cast<LogitStats*>(workspace.floats), workspace.counters);
  });
}

void argmax(const ArgmaxParams& p, Workspace workspace, StreamHandle stream) {
  with_flag(aligned_logits(p.logits, p.vocab), [&](auto aligned) {
    with_flag(p.likelihoods != nullptr, [&](auto likelihoods) {
      launch<argmax_kernel<aligned.value, likelihoods.value>>(
          "argmax", dim3(logit_parts(p.vocab), p.num_rows), logit_threads(p.vocab), sizeof(AcceptShared), stream, p,
          reinterpret_cast<LogitStats*>(workspace.floats), workspace.counters);
    });
  });
}

}  // namespace sirius::cuda
