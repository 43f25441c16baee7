// One plain struct per op: pointers, sizes, strides in elements. No ownership, no Python, no torch. Each struct's fields are
// named once more in python/fields.h, by which Python passes them; both backends take the same structs. T stands for the model's
// element type (`dtype`); everything else is spelled out.
//
// What an op can do without has a value here. A field marked (CUDA) points to device memory that a replayed graph reads, so that
// its value may change between two replays; it is null wherever the value is known when the op is called, and always on the CPU.
#pragma once

#include <cstdint>

#include "types.h"

namespace sirius {

namespace cpu {
class Stream;
}

// Where a row of a matrix lies.
struct Place {
  const void *row, *lower;  // see Matrix
};

// How long the rows of a matrix are, and what they have beside themselves.
struct RowForm {
  int cols;
  const void* shared;  // see Matrix
  int group;           // where rows share scales, which group of 32 rows they are of
};

// A weight matrix, stored row by row: a row is what one neuron, or one output, reads. Who wants a row asks for its place. How the
// bytes of a row are read is known to the format's kernels alone.
struct Matrix {
  const void* data;
  Format format;
  int rows, cols;
  int place_at = 0;                     // (CPU) see `places`
  int64_t stride;                       // bytes from one row to the next
  const void* lower = nullptr;          // of q8, the lower nibbles of the first row
  int64_t lower_stride = 0;             // and bytes from those of one row to those of the next
  const void* shared = nullptr;         // of q4_across and q4_k_across, the scales that 32 rows have together
  const char* const* places = nullptr;  // (CPU) [rows] or null. Then row i is places[i] + place_at, and there is no `data`
  const int32_t* neuron_of = nullptr;   // (CUDA) [rows] or null. Then row i is that of neuron_of[i], by which it finds `shared`

