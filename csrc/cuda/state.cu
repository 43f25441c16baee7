// What a period does to its own state, in device memory, so that it can be replayed without the host.
#include "weights.cuh"

namespace sirius::cuda {
namespace {

constexpr int kEmbedThreads = 128;

// grid: [num_rows]; one block a row. A token of -1 was chosen from logits that are not finite: the host does not know yet when it
// is embedded, and does not look at what comes of it.
template <class T, bool Aligned>
__global__ void embed_kernel(const EmbedParams p) {
  wait_for_kernel_before();
  const int hidden = p.table.cols;
  const WeightRow<T, Plain, Aligned> from(p.table, max(p.tokens[blockIdx.x], 0));
  T* to = static_cast<T*>(p.out) + size_t(blockIdx.x) * hidden;
  for (int c = int(threadIdx.x) * Vec<T>::size; c < hidden; c += kEmbedThreads * Vec<T>::size) {
    const Vec<T> part = from.load(c, hidden);
    float scaled[Vec<T>::size];
#pragma unroll
    for (int i = 0; i < Vec<T>::size; ++i) scaled[i] = p.scale * part[i];
    store_part<Aligned>(to, c, hidden, Vec<T>::rounded(scaled));
  }
}

// grid: [weights of a row / kEmbedThreads, num_rows]; one thread a weight. The same of a packed table.
template <class T>
__global__ void embed_packed_kernel(const EmbedParams p) {
  wait_for_kernel_before();
  const int hidden = p.table.cols, column = int(blockIdx.x) * kEmbedThreads + int(threadIdx.x);
  if (column >= hidden) return;
  static_cast<T*>(p.out)[size_t(blockIdx.y) * hidden + column] =
      from_float<T>(p.scale * packed_weight(p.table, max(p.tokens[blockIdx.y], 0), column));
}

// One warp; one lane a new node. A node sees its parent's ancestors, its parent and itself.
__global__ void grow_kernel(const GrowParams p) {
  wait_for_kernel_before();
  const int i = int(threadIdx.x);
  if (p.confidence) {
    // Empty places stand in row 0.
    const float likelihood = i < p.width ? expf(p.scores[p.first + i] - p.scores[p.leaves + p.rows[i]]) : 0.0f;
    const float best = warp_max(likelihood);
    if (i == 0) *p.confidence = best;
  }
  if (i >= p.width) return;
  const int node = p.first + i, parent = p.leaves + p.rows[i];
  p.parents[node] = parent;
  for (int word = 0; word < p.mask_words; ++word)
    p.mask[size_t(node) * p.mask_words + word] =
        p.mask[size_t(parent) * p.mask_words + word] | (node / 64 == word ? uint64_t(1) << node % 64 : 0);
}

// One thread.
__global__ void advance_kernel(const AdvanceParams p) {
  wait_for_kernel_before();
  const int accepted = *p.accepted, own = p.argmax[accepted > 0 ? p.path[accepted] : 0];
  p.path[0] = 0;
  *p.used_limit = *p.limit;
  *p.root = *p.length;
  *p.kept = accepted + 1;
  *p.length += accepted + 1;
  *p.remaining -= accepted + 1;
  const int most = *p.remaining - 1 < p.depth ? *p.remaining - 1 : p.depth;
  *p.limit = most > 0 ? most : 0;
  p.tokens[0] = own;
}

}  // namespace

void embed(const EmbedParams& p, Workspace, StreamHandle stream) {
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (!is_plain(p.table.format))
      return launch<embed_packed_kernel<T>>("embed", dim3(ceil_div(p.table.cols, kEmbedThreads), p.num_rows), kEmbedThreads, 0,
                                            stream, p);
    with_flag(weights_aligned<T>(p.table) && aligned16(p.out),
              [&](auto flag) { launch<embed_kernel<T, flag.value>>("embed", p.num_rows, kEmbedThreads, 0, stream, p); });
  });
}

void grow(const GrowParams& p, Workspace, StreamHandle stream) { launch<grow_kernel>("grow", 1, kWarp, 0, stream, p); }

void advance(const AdvanceParams& p, Workspace, StreamHandle stream) { launch<advance_kernel>("advance", 1, 1, 0, stream, p); }

}  // namespace sirius::cuda
