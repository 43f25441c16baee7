// One pass of up to sixteen tokens through every layer of a model of any family. A layer is six kernels, eight with FSparse, nine
// with the cascade; one more for each norm after a product, one more where heads of q and k are normalised, one more for each
// matrix whose format is not that of others that the same kernel would read, and of more than one token one more for each norm
// before a product.
#include <initializer_list>

#include "ops.h"
#include "weight_stream.h"

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

// A pass, and what stands between its kernels.
class Layers {
 public:
  // With p.workspace null only its size counts.
  Layers(const DecodeStepParams& p, const Pass& pass, StreamHandle stream)
      : p_(p), m_(*p.model), pass_(pass), stream_(stream), arena_(p.workspace) {
    const size_t row = size_t(p.num_rows) * size_of(m_.dtype);
    x_ = arena_.take(row * m_.hidden);
    qkv_ = arena_.take(row * (m_.heads + 2 * m_.kv_heads) * m_.head_dim);
    attended_ = arena_.take(row * m_.heads * m_.head_dim);
    branch_ = arena_.take(row * m_.hidden);
    z_ = arena_.take(row * m_.intermediate);
    gates_ = arena_.take<float>(size_t(p.num_rows) * m_.intermediate * sizeof(float));
    spread_ = arena_.take<float>(size_t(p.num_rows) * m_.intermediate * sizeof(float));
    neurons_ = arena_.take<int32_t>(m_.intermediate * sizeof(int32_t));
    taken_neurons_ = arena_.take<int32_t>(m_.intermediate * sizeof(int32_t));
    count_ = arena_.take<int32_t>(sizeof(int32_t));
    size_t most = 0;
    for (size_t each :
         {down_workspace(p.num_rows, m_.hidden, m_.intermediate), select_workspace(m_.intermediate),
          attention_workspace(p.num_rows, m_.heads, m_.head_dim, p.capacity), accept_workspace(p.num_rows, m_.vocab)})
      most = each > most ? each : most;
    workspace_ = {arena_.take<float>(most * sizeof(float)), pass.counters};
  }

  size_t bytes() const { return arena_.used(); }

  void run() const {
    if (pass_.weights) pass_.weights->ahead(0, pass_.weights->num_layers(), stream_);
    embed({.dtype = m_.dtype,
           .table = m_.embedding,
           .tokens = p_.tokens,
           .out = x_,
           .scale = m_.embedding_scale,
           .num_rows = p_.num_rows},
          workspace_, stream_);
    for (int layer = 0; layer < m_.num_layers; ++layer) {
      if (pass_.all_streams) arrived(layer);
      attention_block(layer);
      if (!pass_.all_streams) arrived(layer);
      mlp_block(layer);
      left(layer);
    }
    head();
    if (p_.argmax)
      argmax({.logits = p_.logits, .argmax = p_.argmax, .num_rows = p_.num_rows, .vocab = m_.vocab}, workspace_, stream_);
  }

 private:
  // What comes after this finds all of a layer; nothing after that reads it.
  void arrived(int layer) const {
    if (pass_.weights) pass_.weights->need(layer, stream_);
  }
  void left(int layer) const {
    if (pass_.weights) pass_.weights->done(layer, stream_);
  }

  // All of it at once, or as it arrives.
  void head() const {
    const Read input = read(m_.final_norm);
    const int step = m_.head_rows ? m_.head_rows : m_.vocab;
    for (int first = 0, layer = m_.num_layers; first < m_.vocab; first += step, ++layer) {
      if (m_.head_rows) arrived(layer);
      const Matrix part = m_.lm_head.part(first, m_.vocab - first < step ? m_.vocab - first : step);
      linear({.dtype = m_.dtype,
              .x = input.x,
              .parts = {{part, nullptr}},
              .num_parts = 1,
              .out = p_.logits + first,
              .out_f32 = true,
              .scale = m_.logit_scale,
              .softcap = m_.logit_softcap,
              .num_rows = p_.num_rows,
              .out_features = m_.vocab},
             input.norm, workspace_, stream_);
      if (m_.head_rows) left(layer);
    }
  }

