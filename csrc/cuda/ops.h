// The CUDA backend's ops, launched on a stream. None checks its arguments, allocates or waits: all can be captured in a graph.
// Addresses are the device's. What a replayed graph must see change is read from device memory. The workspaces of params.h and
// TreeExpandParams' candidates and likelihoods are the CPU's; each op here has a `Workspace`, whether it needs one or not.
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

// Rows of input are normalised on the way in by `norm`, if it has a weight. Each weight is read once for every 16 rows of input.
void linear(const LinearParams& p, const Norm& norm, Workspace workspace, StreamHandle stream);
void gate_up(const GateUpParams& p, const Norm& norm, Workspace workspace, StreamHandle stream);
void gate(const GateParams& p, const Norm& norm, Workspace workspace, StreamHandle stream);
void up(const UpParams& p, const Norm& norm, Workspace workspace, StreamHandle stream);

// So are these weights.
void down(const DownParams& p, Workspace workspace, StreamHandle stream);
size_t down_workspace(int num_rows, int hidden, int num_neurons);

void select(const SelectParams& p, Workspace workspace, StreamHandle stream);
size_t select_workspace(int candidates);
// The same for several sets of at most kRowsAlone rows each, by number among all neurons and without weights: values [sets,
// num_rows, intermediate], neurons [sets, kept]. p.count and p.taken are null.
void select_each(const SelectParams& p, int sets, Workspace workspace, StreamHandle stream);

void follow(const FollowParams& p, Workspace workspace, StreamHandle stream);
size_t follow_workspace(int layers, int num_rows, int intermediate);

void rms_norm(const RmsNormParams& p, Workspace workspace, StreamHandle stream);

void rope_kv_write(const RopeParams& p, Workspace workspace, StreamHandle stream);

// Both in one: qkv's products are rotated, k and v written to the cache. qkv's three parts are those of q, k and v, without scale
// or softcap; rope.qkv gets q only, T [num_rows, heads * head_dim]. Heads are not normalised.
void qkv_rope_kv_write(const LinearParams& qkv, const RopeParams& rope, const Norm& norm, Workspace workspace,
                       StreamHandle stream);

void tree_mask(const TreeMaskParams& p, Workspace workspace, StreamHandle stream);

// Slots up to the cache's capacity are provided for.
void tree_attention(const AttentionParams& p, Workspace workspace, StreamHandle stream);
size_t attention_workspace(int num_rows, int heads, int head_dim, int capacity);

// A leaf whose score is -inf proposes nothing. What stands from *p.count on: tokens and parents 0, scores -inf.
// With p.fault the logits are the model's own, so that minus infinity is a fault too, and it becomes 1 if there is one after a
// leaf whose score is not -inf.
void tree_expand(const TreeExpandParams& p, Workspace workspace, StreamHandle stream);
size_t tree_expand_workspace(int num_leaves, int vocab, int width);

// With p.limit, a node whose score is -inf counts as not drafted.
// p.fault: as in tree_expand; a draft of -1, which is argmax's, is a fault too. Nodes that were not drafted have none.
void accept(const AcceptParams& p, Workspace workspace, StreamHandle stream);
size_t accept_workspace(int num_rows, int vocab);

// The workspace is that of accept.
void argmax(const ArgmaxParams& p, Workspace workspace, StreamHandle stream);

void kv_rewrite(const KvRewriteParams& p, Workspace workspace, StreamHandle stream);

// out[m, :] = scale * table[tokens[m], :]; of row 0 where a token is -1.
struct EmbedParams {
  Dtype dtype;
  Matrix table;           // [vocab, hidden]
  const int32_t* tokens;  // [num_rows]
  void* out;              // T [num_rows, hidden]
  float scale;
  int num_rows;
};
void embed(const EmbedParams& p, Workspace workspace, StreamHandle stream);

// A tree's new depth: nodes first .. first + width - 1, whose parents are the leaves leaves + rows[i].
struct GrowParams {
  const int32_t* rows;          // [width]
  int32_t* parents;             // [nodes]
  uint64_t* mask;               // [nodes, mask_words]; see TreeMaskParams
  const float* scores;          // [nodes]: tree_expand's, -inf where a place stays empty
  float* confidence = nullptr;  // [1]: the largest likelihood of a new node after its parent, 0 if there is none; or null
  int first, leaves, width, mask_words;
};
void grow(const GrowParams& p, Workspace workspace, StreamHandle stream);

