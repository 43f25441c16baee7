// The CUDA backend's ops, launched on a stream. None checks its arguments, allocates or waits: all can be captured in a graph.
// Addresses are the device's. What a replayed graph must see change is read from device memory.
#pragma once

#include <cstddef>

#include "../params.h"

namespace sirius::cuda {

using StreamHandle = void*;  // cudaStream_t

// What an op needs beside its outputs. floats: [the op's ..._workspace(...)], at a multiple of 16 bytes. counters: [kCounters],
// zero before the first op and after every op. Ops on one stream may share both.
struct Workspace {
  float* floats;
  int32_t* counters;
};
constexpr int kCounters = 4096;

// Rows of input are normalised on the way in (RMSNorm), if weight is not null.
struct Norm {
  const void* weight;  // T [width of a row]
  float eps;
};

// Of p.matrices the first one alone. Each weight is read once for every 16 rows of input, here and below.
void linear(const LinearParams& p, Norm norm, StreamHandle stream);
void gate_up(const GateUpParams& p, Norm norm, StreamHandle stream);
void gate(const GateParams& p, Norm norm, StreamHandle stream);

// num_neurons_at: [1], at most p.num_neurons, which is then the row length of p.out; or null for p.num_neurons.
void up(const UpParams& p, Norm norm, const int32_t* num_neurons_at, StreamHandle stream);
void down(const DownParams& p, const int32_t* num_neurons_at, Workspace workspace, StreamHandle stream);
size_t down_workspace(int num_rows, int hidden, int num_neurons);

// count: [1], the number of neurons written. alive: [1], only so many of p.num_rows rows count; or null for all of them.
void select(const SelectParams& p, int32_t* count, const int32_t* alive, Workspace workspace, StreamHandle stream);
size_t select_workspace(int num_rows, int intermediate);
// The same for several sets of at most kRowsAlone rows each, by number: gates [sets, num_rows, intermediate], neurons [sets,
// kept].
void select_each(const SelectParams& p, int sets, StreamHandle stream);

// What a replayed period knows of the rows that joined the sequence.
struct Joined {
  const int32_t* count;  // [1], in place of p.count and at most p.num_rows; or null
  const int32_t* fault;  // [1], with 1 no row counts, and the set stays what it was; or null
};
void follow(const FollowParams& p, const Joined& joined, Workspace workspace, StreamHandle stream);
size_t follow_workspace(int layers, int num_rows, int intermediate);

void rms_norm(const RmsNormParams& p, StreamHandle stream);

// base: [1], added to positions and slots; or null for 0.
void rope_kv_write(const RopeParams& p, const int32_t* base, StreamHandle stream);

// q, k and v of normalised rows, rotated, k and v written to the cache: LinearParams and RopeParams in one.
// p.qkv gets q only, T [num_rows, heads * head_dim].
struct QkvParams {
  const void* x;     // T [num_rows, hidden]
  Matrix matrix[3];  // q, k and v
  int hidden;
};
void qkv_rope_kv_write(const QkvParams& p, const RopeParams& rope, Norm norm, const int32_t* base, StreamHandle stream);

void tree_mask(const TreeMaskParams& p, StreamHandle stream);

// base: [1], added to p.prefix; or null for 0. Slots up to the cache's capacity are provided for.
void tree_attention(const AttentionParams& p, const int32_t* base, Workspace workspace, StreamHandle stream);
size_t attention_workspace(int num_rows, int heads, int head_dim, int capacity);

// A leaf whose score is -inf proposes nothing. What stands from *p.count on: tokens and parents 0, scores -inf.
// p.candidates and p.likelihoods are not used.
// fault: [1] or null. With it the logits are the model's own, so that minus infinity is a fault too, and it becomes 1 if there is
// one behind a leaf whose score is not -inf.
void tree_expand(const TreeExpandParams& p, int32_t* fault, Workspace workspace, StreamHandle stream);
size_t tree_expand_workspace(int num_leaves, int vocab, int width);

// limit: [1], the longest run to accept; or null for any length. With a limit, a node whose score is -inf counts as not drafted.
// fault: as in tree_expand; a draft of -1, which is argmax's, is a fault too. Nodes that were not drafted have none.
// p.workspace is not used.
void accept(const AcceptParams& p, const int32_t* limit, int32_t* fault, Workspace workspace, StreamHandle stream);
size_t accept_workspace(int num_rows, int vocab);

// argmax[i] of logits[i, :], the first of equals; -1 where a logit is not finite. The workspace is that of accept.
void argmax(const float* logits, int num_rows, int vocab, int32_t* argmax, Workspace workspace, StreamHandle stream);

// base: [1], added to p.start; or null for 0. length: [1], in place of p.length; or null.
void kv_rewrite(const KvRewriteParams& p, const int32_t* base, const int32_t* length, StreamHandle stream);

void embed(Dtype dtype, const void* table, const int32_t* tokens, int num_rows, int hidden, void* out, StreamHandle stream);

// A tree's new depth: nodes first .. first + width - 1, whose parents are the leaves leaves + rows[i].
struct GrowParams {
  const int32_t* rows;  // [width]
  int32_t* parents;     // [nodes]
  uint64_t* mask;       // [nodes, mask_words]; see TreeMaskParams
  int first, leaves, width, mask_words;
};
void grow(const GrowParams& p, StreamHandle stream);

// The end of a period: the accepted run and F's own token join the text, and the state is made ready for the next period.
struct AdvanceParams {
  const int32_t* accepted;  // [1]
  const int32_t* argmax;    // [nodes]: F's
  int32_t* path;            // [depth + 1]; behind the first place, the accepted run. The first becomes 0, the root
  int32_t* tokens;          // [nodes]; the first becomes F's own token
  int32_t* length;          // [1]: tokens in the cache
  int32_t* remaining;       // [1]: tokens that the text may still take
  int32_t* limit;           // [1]: longest run to accept; becomes the next period's, min(depth, remaining - 1)
  int32_t* used_limit;      // [1]: this period's
  int32_t* root;            // [1]: becomes the length before, where this period's root stands
  int32_t* kept;            // [1]: becomes the entries to keep, the root's included
  int depth;
};
void advance(const AdvanceParams& p, StreamHandle stream);

// What a pass reads from device memory when it is replayed.
struct Pass {
  const int32_t* base;   // [1], added to positions, first_slot and prefix; or null
  const int32_t* alive;  // [1], rows that count in FSparse's choice; or null for all
  int32_t* counters;     // [kCounters]
};
// p.num_rows at most 16. p.argmax may be null. p.workspace: bytes.
void decode_step(const DecodeStepParams& p, const Pass& pass, StreamHandle stream);
size_t decode_workspace(const ModelWeights& model, int num_rows, int capacity);

}  // namespace sirius::cuda