  void attention_block(int layer) const {
    const LayerWeights& w = m_.layers[layer];
    const CacheShape cache{m_.kv_heads, p_.capacity, m_.head_dim};
    const size_t cache_at = size_t(layer) * m_.kv_heads * p_.capacity * m_.head_dim;
    void *k_cache = at(p_.k_cache, cache_at), *v_cache = at(p_.v_cache, cache_at);

    const Read input = read(w.before_attention);
    const LinearParams product{.dtype = m_.dtype,
                               .x = input.x,
                               .parts = {w.qkv[0], w.qkv[1], w.qkv[2]},
                               .num_parts = 3,
                               .out = qkv_,
                               .num_rows = p_.num_rows,
                               .out_features = (m_.heads + 2 * m_.kv_heads) * m_.head_dim};
    const size_t angles = w.rope < 0 ? 0 : size_t(w.rope) * p_.max_position * (m_.rotary_dim / 2);
    const RopeParams rope{.dtype = m_.dtype,
                          .qkv = qkv_,
                          .q_norm = w.q_norm,
                          .k_norm = w.k_norm,
                          .cos = p_.cos + angles,
                          .sin = p_.sin + angles,
                          .positions = p_.positions,
                          .first_slot = p_.first_slot,
                          .base = pass_.base,
                          .k_cache = k_cache,
                          .v_cache = v_cache,
                          .cache = cache,
                          .num_rows = p_.num_rows,
                          .heads = m_.heads,
                          .rotary_dim = w.rope < 0 ? 0 : m_.rotary_dim};
    // A block of the one kernel for both has some pairs of a head; a head's norm wants all of it.
    const bool heads_are_normalised = w.q_norm.weight || w.k_norm.weight;
    if (heads_are_normalised) {
      linear(product, input.norm, workspace_, stream_);
      rope_kv_write(rope, workspace_, stream_);
    } else {
      qkv_rope_kv_write(product, rope, input.norm, workspace_, stream_);
    }

    const int width = m_.heads * m_.head_dim;
    tree_attention({.dtype = m_.dtype,
                    .q = qkv_,
                    .q_stride = heads_are_normalised ? product.out_features : width,
                    .k_cache = k_cache,
                    .v_cache = v_cache,
                    .cache = cache,
                    .prefix = p_.prefix,
                    .base = pass_.base,
                    .mask = p_.mask,
                    .mask_words = p_.mask_words,
                    .positions = p_.positions,
                    .window = w.window,
                    .out = attended_,
                    .scale = m_.attention_scale,
                    .softcap = m_.attention_softcap,
                    .num_rows = p_.num_rows,
                    .heads = m_.heads},
                   workspace_, stream_);
    const Join to = join(w.after_attention);
    linear({.dtype = m_.dtype,
            .x = attended_,
            .parts = {w.output},
            .num_parts = 1,
            .residual = to.residual,
            .out = to.out,
            .scale = to.scale,
            .num_rows = p_.num_rows,
            .out_features = m_.hidden},
           {}, workspace_, stream_);
    finish_join(w.after_attention);
  }