// The end of a period: the accepted run and F's own token join the text, and the state is made ready for the next period.
struct AdvanceParams {
  const int32_t* accepted;  // [1]
  const int32_t* argmax;    // [nodes]: F's
  int32_t* path;            // [depth + 1]; after the first place, the accepted run. The first becomes 0, the root
  int32_t* tokens;          // [nodes]; the first becomes F's own token
  int32_t* length;          // [1]: tokens in the cache
  int32_t* remaining;       // [1]: tokens that the text may still take
  int32_t* limit;           // [1]: longest run to accept; becomes the next period's, min(depth, remaining - 1)
  int32_t* used_limit;      // [1]: this period's
  int32_t* root;            // [1]: becomes the length before, where this period's root stands
  int32_t* kept;            // [1]: becomes the entries to keep, the root's included
  int depth;
};
void advance(const AdvanceParams& p, Workspace workspace, StreamHandle stream);

// Whether S drafts on: asked before each of a period's passes of S, from the first on, which empties the tree. A token more must
// be expected to bring what it must be worth: `reach`, how likely all drafts before arrive, times `mean`, against `worth[depth]`
// (decoding/period.py, which draws the same conclusions from the same numbers). Once the answer is no it stays so.
struct StopParams {
  const double* rule;        // [1 + edges + (edges + 1) + depths]: mean; edges of confidence; acceptances between them; worth
  const float* confidences;  // [depths]: S's, of the depths before
  double* reach;             // [1]
  int32_t* goes_on;          // [1]: the answer
  int32_t* counts;           // [depths]: nodes that were drafted; a chain's are written here
  float* scores;             // [1 + depths * width]: -inf where nothing is drafted; of a chain 0 elsewhere
  int64_t condition = 0;     // takes the answer too, if it is not 0: see stop.h
  int edges, depth, depths, width;
};
void stop(const StopParams& p, Workspace workspace, StreamHandle stream);

// Where a sparse model finds the neurons of a layer that are not all on the device (weight_stream.h). Rows are what it takes for
// neurons: of them the first ones are the neurons of their own numbers, for good, and the others slots.
struct HeldLayer {
  const char* from;  // in pinned host memory, where neuron 0 would be: neurons from `first` on are there
  char* data;        // of row 0
  int64_t bundle;    // bytes of a neuron, a multiple of 16, and from one row to the next
  int64_t first;     // the first slot
};

// Has every layer's listed neurons in rows of the sparse model: those that are in none are copied to slots whose neurons are not
// listed, of which there must be enough. Weights that come so are written by a kernel: who reads them before it waits for the
// kernel before may not come right after this.
struct HoldParams {
  const int32_t* neurons;          // [layers, kept]
  const HeldLayer* held;           // [layers]
  int32_t* row_of;                 // [layers, intermediate]: the row of each neuron; -1: none
  int32_t* neuron_of;              // [layers, rows]: of each row; -1: none
  int32_t* listed_rows;            // [layers, kept]: gets the rows of the listed neurons
  int32_t* taken;                  // [layers, rows]: workspace; the slots that are copied to come first
  int32_t* count;                  // [layers]: gets how many these are
  const float* weights = nullptr;  // [layers, intermediate] or null
  float* row_weights = nullptr;    // [layers, rows]: gets the weights of the listed neurons, if there are any
  int layers, intermediate, rows, kept;
};
void hold(const HoldParams& p, Workspace workspace, StreamHandle stream);

// Fills one layer's image for the full model, from its resident bytes on: of neurons that have a row from there, of the others
// from pinned host memory.
struct FillParams {
  const HeldLayer* held;  // of the layer
  const int32_t* row_of;  // [intermediate]: see HoldParams
  char* image;            // of neuron 0
  int64_t resident;       // bytes, a multiple of 16
  int intermediate;
};
void fill(const FillParams& p, StreamHandle stream);

class WeightStream;

// What a pass reads from device memory when it is replayed, and where gate, up and down come from as it reads them; null: they
// are there. So does the head, if the model says so (head_rows).
struct Pass {
  const int32_t* base = nullptr;   // [1], added to positions, first_slot and prefix; or null
  const int32_t* alive = nullptr;  // [1], rows that count where a pass chooses its neurons; or null for all
  int32_t* counters;               // [kCounters]
  WeightStream* weights = nullptr;
  bool all_streams = false;  // those of attention come from there, too
  bool z_in_host = false;    // what p.z gets is copied there, over a link
};
// p.num_rows at most 16. p.argmax may be null. p.workspace: bytes.
void decode_step(const DecodeStepParams& p, const Pass& pass, StreamHandle stream);
size_t decode_workspace(const ModelWeights& model, int num_rows, int capacity);

}  // namespace sirius::cuda
