#include "common.cuh"

namespace sirius::cuda {
namespace {

constexpr int kMaskThreads = 64;

// grid: [num_nodes / kMaskThreads]; one thread a node. Indices fall on the way up to the root, so its words are filled from the
// last to the first.
__global__ void tree_mask_kernel(const TreeMaskParams p) {
  wait_for_kernel_before();
  const int index = int(blockIdx.x) * kMaskThreads + int(threadIdx.x);
  if (index >= p.num_nodes) return;
  uint64_t* const row = p.mask + size_t(index) * p.mask_words;
  int node = index;
  for (int word = p.mask_words - 1; word >= 0; --word) {
    uint64_t bits = 0;
    for (; node >= word * 64; node = p.parents[node]) bits |= uint64_t(1) << node % 64;
    row[word] = bits;
  }
}

}  // namespace

void tree_mask(const TreeMaskParams& p, Workspace, StreamHandle stream) {
  launch<tree_mask_kernel>("tree_mask", ceil_div(p.num_nodes, kMaskThreads), kMaskThreads, 0, stream, p);
}

}  // namespace sirius::cuda
