#include <cstring>

#include "isa.h"
#include "ops.h"
#include "team.h"

namespace sirius::cpu {

void rope_kv_write(const RopeParams& p) {
  const Kernels& k = kernels(p.dtype);
  const auto [kv_heads, capacity, head_dim] = p.cache;
  const int all_heads = p.heads + 2 * kv_heads;
  const Range range = share(p.num_rows * all_heads);
  for (int task = range.begin; task < range.end; ++task) {
    const int j = task / all_heads, head = task % all_heads;
    void* vector = offset(p.qkv, size_t(task) * head_dim, p.dtype);
    const size_t angle = size_t(p.positions[j]) * (p.rotary_dim / 2);
    const int slot = p.slots ? p.slots[j] : p.first_slot + j;
    const auto entry = [&](void* cache, int kv_head) {
      return offset(cache, (size_t(kv_head) * capacity + slot) * head_dim, p.dtype);
    };
    if (head < p.heads)
      k.rope(vector, p.q_norm, p.cos + angle, p.sin + angle, head_dim, p.rotary_dim, vector);
    else if (head < p.heads + kv_heads)
      k.rope(vector, p.k_norm, p.cos + angle, p.sin + angle, head_dim, p.rotary_dim, entry(p.k_cache, head - p.heads));
    else
      std::memcpy(entry(p.v_cache, head - p.heads - kv_heads), vector, head_dim * size_of(p.dtype));
  }
}

}  // namespace sirius::cpu
