// One pass through every layer, in one parallel region: the loop over layers that a decode step is.
#include <algorithm>
#include <exception>

#include "crew.h"
#include "isa.h"
#include "ops.h"
#include "stream.h"
#include "team.h"

namespace sirius::cpu {
namespace {

// The activations that threads share. Norms before a product are recomputed by each thread instead: cheaper than a barrier.
struct Workspace {
  char* next;
  Dtype dtype;
  void *x, *branch, *qkv, *attended, *hidden;
  float *gates, *spread, *partial, *attention;

  Workspace(const ModelWeights& m, int num_rows, void* memory) : next(static_cast<char*>(memory)), dtype(m.dtype) {
    x = take(size_t(num_rows) * m.hidden);
    branch = take(size_t(num_rows) * m.hidden);
    qkv = take(size_t(num_rows) * (m.heads + 2 * m.kv_heads) * m.head_dim);
    attended = take(size_t(num_rows) * m.heads * m.head_dim);
    hidden = take(size_t(num_rows) * m.intermediate);
    gates = reinterpret_cast<float*>(next);
    spread = gates + size_t(num_rows) * m.intermediate;
    partial = spread + size_t(num_rows) * m.intermediate;
    attention = partial + down_workspace(num_rows, m.hidden, m.intermediate);
  }

  void* take(size_t elements) {
    void* start = next;
    next += (elements * size_of(dtype) + 63) / 64 * 64;
    return start;
  }
};

class Pass {
 public:
  Pass(const DecodeStepParams& p, std::exception_ptr* failed)
      : p_(p), m_(*p.model), w_(m_, p.num_rows, p.workspace), failed_(failed) {}

  void run() const {
    embed();
    sync();
    for (int layer = 0; layer < m_.num_layers; ++layer) {
      if (!arrived(layer)) return;
      attention(m_.layers[layer], layer);
      mlp(m_.layers[layer], layer);
      left(layer);
    }
    if (!head()) return;
    if (!p_.argmax) return;
    sync();
    argmax({.logits = p_.logits, .argmax = p_.argmax, .num_rows = p_.num_rows, .vocab = m_.vocab});
  }

 private:
  void embed() const {
    const Kernels& k = kernels(m_.dtype);
    const MatrixKernels& matrix = matrix_kernels(m_.embedding.format, m_.dtype);
    float* numbers = scratch<float>(Scratch::first, m_.hidden);
    const Range rows = share(p_.num_rows);
    for (int j = rows.begin; j < rows.end; ++j) {
      matrix.read(m_.embedding.place(p_.tokens[j]), m_.embedding.form(), numbers);
      k.store(numbers, nullptr, m_.embedding_scale, 0.0f, nullptr, m_.hidden, offset(w_.x, size_t(j) * m_.hidden, m_.dtype));
    }
  }

  // All of x, by this thread for itself.
  const void* normalised(const Norm& norm) const {
    if (!norm.weight) return w_.x;
    const Kernels& k = kernels(m_.dtype);
    void* out = scratch<char>(Scratch::normed, size_t(p_.num_rows) * m_.hidden * size_of(m_.dtype));
    for (int j = 0; j < p_.num_rows; ++j) {
      const size_t at = size_t(j) * m_.hidden;
      k.rms_norm(offset(w_.x, at, m_.dtype), norm, nullptr, m_.hidden, offset(out, at, m_.dtype));
    }
    return out;
  }

  // All of it at once, or as it arrives. False in every thread if it does not.
  bool head() const {
    const void* x = normalised(m_.final_norm);
    const int step = m_.head_rows ? m_.head_rows : m_.vocab;
    for (int first = 0; first < m_.vocab; first += step) {
      const int layer = m_.num_layers + first / step;
      if (m_.head_rows && !arrived(layer)) return false;
      const Matrix part = m_.lm_head.part(first, std::min(step, m_.vocab - first));
      linear({.dtype = m_.dtype,
              .x = x,
              .parts = {{part}},
              .num_parts = 1,
              .out = p_.logits + first,
              .out_f32 = true,
              .scale = m_.logit_scale,
              .softcap = m_.logit_softcap,
              .num_rows = p_.num_rows,
              .out_features = part.rows,
              .out_stride = m_.vocab});
      if (!m_.head_rows) continue;
      sync();
      left(layer);
    }
    return true;
  }

  // Waits for a layer, which may come from a disk. False in every thread if it does not come.
  bool arrived(int layer) const {
    if (!m_.stream) return true;
    if (member.id == 0) {
      try {
        m_.stream->need(layer);
      } catch (...) {
        *failed_ = std::current_exception();
      }
    }
    sync();
    return !*failed_;
  }