  void mlp_block(int layer) const {
    const LayerWeights& w = m_.layers[layer];
    const Sparsity& s = p_.sparsity;
    const int32_t *neurons = nullptr, *count = nullptr;
    int kept = m_.intermediate;
    const size_t size = size_t(p_.num_rows) * m_.intermediate;
    void* const kept_z = p_.z ? at(p_.z, layer * size) : nullptr;
    void* const z = kept_z && !pass_.z_in_host ? kept_z : z_;
    const Read input = read(w.before_mlp);
    if (s.kind == Sparsity::dense || s.kind == Sparsity::listed) {
      if (s.kind == Sparsity::listed) {
        kept = s.kept;
        neurons = s.neurons + size_t(layer) * kept;
      }
      if (w.gate.format == w.up.format) {
        gate_up({.dtype = m_.dtype,
                 .x = input.x,
                 .gate = w.gate,
                 .up = w.up,
                 .neurons = neurons,
                 .settled = true,
                 .out = z,
                 .activation = m_.activation,
                 .num_rows = p_.num_rows,
                 .num_neurons = kept},
                input.norm, workspace_, stream_);
      } else {
        gate_of(w, input, neurons, kept);
        up({.dtype = m_.dtype,
            .x = input.x,
            .up = w.up,
            .gates = gates_,
            .neurons = neurons,
            .out = z,
            .num_rows = p_.num_rows,
            .num_neurons = kept},
           input.norm, workspace_, stream_);
      }
    } else {
      const bool cascade = s.kind == Sparsity::cascade;
      const int32_t* among = cascade ? s.neurons + size_t(layer) * s.kept : nullptr;
      const float* weights = cascade ? s.down_norms + size_t(layer) * m_.intermediate : nullptr;
      const int candidates = cascade ? s.kept : m_.intermediate;
      gate_of(w, input, among, candidates);
      const float* threshold = s.kind == Sparsity::threshold ? s.thresholds + layer : nullptr;
      if (threshold)
        count = count_;
      else
        kept = cascade ? s.kept_up : s.kept;
      select({.values = gates_,
              .among = among,
              .weights = weights,
              .threshold = threshold,
              .neurons = neurons_,
              .count = count_,
              .alive = pass_.alive,
              .num_rows = p_.num_rows,
              .intermediate = m_.intermediate,
              .candidates = candidates,
              .kept = kept},
             workspace_, stream_);
      neurons = neurons_;
      up({.dtype = m_.dtype,
          .x = input.x,
          .up = w.up,
          .gates = gates_,
          .neurons = neurons,
          .num_neurons_at = count,
          .out = cascade ? spread_ : z,
          .spread = cascade,
          .num_rows = p_.num_rows,
          .num_neurons = kept},
         input.norm, workspace_, stream_);
      if (cascade) {
        kept = s.kept_down;
        select({.dtype = m_.dtype,
                .values = spread_,
                .among = neurons_,
                .weights = weights,
                .neurons = taken_neurons_,
                .count = count_,
                .taken = z,
                .alive = pass_.alive,
                .num_rows = p_.num_rows,
                .intermediate = m_.intermediate,
                .candidates = s.kept_up,
                .kept = kept},
               workspace_, stream_);
        neurons = taken_neurons_;
      }
    }
    const Join to = join(w.after_mlp);
    down({.dtype = m_.dtype,
          .x = z,
          .down = w.down,
          .neurons = neurons,
          .num_neurons_at = count,
          .settled = s.kind != Sparsity::cascade,  // whose last selection comes right before
          .residual = to.residual,
          .out = to.out,
          .scale = to.scale,
          .num_rows = p_.num_rows,
          .num_neurons = kept},
         workspace_, stream_);
    finish_join(w.after_mlp);
    if (kept_z && pass_.z_in_host) to_host(z_, kept_z, size * size_of(m_.dtype), stream_);
  }

  // What products read of x: one row is normalised by every block of them, several are before: on an H100 sixteen rows of 4096
  // made gate_up 39 us longer and qkv 21, where a kernel for them takes two.
  struct Read {
    const void* x;
    Norm norm;
  };
  Read read(const Norm& norm) const {
    if (!norm.weight || p_.num_rows == 1) return {x_, norm};
    rms_norm({.dtype = m_.dtype, .x = x_, .norm = norm, .out = branch_, .num_rows = p_.num_rows, .hidden = m_.hidden}, workspace_,
             stream_);
    return {branch_, {}};
  }

  // Into gates_. neurons: settled, or null for all.
  void gate_of(const LayerWeights& w, const Read& input, const int32_t* neurons, int num_neurons) const {
    gate({.dtype = m_.dtype,
          .x = input.x,
          .gate = w.gate,
          .neurons = neurons,
          .settled = true,
          .out = gates_,
          .activation = m_.activation,
          .num_rows = p_.num_rows,
          .num_neurons = num_neurons},
         input.norm, workspace_, stream_);
  }

  // How what attention or MLP make joins x: as it is written, or by a norm after it, which needs the whole row.
  struct Join {
    const void* residual;
    void* out;
    float scale;
  };
  Join join(const Norm& after) const { return after.weight ? Join{nullptr, branch_, 1.0f} : Join{x_, x_, m_.residual_scale}; }
  void finish_join(const Norm& after) const {
    if (!after.weight) return;
    rms_norm(
        {.dtype = m_.dtype, .x = branch_, .norm = after, .residual = x_, .out = x_, .num_rows = p_.num_rows, .hidden = m_.hidden},
        workspace_, stream_);
  }

  void* at(void* array, size_t elements) const { return static_cast<char*>(array) + elements * size_of(m_.dtype); }

  const DecodeStepParams& p_;
  const ModelWeights& m_;
  const Pass& pass_;
  StreamHandle stream_;
  Arena arena_;
  void *x_, *qkv_, *attended_, *branch_, *z_;
  float *gates_, *spread_;
  int32_t *neurons_, *taken_neurons_, *count_;
  Workspace workspace_;
};

}  // namespace

void decode_step(const DecodeStepParams& p, const Pass& pass, StreamHandle stream) { Layers(p, pass, stream).run(); }

size_t decode_workspace(const ModelWeights& model, int num_rows, int capacity) {
  const DecodeStepParams sizes{.model = &model, .num_rows = num_rows, .capacity = capacity};
  return Layers(sizes, {}, nullptr).bytes();
}

}  // namespace sirius::cuda
