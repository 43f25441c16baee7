// One plain struct per op: pointers, sizes, strides in elements. No ownership, no Python, no torch.
// T stands for the model's element type (`dtype`); everything else is spelled out.
#pragma once

#include <cstdint>

#include "types.h"

namespace sirius {

// Rows of one weight matrix, stored neuron by neuron, with an optional bias.
struct Matrix {
  const void* weight;  // T [rows, in]
  const void* bias;    // T [rows] or null
  int rows;
};

// out[m, :] = concat_i(matrices[i].weight x[m] + matrices[i].bias) + residual[m, :]
struct LinearParams {
  Dtype dtype;
  const void* x;           // T [num_rows, in]
  const Matrix* matrices;  // [num_matrices]; their outputs stand side by side
  int num_matrices;
  const void* residual;  // T [num_rows, out] or null; may be `out`
  void* out;             // T [num_rows, out], or float if out_f32
  bool out_f32;
  int num_rows, in, out_features;
};

// hidden[m, i] = silu(gate[n_i] . x[m]) * (up[n_i] . x[m])
struct GateUpParams {
  Dtype dtype;
  const void* x;           // T [num_rows, hidden]
  const void* gate;        // T [intermediate, hidden]
  const void* up;          // T [intermediate, hidden]
  const int32_t* neurons;  // [num_neurons], or null for 0..num_neurons-1
  void* out;               // T [num_rows, num_neurons]
  int num_rows, hidden, num_neurons;
};

// out[m, i] = silu(gate[i] . x[m]), not rounded: what FSparse chooses from, and `up` multiplies with.
struct GateParams {
  Dtype dtype;
  const void* x;     // T [num_rows, hidden]
  const void* gate;  // T [intermediate, hidden]
  float* out;        // [num_rows, intermediate]
  int num_rows, hidden, intermediate;
};

// The neurons of largest score_i = sum_m |gates[m, i]|, in rising order: `kept` of them, the lower index first among equals; or
// where `threshold` is not null all with score_i >= num_rows * threshold.
struct SelectParams {
  const float* gates;      // [num_rows, intermediate]
  const float* threshold;  // [1] or null
  int32_t* neurons;        // [intermediate]
  int num_rows, intermediate, kept;
};

// A set that follows the text. For each of `count` rows of z, in order, statistic_i becomes
// decay * statistic_i + (1 - decay) * z_i^2 / ||z||^2; then the neurons of largest statistic_i * down_squares_i are listed, in
// rising order, the lower index first among equals.
struct FollowParams {
  Dtype dtype;
  const void* z;              // T [layers, num_rows, intermediate]: silu(gate x) * (up x)
  const int32_t* rows;        // [count]
  const float* down_squares;  // [layers, intermediate]: ||down_i||^2
  float* statistic;           // [layers, intermediate]
  int32_t* neurons;           // [layers, kept]
  float decay;
  int layers, num_rows, intermediate, kept, count;
};

// hidden[m, i] = gates[m, n_i] * (up[n_i] . x[m])
struct UpParams {
  Dtype dtype;
  const void* x;           // T [num_rows, hidden]
  const void* up;          // T [intermediate, hidden]
  const float* gates;      // [num_rows, intermediate]
  const int32_t* neurons;  // [num_neurons]
  void* out;               // T [num_rows, num_neurons]
  int num_rows, hidden, intermediate, num_neurons;
};

// out[m, :] = sum_i x[m, i] * down[n_i, :] + residual[m, :]
struct DownParams {
  Dtype dtype;
  const void* x;           // T [num_rows, num_neurons]
  const void* down;        // T [intermediate, hidden]: down_proj transposed
  const int32_t* neurons;  // [num_neurons] or null
  const void* residual;    // T [num_rows, hidden] or null; may be `out`
  void* out;               // T [num_rows, hidden]
  float* workspace;        // [down_workspace(...)]
  int num_rows, hidden, num_neurons;
};

// With a residual: residual += x (in place) and the sum is normalised.
struct RmsNormParams {
  Dtype dtype;
  const void* x;       // T [num_rows, hidden]
  const void* weight;  // T [hidden]
  void* residual;      // T [num_rows, hidden] or null
  void* out;           // T [num_rows, hidden]
  float eps;
  int num_rows, hidden;
};

// Shape of one layer's key/value cache: T [kv_heads, capacity, head_dim] each.
struct CacheShape {
  int kv_heads, capacity, head_dim;
};

// Rotates q and k (half-split pairs) and writes k and v into the cache.
struct RopeParams {
  Dtype dtype;
  void* qkv;                 // T [num_rows, (heads + 2 * kv_heads) * head_dim]; the q part is rotated in place
  const float* cos;          // [max_position, head_dim / 2]
  const float* sin;          // [max_position, head_dim / 2]
  const int32_t* positions;  // [num_rows]
  const int32_t* slots;      // [num_rows], or null for first_slot + row
  int first_slot;
  void *k_cache, *v_cache;
  CacheShape cache;
  int num_rows, heads;
};

// Row m attends to slots [0, prefix) and to slot prefix + b for every set bit b of mask[m].
struct AttentionParams {
  Dtype dtype;
  const void* q;  // T [num_rows, heads, head_dim], rows q_stride apart
  int q_stride;
  const void *k_cache, *v_cache;
  CacheShape cache;
  int prefix;
  const uint64_t* mask;  // [num_rows, mask_words]
  int mask_words;
  void* out;         // T [num_rows, heads, head_dim]
  float* workspace;  // [attention_workspace(...)]
  float scale;
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
  float prune;          // a leaf whose best token is likelier than this proposes no other
  int32_t* tokens;      // [width], likeliest first; so are the next two
  int32_t* parents;     // [width]: the leaf's row
  float* new_scores;    // [width]
  int32_t* count;       // [1]: how many there are
  int32_t* candidates;  // [num_leaves, width]: workspace, as is the next one
  float* likelihoods;   // [num_leaves, width]: logarithms, -inf where there is no candidate
  int num_leaves, vocab, width;
};

// A tree's acceptance. Node 0 is committed already; drafts[i - 1] is node i's token, proposed after row parents[i].
struct AcceptParams {
  const float* logits;     // [num_rows, vocab]
  const int32_t* drafts;   // [num_rows - 1]
  const int32_t* parents;  // [num_rows], parents[i] < i; or null: a chain
  const float* scores;     // [num_rows]: cumulative log-likelihoods, to choose among equally long runs; null for a chain
  float threshold, score_temperature;
  bool match;          // accept only the argmax; threshold is not used
  float* likelihoods;  // [num_rows - 1]
  int32_t* argmax;     // [num_rows]; -1 where a logit is NaN or plus infinity, or all are minus infinity. What follows such a row
                       // is not accepted, and its likelihood is NaN
  int32_t* path;       // [num_rows - 1]: the nodes of the accepted run, from the first on
  int32_t* accepted;   // [1]: the run's length
  float* workspace;    // [2, num_rows]
  int num_rows, vocab;
};

// Moves the entries of slots start + path[i] to slots start + i, in every layer and head.
struct KvRewriteParams {
  Dtype dtype;
  void *k_cache, *v_cache;  // T [layers, kv_heads, capacity, head_dim]
  const int32_t* path;      // [length], strictly increasing
  CacheShape cache;
  int layers, start, length;
};

struct LayerWeights {
  const void *input_norm, *post_norm;  // T [hidden]
  Matrix qkv[3];                       // rows: heads, kv_heads, kv_heads times head_dim
  Matrix output;                       // T [hidden, heads * head_dim]
  const void *gate, *up, *down;        // T [intermediate, hidden] each
};

struct ModelWeights {
  Dtype dtype;
  const void* embedding;   // T [vocab, hidden]
  const void* final_norm;  // T [hidden]
  const void* lm_head;     // T [vocab, hidden]
  const LayerWeights* layers;
  int num_layers, hidden, intermediate, vocab, heads, kv_heads, head_dim;
  float eps, attention_scale;
};

// Which neurons a pass uses. `dense` all; `listed` the given ones; `largest` the `kept` of largest |silu(gate x)|; `threshold`
// all whose mean |silu(gate x)| over the rows reaches the layer's threshold.
struct Sparsity {
  enum Kind : int { dense, listed, largest, threshold } kind;
  const int32_t* neurons;   // [layers, kept], if listed
  const float* thresholds;  // [layers], if threshold
  int kept;                 // if listed or largest
};

// One pass of num_rows tokens through every layer. Row m's key and value go to cache slot first_slot + m; what it sees is as in
// AttentionParams.
struct DecodeStepParams {
  const ModelWeights* model;
  const int32_t* tokens;     // [num_rows]
  const int32_t* positions;  // [num_rows]
  const float *cos, *sin;    // [max_position, head_dim / 2]
  const uint64_t* mask;      // [num_rows, mask_words]
  int mask_words;
  void *k_cache, *v_cache;  // T [layers, kv_heads, capacity, head_dim]
  Sparsity sparsity;
  float* logits;    // [num_rows, vocab]
  int32_t* argmax;  // [num_rows]; -1 where a logit is not finite
  void* workspace;  // [decode_workspace(...)] bytes
  void* z;          // T [layers, num_rows, intermediate]: gets silu(gate x) * (up x) of a dense pass; or null
  int num_rows, first_slot, prefix, capacity;
};

}  // namespace sirius
