// What a period does to its own state, in device memory, so that it can be replayed without the host.
#include "common.cuh"

namespace sirius::cuda {
namespace {

// grid: [num_rows]; one block a row, moved as it is. A token of -1 was chosen from logits that are not finite: the host does not
// know yet when it is embedded, and does not look at what comes of it.
__global__ void embed_kernel(const char* table, const int32_t* tokens, size_t bytes, char* out) {
  const char* from = table + size_t(max(tokens[blockIdx.x], 0)) * bytes;
  char* to = out + size_t(blockIdx.x) * bytes;
  if (bytes % 16 == 0 && aligned16(table) && aligned16(out)) {
    for (size_t i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16)
      store(reinterpret_cast<bf16_t*>(to + i), load(reinterpret_cast<const bf16_t*>(from + i)));
  } else {
    for (size_t i = threadIdx.x; i < bytes; i += blockDim.x) to[i] = from[i];
  }
}

// One warp; one lane a new node. A node sees its parent's ancestors, its parent and itself.
__global__ void grow_kernel(const GrowParams p) {
  const int i = int(threadIdx.x);
  if (i >= p.width) return;
  const int node = p.first + i, parent = p.leaves + p.rows[i];
  p.parents[node] = parent;
  for (int word = 0; word < p.mask_words; ++word)
    p.mask[size_t(node) * p.mask_words + word] =
        p.mask[size_t(parent) * p.mask_words + word] | (node / 64 == word ? uint64_t(1) << node % 64 : 0);
}

// One thread.
__global__ void advance_kernel(const AdvanceParams p) {
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

void embed(Dtype dtype, const void* table, const int32_t* tokens, int num_rows, int hidden, void* out, StreamHandle stream) {
  launch("embed", embed_kernel, num_rows, 128, 0, stream, static_cast<const char*>(table), tokens,
         size_t(hidden) * size_of(dtype), static_cast<char*>(out));
}

void grow(const GrowParams& p, StreamHandle stream) { launch("grow", grow_kernel, 1, kWarp, 0, stream, p); }

void advance(const AdvanceParams& p, StreamHandle stream) { launch("advance", advance_kernel, 1, 1, 0, stream, p); }

}  // namespace sirius::cuda
