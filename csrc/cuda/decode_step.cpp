// One pass of up to sixteen tokens through every layer: six kernels a layer, eight with FSparse.
#include <initializer_list>

#include "ops.h"

namespace sirius::cuda {
namespace {

// Carves arrays out of one piece of memory; with null only their size counts.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T = void>
  T* take(size_t bytes) {
    T* start = reinterpret_cast<T*>(memory_ + used_);
    used_ += (bytes + 255) / 256 * 256;
    return start;
  }
  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

struct Activations {
  void *x, *q, *attended, *hidden;
  float* gates;
  int32_t *neurons, *count;
  float* floats;  // what single ops need

  Activations(const ModelWeights& m, int num_rows, int capacity, Arena& arena) {
    const size_t row = size_t(num_rows) * size_of(m.dtype);
    x = arena.take(row * m.hidden);
    q = arena.take(row * m.heads * m.head_dim);
    attended = arena.take(row * m.heads * m.head_dim);
    hidden = arena.take(row * m.intermediate);
    gates = arena.take<float>(size_t(num_rows) * m.intermediate * sizeof(float));
    neurons = arena.take<int32_t>(m.intermediate * sizeof(int32_t));
    count = arena.take<int32_t>(sizeof(int32_t));
    size_t most = 0;
    for (size_t each : {down_workspace(num_rows, m.hidden, m.intermediate), select_workspace(num_rows, m.intermediate),
                        attention_workspace(num_rows, m.heads, m.head_dim, capacity), accept_workspace(num_rows, m.vocab)})
      most = each > most ? each : most;
    floats = arena.take<float>(most * sizeof(float));
  }
};

void* at(void* array, size_t elements, Dtype dtype) { return static_cast<char*>(array) + elements * size_of(dtype); }

void attention_block(const DecodeStepParams& p, const Pass& pass, const Activations& a, int layer, StreamHandle stream) {
  const ModelWeights& m = *p.model;
  const LayerWeights& w = m.layers[layer];
  const size_t cache_at = size_t(layer) * m.kv_heads * p.capacity * m.head_dim;
  const CacheShape cache{m.kv_heads, p.capacity, m.head_dim};
  void *k_cache = at(p.k_cache, cache_at, m.dtype), *v_cache = at(p.v_cache, cache_at, m.dtype);
  const RopeParams rope{m.dtype,      a.q,     p.cos,   p.sin, p.positions, nullptr,
                        p.first_slot, k_cache, v_cache, cache, p.num_rows,  m.heads};
  qkv_rope_kv_write({a.x, {w.qkv[0], w.qkv[1], w.qkv[2]}, m.hidden}, rope, {w.input_norm, m.eps}, pass.base, stream);
  const int width = m.heads * m.head_dim;
  tree_attention({m.dtype, a.q, width, k_cache, v_cache, cache, p.prefix, p.mask, p.mask_words, a.attended, a.floats,
                  m.attention_scale, p.num_rows, m.heads},
                 pass.base, {a.floats, pass.counters}, stream);
  linear({m.dtype, a.attended, &w.output, 1, a.x, a.x, false, p.num_rows, width, m.hidden}, {}, stream);
}

void mlp_block(const DecodeStepParams& p, const Pass& pass, const Activations& a, int layer, StreamHandle stream) {
  const ModelWeights& m = *p.model;
  const LayerWeights& w = m.layers[layer];
  const Sparsity& s = p.sparsity;
  const Norm norm{w.post_norm, m.eps};
  const Workspace workspace{a.floats, pass.counters};
  const int32_t *neurons = nullptr, *count = nullptr;
  int kept = m.intermediate;
  void* hidden = p.z ? at(p.z, size_t(layer) * p.num_rows * m.intermediate, m.dtype) : a.hidden;
  if (s.kind == Sparsity::dense || s.kind == Sparsity::listed) {
    if (s.kind == Sparsity::listed) {
      kept = s.kept;
      neurons = s.neurons + size_t(layer) * kept;
    }
    gate_up({m.dtype, a.x, w.gate, w.up, neurons, hidden, p.num_rows, m.hidden, kept}, norm, stream);
  } else {
    gate({m.dtype, a.x, w.gate, a.gates, p.num_rows, m.hidden, m.intermediate}, norm, stream);
    const float* threshold = s.kind == Sparsity::threshold ? s.thresholds + layer : nullptr;
    select({a.gates, threshold, a.neurons, p.num_rows, m.intermediate, s.kept}, a.count, pass.alive, workspace, stream);
    neurons = a.neurons;
    if (threshold)
      count = a.count;
    else
      kept = s.kept;
    up({m.dtype, a.x, w.up, a.gates, neurons, hidden, p.num_rows, m.hidden, m.intermediate, kept}, norm, count, stream);
  }
  down({m.dtype, hidden, w.down, neurons, a.x, a.x, a.floats, p.num_rows, m.hidden, kept}, count, workspace, stream);
}

}  // namespace

void decode_step(const DecodeStepParams& p, const Pass& pass, StreamHandle stream) {
  const ModelWeights& m = *p.model;
  Arena arena(p.workspace);
  const Activations a(m, p.num_rows, p.capacity, arena);
  embed(m.dtype, m.embedding, p.tokens, p.num_rows, m.hidden, a.x, stream);
  for (int layer = 0; layer < m.num_layers; ++layer) {
    attention_block(p, pass, a, layer, stream);
    mlp_block(p, pass, a, layer, stream);
  }
  const Matrix head{m.lm_head, nullptr, m.vocab};
  linear({m.dtype, a.x, &head, 1, nullptr, p.logits, true, p.num_rows, m.hidden, m.vocab}, {m.final_norm, m.eps}, stream);
  if (p.argmax) argmax(p.logits, p.num_rows, m.vocab, p.argmax, {a.floats, pass.counters}, stream);
}

size_t decode_workspace(const ModelWeights& model, int num_rows, int capacity) {
  Arena arena(nullptr);
  const Activations sizes(model, num_rows, capacity, arena);
  return arena.used();
}

}  // namespace sirius::cuda