  // The layer is read no more by any thread.
  void left(int layer) const {
    if (m_.stream && member.id == 0) m_.stream->done(layer);
  }

  // After the first half of a layer's MLP: has those neurons kept that a set which follows the text will most likely have next.
  void watch(int index) const {
    if (!p_.watch.statistic || !p_.z || member.id != 0) return;
    const int kept = m_.stream->slots();
    const size_t at = size_t(index) * m_.intermediate;
    float* statistic = scratch<float>(Scratch::first, m_.intermediate);  // of that set, which is not yet
    std::copy_n(p_.watch.statistic + at, m_.intermediate, statistic);
    int32_t* rows = scratch<int32_t>(Scratch::taken_neurons, p_.num_rows + kept);
    for (int j = 0; j < p_.num_rows; ++j) rows[j] = j;
    follow_layer({.dtype = m_.dtype,
                  .z = offset(p_.z, at * p_.num_rows, m_.dtype),
                  .rows = rows,
                  .down_squares = p_.watch.down_squares + at,
                  .statistic = statistic,
                  .neurons = rows + p_.num_rows,
                  .decay = p_.watch.decay,
                  .layers = 1,
                  .num_rows = p_.num_rows,
                  .intermediate = m_.intermediate,
                  .kept = kept,
                  .count = p_.num_rows},
                 0);
    m_.stream->keep(index, rows + p_.num_rows, kept);
  }

  // What attention or MLP make joins x as it is written, or after a norm that needs the whole row.
  struct Join {
    const void* residual;
    void* out;
    float scale;
  };
  Join join(const Norm& after) const {
    return after.weight ? Join{nullptr, w_.branch, 1.0f} : Join{w_.x, w_.x, m_.residual_scale};
  }
  void joined(const Norm& after) const {
    sync();
    if (!after.weight) return;
    rms_norm({.dtype = m_.dtype,
              .x = w_.branch,
              .norm = after,
              .residual = w_.x,
              .out = w_.x,
              .num_rows = p_.num_rows,
              .hidden = m_.hidden});
    sync();
  }

  void attention(const LayerWeights& layer, int index) const {
    const int qkv_width = (m_.heads + 2 * m_.kv_heads) * m_.head_dim;
    const size_t cache_at = size_t(index) * m_.kv_heads * p_.capacity * m_.head_dim;
    const CacheShape cache{m_.kv_heads, p_.capacity, m_.head_dim};
    void *k_cache = offset(p_.k_cache, cache_at, m_.dtype), *v_cache = offset(p_.v_cache, cache_at, m_.dtype);
    const int rotary_dim = layer.rope < 0 ? 0 : m_.rotary_dim;
    const size_t table = layer.rope < 0 ? 0 : size_t(layer.rope) * p_.max_position * (m_.rotary_dim / 2);

    linear({.dtype = m_.dtype,
            .x = normalised(layer.before_attention),
            .parts = {layer.qkv[0], layer.qkv[1], layer.qkv[2]},
            .num_parts = 3,
            .out = w_.qkv,
            .num_rows = p_.num_rows,
            .out_features = qkv_width});
    sync();
    rope_kv_write({.dtype = m_.dtype,
                   .qkv = w_.qkv,
                   .q_norm = layer.q_norm,
                   .k_norm = layer.k_norm,
                   .cos = p_.cos + table,
                   .sin = p_.sin + table,
                   .positions = p_.positions,
                   .first_slot = p_.first_slot,
                   .k_cache = k_cache,
                   .v_cache = v_cache,
                   .cache = cache,
                   .num_rows = p_.num_rows,
                   .heads = m_.heads,
                   .rotary_dim = rotary_dim});
    sync();
    tree_attention({.dtype = m_.dtype,
                    .q = w_.qkv,
                    .q_stride = qkv_width,
                    .k_cache = k_cache,
                    .v_cache = v_cache,
                    .cache = cache,
                    .prefix = p_.prefix,
                    .mask = p_.mask,
                    .mask_words = p_.mask_words,
                    .positions = p_.positions,
                    .window = layer.window,
                    .out = w_.attended,
                    .workspace = w_.attention,
                    .scale = m_.attention_scale,
                    .softcap = m_.attention_softcap,
                    .num_rows = p_.num_rows,
                    .heads = m_.heads});
    sync();
    const Join to = join(layer.after_attention);
    linear({.dtype = m_.dtype,
            .x = w_.attended,
            .parts = {layer.output},
            .num_parts = 1,
            .residual = to.residual,
            .out = to.out,
            .scale = to.scale,
            .num_rows = p_.num_rows,
            .out_features = m_.hidden});
    joined(layer.after_attention);
  }