  SIRIUS_ANYWHERE const void* row(int i) const { return static_cast<const char*>(data) + i * stride; }
  SIRIUS_ANYWHERE const void* lower_row(int i) const { return static_cast<const char*>(lower) + i * lower_stride; }
  // Rows first to first + count - 1 of one that has `data`.
  Matrix part(int first, int count) const {
    Matrix out = *this;
    out.data = row(first);
    if (lower) out.lower = lower_row(first);
    out.rows = count;
    return out;
  }
  SIRIUS_ANYWHERE int neuron(int row) const { return neuron_of ? neuron_of[row] : row; }
  Place place(int i) const { return {places ? places[i] + place_at : row(i), lower ? lower_row(i) : nullptr}; }
  RowForm form(int group = 0) const { return {cols, shared, group}; }
};

// A matrix with an optional bias.
struct Projection {
  Matrix weight;               // [rows, in]
  const void* bias = nullptr;  // T [rows] or null
};

// softcap(v) is c * tanh(v / c) if c is not 0, and v otherwise.
// out[m, :] = softcap(scale * concat_i(parts[i].weight x[m] + parts[i].bias)) + residual[m, :]
struct LinearParams {
  Dtype dtype;
  const void* x;  // T [num_rows, in]
  Projection parts[3];
  int num_parts;                   // their outputs stand side by side
  const void* residual = nullptr;  // T [num_rows, out] or null; may be `out`
  void* out;                       // T [num_rows, out], or float if out_f32
  bool out_f32 = false;
  float scale = 1.0f, softcap = 0.0f;
  int num_rows, out_features;
  int out_stride = 0;  // (CPU) from one row of `out` to the next; 0: out_features
};

// Rounds rows of numbers to a matrix's format. A group of weights that are not all finite gets a scale that is not.
struct PackParams {
  Dtype dtype;
  const void* x;  // T [rows, cols]
  Matrix out;     // its data is written
};

// out[r, c] = matrix[first_row + r, first_col + c], rounded. Where to begin is a multiple of 32.
struct UnpackParams {
  Dtype dtype;
  Matrix matrix;
  int first_row, num_rows, first_col, num_cols;
  void* out;  // T [num_rows, num_cols]
};

enum class Activation : int { silu = 0, gelu_tanh = 1 };

// hidden[m, i] = act(gate[n_i] . x[m]) * (up[n_i] . x[m]). Matrices of two formats are for `gate` and `up` (CUDA), which give the
// same bits.
struct GateUpParams {
  Dtype dtype;
  const void* x;                     // T [num_rows, hidden]
  Matrix gate, up;                   // [intermediate, hidden]; of one format (CUDA)
  const int32_t* neurons = nullptr;  // [num_neurons], or null for 0..num_neurons-1
  bool settled = false;              // (CUDA) no kernel writes them that may run beside this one's beginning
  void* out;                         // T [num_rows, num_neurons]
  Activation activation = Activation::silu;
  int num_rows, num_neurons;
};

// out[m, n_i] = act(gate[n_i] . x[m]), not rounded: what FSparse and the cascade choose from, and `up` multiplies with. The
// values stand at their neurons' places, so that whoever reads them needs no list but that of the neurons it wants; those of
// neurons that are not listed stay what they are.
struct GateParams {
  Dtype dtype;
  const void* x;                     // T [num_rows, hidden]
  Matrix gate;                       // [intermediate, hidden]
  const int32_t* neurons = nullptr;  // [num_neurons], or null for 0..num_neurons-1
  bool settled = false;              // (CUDA) as in GateUpParams
  float* out;                        // [num_rows, intermediate]
  Activation activation = Activation::silu;
  int num_rows, num_neurons;
};

// Of the candidates those of largest score_i = weights_i * sum_m |values[m, i]|, in rising order: `kept` of them, the lower index
// first among equals; or where `threshold` is not null all with score_i >= num_rows * threshold.
struct SelectParams {
  Dtype dtype = Dtype::f32;          // of `taken`
  const float* values;               // [num_rows, intermediate]: gates, or z, at their neurons' places
  const int32_t* among = nullptr;    // [candidates], rising; or null for all `intermediate`
  const float* weights = nullptr;    // [intermediate], at least 0; or null for 1
  const float* threshold = nullptr;  // [1] or null
  int32_t* neurons;                  // [candidates]; not `among`
  int32_t* count;                    // [1]: how many neurons were written
  void* taken = nullptr;             // T [num_rows, kept], gets the values of the neurons chosen; or null. Not with a threshold
  const int32_t* alive = nullptr;    // [1] (CUDA): only so many of the rows count; or null for all
  int num_rows, intermediate, candidates, kept = 0;
};

// A set that follows the text. For each of `count` rows of z, in order, statistic_i becomes
// decay * statistic_i + (1 - decay) * z_i^2 / ||z||^2; then the neurons of largest statistic_i * down_squares_i are listed, in
// rising order, the lower index first among equals.
struct FollowParams {
  Dtype dtype;
  const void* z;                      // T [layers, num_rows, intermediate]: act(gate x) * (up x)
  const int32_t* rows;                // [count], or with count_at [num_rows]
  const int32_t* count_at = nullptr;  // [1] (CUDA), in place of count
  const int32_t* fault = nullptr;     // [1] (CUDA): where it is not 0, statistic and neurons stay what they were
  const float* down_squares;          // [layers, intermediate]: ||down_i||^2
  float* statistic;                   // [layers, intermediate]
  int32_t* neurons;                   // [layers, kept]
  float decay;
  int layers, num_rows, intermediate, kept, count = 0;
};

// hidden[m, i] = gates[m, n_i] * (up[n_i] . x[m]); with `spread` it stands at its neuron's place, as in GateParams.
struct UpParams {
  Dtype dtype;
  const void* x;                            // T [num_rows, hidden]
  Matrix up;                                // [intermediate, hidden]
  const float* gates;                       // [num_rows, intermediate]
  const int32_t* neurons = nullptr;         // [num_neurons], or null for 0..num_neurons-1
  const int32_t* num_neurons_at = nullptr;  // [1] (CUDA), at most num_neurons, which is then the row length of `out`
  void* out;                                // T [num_rows, num_neurons]; with spread float [num_rows, intermediate], not rounded
  bool spread = false;
  int num_rows, num_neurons;
};

// out[m, :] = scale * sum_i x[m, i] * down[n_i, :] + residual[m, :]
struct DownParams {
  Dtype dtype;
  const void* x;                            // T [num_rows, num_neurons]
  Matrix down;                              // [intermediate, hidden]: down_proj transposed
  const int32_t* neurons = nullptr;         // [num_neurons] or null
  const int32_t* num_neurons_at = nullptr;  // [1] (CUDA), as in UpParams
  bool settled = false;                     // (CUDA) neither the neurons nor their number: as in GateUpParams
  const void* residual = nullptr;           // T [num_rows, hidden] or null; may be `out`
  void* out;                                // T [num_rows, hidden]
  float* workspace;                         // [down_workspace(...)]
  float scale = 1.0f;
  int num_rows, num_neurons;
};

// RMSNorm's weights: a row is multiplied by weight + offset, where the offset is 0 or, as in Gemma, 1. No weight: no norm.
struct Norm {
  const void* weight;  // T [width of a row] or null
  float eps, offset = 0.0f;
};

// out[m, :] = x[m] / sqrt(mean(x[m]^2) + eps) * (weight + offset) + residual[m, :]
struct RmsNormParams {
  Dtype dtype;
  const void* x;  // T [num_rows, hidden]
  Norm norm;
  const void* residual = nullptr;  // T [num_rows, hidden] or null; may be `out`
  void* out;                       // T [num_rows, hidden]; may be `x`
  int num_rows, hidden;
};

// Shape of one layer's key/value cache: T [kv_heads, capacity, head_dim] each.
struct CacheShape {
  int kv_heads, capacity, head_dim;
};

// Normalises the heads of q and k if there are weights for that, rotates them (half-split pairs) and writes k and v into the
// cache. Of each head the first rotary_dim elements are rotated, element d with element d + rotary_dim / 2; 0 leaves all as they
// are.
struct RopeParams {
  Dtype dtype;
  void* qkv;                       // T [num_rows, (heads + 2 * kv_heads) * head_dim]; the q part is changed in place
  Norm q_norm = {}, k_norm = {};   // over each head; T [head_dim] or null
  const float* cos;                // [max_position, rotary_dim / 2]
  const float* sin;                // [max_position, rotary_dim / 2]
  const int32_t* positions;        // [num_rows]
  const int32_t* slots = nullptr;  // [num_rows], or null for first_slot + row
  int first_slot = 0;
  const int32_t* base = nullptr;  // [1] (CUDA), added to positions and slots
  void *k_cache, *v_cache;
  CacheShape cache;
  int num_rows, heads, rotary_dim;
};

// Row m attends to slots [0, prefix) and to slot prefix + b for every set bit b of mask[m]. With a window only to those of them
// whose position is more than positions[m] - window: a prefix slot's position is its number, and the others are the row's last
// ones, whose positions are in the window in any case (a tree is less deep than the window).
// Scores are softcap(scale * q . k), as in LinearParams.
struct AttentionParams {
  Dtype dtype;
  const void* q;  // T [num_rows, heads, head_dim], rows q_stride apart
  int q_stride;
  const void *k_cache, *v_cache;
  CacheShape cache;
  int prefix = 0;
  const int32_t* base = nullptr;  // [1] (CUDA), added to prefix and positions
  const uint64_t* mask;           // [num_rows, mask_words]
  int mask_words;
  const int32_t* positions = nullptr;  // [num_rows]; may be null if there is no window
  int window = 0;                      // 0: none
  void* out;                           // T [num_rows, heads, head_dim]
  float* workspace;                    // [attention_workspace(...)]
  float scale = 1.0f, softcap = 0.0f;
  int num_rows, heads;
};

// bit b of mask[i] is set when node b is i or an ancestor of i.
struct TreeMaskParams {
  const int32_t* parents;  // [num_nodes]; -1 for the root, else smaller than the node's own index
  uint64_t* mask;          // [num_nodes, mask_words]
  int num_nodes, mask_words;
};

// Every leaf proposes its `width` likeliest tokens; of all proposals the `width` of largest cumulative log-likelihood stay. A
// leaf with a logit that is NaN or plus infinity proposes nothing, nor does one all of whose logits are minus infinity.
struct TreeExpandParams {
  const float* logits;  // [num_leaves, vocab]
  const float* scores;  // [num_leaves]: cumulative log-likelihoods
  float score_temperature;
  float prune;               // a leaf whose best token is likelier than this proposes no other
  int32_t* tokens;           // [width], likeliest first; so are the next two
  int32_t* parents;          // [width]: the leaf's row
  float* new_scores;         // [width]
  int32_t* count;            // [1]: how many there are
  int32_t* candidates;       // [num_leaves, width]: workspace, as is the next one
  float* likelihoods;        // [num_leaves, width]: logarithms, -inf where there is no candidate
  int32_t* fault = nullptr;  // [1] (CUDA): see csrc/cuda/ops.h
  int num_leaves, vocab, width;
};

// A tree's acceptance. Node 0 is committed already; drafts[i - 1] is node i's token, proposed after row parents[i].
struct AcceptParams {
  const float* logits;               // [num_rows, vocab]
  const int32_t* drafts;             // [num_rows - 1]
  const int32_t* parents = nullptr;  // [num_rows], parents[i] < i; or null: a chain
  const float* scores = nullptr;  // [num_rows]: cumulative log-likelihoods, to choose among equally long runs; null for a chain
  float threshold, score_temperature;
  bool match;          // accept only the argmax; threshold is not used
  float* likelihoods;  // [num_rows - 1]
  int32_t* argmax;     // [num_rows]; -1 where a logit is NaN or plus infinity, or all are minus infinity. What follows such a row
                       // is not accepted, and its likelihood is NaN
  int32_t* path;       // [num_rows - 1]: the nodes of the accepted run, from the first on
  int32_t* accepted;   // [1]: the run's length
  float* workspace;    // [2, num_rows]
  const int32_t* limit = nullptr;  // [1] (CUDA): the longest run to accept
  int32_t* fault = nullptr;        // [1] (CUDA): see csrc/cuda/ops.h
  int num_rows, vocab;
};

// argmax[i] of logits[i, :], the first of equals; -1 where a logit is not finite.
struct ArgmaxParams {
  const float* logits;           // [num_rows, vocab]
  int32_t* argmax;               // [num_rows]
  float* likelihoods = nullptr;  // [num_rows] (CUDA): softmax(logits / score_temperature) of the argmax; NaN where that is -1
  float score_temperature = 1.0f;
  int num_rows, vocab;
};

// Moves the entries of slots start + path[i] to slots start + i, in every layer and head.
struct KvRewriteParams {
  Dtype dtype;
  void *k_cache, *v_cache;             // T [layers, kv_heads, capacity, head_dim]
  const int32_t* path;                 // [length], strictly increasing
  const int32_t* base = nullptr;       // [1] (CUDA), added to start
  const int32_t* length_at = nullptr;  // [1] (CUDA), in place of length
  CacheShape cache;
  int layers, start, length = 0;
};

// A decoder layer of any family: x += after_attention(attention(before_attention(x))), then x += after_mlp(mlp(before_mlp(x))).
// A norm without a weight is left out. models/families.py says which family has what.
struct LayerWeights {
  Norm before_attention = {}, after_attention = {}, before_mlp = {}, after_mlp = {};  // T [hidden]
  Norm q_norm = {}, k_norm = {};                                                      // T [head_dim]
  Projection qkv[3];      // rows: heads, kv_heads, kv_heads times head_dim
  Projection output;      // [hidden, heads * head_dim]
  Matrix gate, up, down;  // [intermediate, hidden] each
  int window = 0;         // of attention, in tokens; 0: none
  int rope = 0;           // which of the tables of angles; -1: no rotation
};

struct ModelWeights {
  Dtype dtype;
  Matrix embedding;      // [vocab, hidden]
  Norm final_norm = {};  // T [hidden]
  Matrix lm_head;        // [vocab, hidden]
  const LayerWeights* layers;
  int num_layers, hidden, intermediate, vocab, heads, kv_heads, head_dim, rotary_dim;
  Activation activation = Activation::silu;
  float embedding_scale = 1.0f;  // of a token's embedding, rounded to T after it
  float residual_scale = 1.0f;   // of what attention and MLP add to x where no norm stands after them
  float attention_scale = 1.0f, attention_softcap = 0.0f;
  float logit_scale = 1.0f, logit_softcap = 0.0f;
  cpu::Stream* stream = nullptr;  // (CPU) where weights come from as they are read; or null: they are there
  int head_rows = 0;              // of the LM head that come at a time, like a layer more; 0: it is there
};

// Which neurons a pass uses. `dense` all; `listed` the given ones; `largest` the `kept` of largest |act(gate x)|; `threshold`
// all whose mean |act(gate x)| over the rows reaches the layer's threshold; `cascade` the given ones in gate, of these the
// kept_up of largest |act(gate x)| * ||down|| in up, and of these the kept_down of largest |z| * ||down|| in down.
struct Sparsity {
  enum Kind : int { dense, listed, largest, threshold, cascade } kind;
  const int32_t* neurons = nullptr;   // [layers, kept], if listed or cascade
  const float* thresholds = nullptr;  // [layers], if threshold
  int kept = 0;                       // if listed, largest or cascade
  const float* down_norms = nullptr;  // [layers, intermediate], if cascade: ||down_i||
  int kept_up = 0, kept_down = 0;     // if cascade
};

// A set that follows the text while F's neurons stream by: those that it will most likely have after the pass are kept. Fields
// are FollowParams'; all rows count.
struct Watch {
  const float* statistic = nullptr;  // or null: nothing is kept
  const float* down_squares = nullptr;
  float decay = 0.0f;
};

// One pass of num_rows tokens through every layer. Row m's key and value go to cache slot first_slot + m; what it sees is as in
// AttentionParams.
struct DecodeStepParams {
  const ModelWeights* model;
  const int32_t* tokens;     // [num_rows]
  const int32_t* positions;  // [num_rows]
  const float *cos, *sin;    // [tables, max_position, rotary_dim / 2]
  int max_position;
  const uint64_t* mask;  // [num_rows, mask_words]
  int mask_words;
  void *k_cache, *v_cache;  // T [layers, kv_heads, capacity, head_dim]
  Sparsity sparsity;
  float* logits;              // [num_rows, vocab]
  int32_t* argmax = nullptr;  // [num_rows], or null; -1 where a logit is not finite
  void* workspace;            // [decode_workspace(...)] bytes
  void* z = nullptr;          // T [layers, num_rows, intermediate]: gets act(gate x) * (up x) of a dense pass; or null
  Watch watch = {};           // (CPU) of a dense pass with z
  int num_rows, first_slot, prefix = 0, capacity;
};

}  // namespace sirius
