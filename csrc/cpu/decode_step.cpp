// One pass through every layer, in one parallel region: the loop over layers that a decode step is.
#include <cstring>

#include "isa.h"
#include "ops.h"
#include "team.h"

namespace sirius::cpu {
namespace {

// The activations that threads share. Norms are recomputed by each thread instead: cheaper than a barrier.
struct Workspace {
  char* next;
  Dtype dtype;
  void *x, *qkv, *attended, *hidden;
  float *gates, *partial, *attention;

  Workspace(const ModelWeights& m, int num_rows, void* memory) : next(static_cast<char*>(memory)), dtype(m.dtype) {
    x = take(size_t(num_rows) * m.hidden);
    qkv = take(size_t(num_rows) * (m.heads + 2 * m.kv_heads) * m.head_dim);
    attended = take(size_t(num_rows) * m.heads * m.head_dim);
    hidden = take(size_t(num_rows) * m.intermediate);
    gates = reinterpret_cast<float*>(next);
    partial = gates + size_t(num_rows) * m.intermediate;
    attention = partial + down_workspace(num_rows, m.hidden, m.intermediate);
  }

  void* take(size_t elements) {
    void* start = next;
    next += (elements * size_of(dtype) + 63) / 64 * 64;
    return start;
  }
};

void* norm(const ModelWeights& m, const void* x, const void* weight, int num_rows) {
  const Kernels& k = kernels(m.dtype);
  void* out = scratch<char>(Scratch::normed, size_t(num_rows) * m.hidden * size_of(m.dtype));
  for (int j = 0; j < num_rows; ++j) {
    const size_t at = size_t(j) * m.hidden;
    k.rms_norm(offset(x, at, m.dtype), nullptr, weight, m.eps, m.hidden, offset(out, at, m.dtype));
  }
  return out;
}

void attention_block(const DecodeStepParams& p, const Workspace& w, int layer) {
  const ModelWeights& m = *p.model;
  const LayerWeights& weights = m.layers[layer];
  const int qkv_width = (m.heads + 2 * m.kv_heads) * m.head_dim;
  const size_t cache_at = size_t(layer) * m.kv_heads * p.capacity * m.head_dim;
  const CacheShape cache{m.kv_heads, p.capacity, m.head_dim};
  void *k_cache = offset(p.k_cache, cache_at, m.dtype), *v_cache = offset(p.v_cache, cache_at, m.dtype);

  const void* normed = norm(m, w.x, weights.input_norm, p.num_rows);
  linear({m.dtype, normed, weights.qkv, 3, nullptr, w.qkv, false, p.num_rows, m.hidden, qkv_width});
  sync();
  rope_kv_write({m.dtype, w.qkv, p.cos, p.sin, p.positions, nullptr, p.first_slot, k_cache, v_cache, cache, p.num_rows, m.heads});
  sync();
  tree_attention({m.dtype, w.qkv, qkv_width, k_cache, v_cache, cache, p.prefix, p.mask, p.mask_words, w.attended, w.attention,
                  m.attention_scale, p.num_rows, m.heads});
  sync();
  linear({m.dtype, w.attended, &weights.output, 1, w.x, w.x, false, p.num_rows, m.heads * m.head_dim, m.hidden});
  sync();
}

void mlp_block(const DecodeStepParams& p, const Workspace& w, int layer) {
  const ModelWeights& m = *p.model;
  const LayerWeights& weights = m.layers[layer];
  const Sparsity& s = p.sparsity;
  const int32_t* neurons = nullptr;
  int kept = m.intermediate;
  void* hidden = p.z ? offset(p.z, size_t(layer) * p.num_rows * m.intermediate, m.dtype) : w.hidden;

  const void* normed = norm(m, w.x, weights.post_norm, p.num_rows);
  if (s.kind == Sparsity::largest || s.kind == Sparsity::threshold) {
    gate({m.dtype, normed, weights.gate, w.gates, p.num_rows, m.hidden, m.intermediate});
    sync();
    // Every thread makes the list for itself: that takes less time than a barrier and keeps it in the thread's own cache.
    int32_t* list = scratch<int32_t>(Scratch::neurons, m.intermediate);
    kept = select(
        {w.gates, s.kind == Sparsity::threshold ? s.thresholds + layer : nullptr, list, p.num_rows, m.intermediate, s.kept});
    neurons = list;
    up({m.dtype, normed, weights.up, w.gates, neurons, hidden, p.num_rows, m.hidden, m.intermediate, kept});
  } else {
    if (s.kind == Sparsity::listed) {
      kept = s.kept;
      neurons = s.neurons + size_t(layer) * kept;
    }
    gate_up({m.dtype, normed, weights.gate, weights.up, neurons, hidden, p.num_rows, m.hidden, kept});
  }
  sync();
  down({m.dtype, hidden, weights.down, neurons, w.x, w.x, w.partial, p.num_rows, m.hidden, kept});
  sync();
}

}  // namespace

void decode_step(const DecodeStepParams& p) {
  const ModelWeights& m = *p.model;
  const Workspace w(m, p.num_rows, p.workspace);
  const size_t row_bytes = m.hidden * size_of(m.dtype);

  const Range rows = share(p.num_rows);
  for (int j = rows.begin; j < rows.end; ++j)
    std::memcpy(offset(w.x, size_t(j) * m.hidden, m.dtype), offset(m.embedding, size_t(p.tokens[j]) * m.hidden, m.dtype),
                row_bytes);
  sync();
  for (int layer = 0; layer < m.num_layers; ++layer) {
    attention_block(p, w, layer);
    mlp_block(p, w, layer);
  }

  const Matrix lm_head{m.lm_head, nullptr, m.vocab};
  const void* normed = norm(m, w.x, m.final_norm, p.num_rows);
  linear({m.dtype, normed, &lm_head, 1, nullptr, p.logits, true, p.num_rows, m.hidden, m.vocab});
  sync();
  argmax(p.logits, p.num_rows, m.vocab, p.argmax);
}

size_t decode_workspace(const ModelWeights& m, int num_rows, int slots) {
  const size_t elements = size_t(num_rows) * (m.hidden + (2 * m.heads + 2 * m.kv_heads) * m.head_dim + m.intermediate);
  const size_t floats = size_t(num_rows) * m.intermediate + down_workspace(num_rows, m.hidden, m.intermediate) +
                        attention_workspace(num_rows, m.heads, m.head_dim, slots);
  return elements * size_of(m.dtype) + 4 * 64 + floats * sizeof(float);
}

}  // namespace sirius::cpu