  void mlp(const LayerWeights& layer, int index) const {
    const Sparsity& s = p_.sparsity;
    const int32_t* neurons = nullptr;
    int32_t kept = m_.intermediate;
    void* hidden = p_.z ? offset(p_.z, size_t(index) * p_.num_rows * m_.intermediate, m_.dtype) : w_.hidden;

    const void* x = normalised(layer.before_mlp);
    if (s.kind != Sparsity::dense && s.kind != Sparsity::listed) {
      const bool cascade = s.kind == Sparsity::cascade;
      const int32_t* among = cascade ? s.neurons + size_t(index) * s.kept : nullptr;
      const int candidates = cascade ? s.kept : m_.intermediate;
      gate({.dtype = m_.dtype,
            .x = x,
            .gate = layer.gate,
            .neurons = among,
            .out = w_.gates,
            .activation = m_.activation,
            .num_rows = p_.num_rows,
            .num_neurons = candidates});
      sync();
      // Every thread makes the list for itself: that takes less time than a barrier and keeps it in the thread's own cache.
      int32_t* list = scratch<int32_t>(Scratch::neurons, m_.intermediate);
      select({.values = w_.gates,
              .among = among,
              .weights = cascade ? s.down_norms + size_t(index) * m_.intermediate : nullptr,
              .threshold = s.kind == Sparsity::threshold ? s.thresholds + index : nullptr,
              .neurons = list,
              .count = &kept,
              .num_rows = p_.num_rows,
              .intermediate = m_.intermediate,
              .candidates = candidates,
              .kept = cascade ? s.kept_up : s.kept});
      neurons = list;
      up({.dtype = m_.dtype,
          .x = x,
          .up = layer.up,
          .gates = w_.gates,
          .neurons = neurons,
          .out = cascade ? w_.spread : hidden,
          .spread = cascade,
          .num_rows = p_.num_rows,
          .num_neurons = kept});
    } else {
      if (s.kind == Sparsity::listed) {
        kept = s.kept;
        neurons = s.neurons + size_t(index) * kept;
      }
      gate_up({.dtype = m_.dtype,
               .x = x,
               .gate = layer.gate,
               .up = layer.up,
               .neurons = neurons,
               .out = hidden,
               .activation = m_.activation,
               .num_rows = p_.num_rows,
               .num_neurons = kept});
    }
    sync();
    if (m_.stream) watch(index);
    if (s.kind == Sparsity::cascade) {
      // Again every thread for itself, together with what `down` multiplies by: it need not wait for the others then.
      int32_t* list = scratch<int32_t>(Scratch::taken_neurons, s.kept_up);
      hidden = scratch<char>(Scratch::taken, size_t(p_.num_rows) * s.kept_down * size_of(m_.dtype));
      select({.dtype = m_.dtype,
              .values = w_.spread,
              .among = neurons,
              .weights = s.down_norms + size_t(index) * m_.intermediate,
              .neurons = list,
              .count = &kept,
              .taken = hidden,
              .num_rows = p_.num_rows,
              .intermediate = m_.intermediate,
              .candidates = s.kept_up,
              .kept = s.kept_down});
      neurons = list;
    }
    const Join to = join(layer.after_mlp);
    down({.dtype = m_.dtype,
          .x = hidden,
          .down = layer.down,
          .neurons = neurons,
          .residual = to.residual,
          .out = to.out,
          .workspace = w_.partial,
          .scale = to.scale,
          .num_rows = p_.num_rows,
          .num_neurons = kept});
    joined(layer.after_mlp);
  }

  const DecodeStepParams& p_;
  const ModelWeights& m_;
  const Workspace w_;
  std::exception_ptr* const failed_;  // by thread 0, before a barrier
};

}  // namespace

void decode_step(const DecodeStepParams& p, int threads) {
  static Crew crew;
  std::exception_ptr failed;
  const int size = crew.size(threads);
  const Clock::time_point begun = Clock::now();
  const double stalled = with_team(size, [&] { Pass(p, &failed).run(); });
  if (failed) std::rethrow_exception(failed);
  // Where weights come from a disk threads wait for that.
  if (!p.model->stream) crew.passed(size, std::chrono::duration<double>(Clock::now() - begun).count(), stalled);
}

size_t decode_workspace(const ModelWeights& m, int num_rows, int slots) {
  const size_t elements = size_t(num_rows) * (2 * m.hidden + (2 * m.heads + 2 * m.kv_heads) * m.head_dim + m.intermediate);
  const size_t floats = 2 * size_t(num_rows) * m.intermediate + down_workspace(num_rows, m.hidden, m.intermediate) +
                        attention_workspace(num_rows, m.heads, m.head_dim, slots);
  return elements * size_of(m.dtype) + 5 * 64 + floats * sizeof(float);
}

}  // namespace sirius::cpu
