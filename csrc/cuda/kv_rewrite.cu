#include "common.cuh"

namespace sirius::cuda {
namespace {

constexpr int kRewriteThreads = 128;
constexpr int kEntries = 8;  // loads in flight

// grid: [2 * layers * kv_heads * parts / kRewriteThreads]; one thread 16 bytes of all entries of one head's keys or values. It
// alone reads and writes them, in order of the slots: path[i] >= i and the path rises, so an entry is read before its slot is
// overwritten. Moves each entry that changes its slot once in and once out.
template <class T, bool Aligned>
__global__ void kv_rewrite_kernel(const KvRewriteParams p) {
  wait_for_kernel_before();
  const int head_dim = p.cache.head_dim, parts = ceil_div(head_dim, Vec<T>::size), heads = p.layers * p.cache.kv_heads;
  const int index = int(blockIdx.x) * kRewriteThreads + int(threadIdx.x), begin = index % parts * Vec<T>::size,
            head = index / parts;
  if (head >= 2 * heads) return;
  const int length = p.length_at ? *p.length_at : p.length, start = p.start + (p.base ? *p.base : 0);
  void* const cache = head < heads ? p.k_cache : p.v_cache;
  T* const entries = static_cast<T*>(cache) + (size_t(head % heads) * p.cache.capacity + start) * head_dim;

  int first = 0;
  while (first < length && p.path[first] == first) ++first;  // a chain has nothing to move
  for (; first < length; first += kEntries) {
    Vec<T> moved[kEntries];
#pragma unroll
    for (int i = 0; i < kEntries; ++i)
      if (first + i < length) moved[i] = load_part<Aligned>(entries + size_t(p.path[first + i]) * head_dim, begin, head_dim);
#pragma unroll
    for (int i = 0; i < kEntries; ++i)
      if (first + i < length) store_part<Aligned>(entries + size_t(first + i) * head_dim, begin, head_dim, moved[i]);
  }
}

}  // namespace

void kv_rewrite(const KvRewriteParams& p, Workspace, StreamHandle stream) {
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool aligned = p.cache.head_dim % Vec<T>::size == 0 && aligned16(p.k_cache) && aligned16(p.v_cache);
    const int threads = 2 * p.layers * p.cache.kv_heads * ceil_div(p.cache.head_dim, Vec<T>::size);
    with_flag(aligned, [&](auto flag) {
      launch<kv_rewrite_kernel<T, flag.value>>("kv_rewrite", ceil_div(threads, kRewriteThreads), kRewriteThreads, 0, stream, p);
    });
  });
}

}  // namespace sirius::cuda
