// The CPU backend's ops. Each is called by every thread of a team (team.h); none checks its arguments.
#pragma once

#include "../params.h"

namespace sirius::cpu {

void linear(const LinearParams& p);
void pack(const PackParams& p);
void unpack(const UnpackParams& p);
void gate_up(const GateUpParams& p);
void gate(const GateParams& p);
void follow_layer(const FollowParams& p, int layer);  // one of its layers, by one thread
void select(const SelectParams& p);                   // for one thread; wherever several need the list, each makes its own
void follow(const FollowParams& p);
void up(const UpParams& p);
void down(const DownParams& p);  // synchronizes inside
void rms_norm(const RmsNormParams& p);
void rope_kv_write(const RopeParams& p);
void tree_mask(const TreeMaskParams& p);
void tree_attention(const AttentionParams& p);  // synchronizes inside
void tree_expand(const TreeExpandParams& p);    // synchronizes inside
void accept(const AcceptParams& p);             // synchronizes inside
void argmax(const ArgmaxParams& p);
void kv_rewrite(const KvRewriteParams& p);
// With so many threads. What the model's stream throws.
void decode_step(const DecodeStepParams& p, int threads);

// Sizes of the workspaces, for up to `slots` cache slots seen by a row.
size_t down_workspace(int num_rows, int hidden, int num_neurons);              // floats
size_t attention_workspace(int num_rows, int heads, int head_dim, int slots);  // floats
size_t decode_workspace(const ModelWeights& model, int num_rows, int slots);   // bytes

}  // namespace sirius::cpu
