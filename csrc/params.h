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

// A chain's acceptance. drafts[j - 1] was proposed after row j - 1.
struct AcceptParams {
  const float* logits;    // [num_rows, vocab]
  const int32_t* drafts;  // [num_rows - 1]
  float threshold, score_temperature;
  bool match;          // accept only the argmax; threshold is not used
  float* likelihoods;  // [num_rows - 1]
  int32_t* argmax;     // [num_rows]
  int32_t* accepted;   // [1]: length of the accepted run
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
  const int32_t* neurons;   // [layers, neuron_stride], or null: dense
  int neuron_stride;
  const int32_t* num_neurons;  // [layers] or null
  float* logits;               // [num_rows, vocab]
  int32_t* argmax;             // [num_rows]
  void* workspace;             // [decode_workspace(...)] bytes
  int num_rows, first_slot, prefix, capacity;
};

}  // namespace sirius
