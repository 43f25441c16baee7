#include <cstring>

#include "ops.h"
#include "team.h"

namespace sirius::cpu {

void kv_rewrite(const KvRewriteParams& p) {
  int first = 0;
  while (first < p.length && p.path[first] == first) ++first;  // a chain has nothing to move
  const auto [kv_heads, capacity, head_dim] = p.cache;
  const Range range = share(first == p.length ? 0 : 2 * p.layers * kv_heads);
  for (int task = range.begin; task < range.end; ++task) {
    void* head = offset(task % 2 ? p.v_cache : p.k_cache, size_t(task / 2) * capacity * head_dim, p.dtype);
    // path[i] >= i and the path rises, so an entry is read before its slot is overwritten.
    for (int i = first; i < p.length; ++i)
      std::memcpy(offset(head, size_t(p.start + i) * head_dim, p.dtype),
                  offset(head, size_t(p.start + p.path[i]) * head_dim, p.dtype), head_dim * size_of(p.dtype));
  }
}

}  // namespace sirius::cpu
