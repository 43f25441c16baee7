// The rotation of a head, for the kernel of its own and for the projection that rotates its output.
#pragma once

#include "common.cuh"

namespace sirius::cuda {

struct Pair {
  float first, second;
};

// Elements d and d + rotary_dim / 2 of a head, rotated by their angle. Each result is one product and one fused multiply-add, so
// it has the same bits in every kernel.
__device__ __forceinline__ Pair rotate(Pair x, float cos, float sin) {
  return {fmaf(x.first, cos, -(x.second * sin)), fmaf(x.second, cos, x.first * sin)};
}

// Where a head of q, k or v, numbered in this order, goes from row `row` of the pass: q to `q`, k and v to their cache slot.
template <class T>
__device__ __forceinline__ T* head_output(const RopeParams& p, T* q, int row, int head) {
  if (head < p.heads) return q;
  const int slot = (p.base ? *p.base : 0) + (p.slots ? p.slots[row] : p.first_slot + row), entry = head - p.heads;
  const bool is_key = entry < p.cache.kv_heads;
  void* const cache = is_key ? p.k_cache : p.v_cache;
  return static_cast<T*>(cache) +
         (size_t(is_key ? entry : entry - p.cache.kv_heads) * p.cache.capacity + slot) * p.cache.head_dim;
}

// Where the angles of row `row` of the pass begin in the tables.
__device__ __forceinline__ size_t angles_of(const RopeParams& p, int row) {
  return size_t((p.base ? *p.base : 0) + p.positions[row]) * (p.rotary_dim / 2);
}

}  // namespace sirius::cuda
