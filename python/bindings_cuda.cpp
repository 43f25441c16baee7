// Each function takes what the CPU's of the same name takes, then a workspace, the counters and the stream in place of the
// threads.
#include "bindings_cuda.h"

#include <pybind11/stl.h>

#include <cstdint>

#include "../csrc/cuda/ops.h"
#include "weights.h"

namespace py = pybind11;
using namespace sirius;

namespace {

constexpr cuda::Norm no_norm{};

cuda::Workspace workspace_at(Address floats, Address counters) { return {at<float>(floats), at<int32_t>(counters)}; }

void linear(int dtype, Address x, Address weight, Address bias, Address residual, Address out, bool out_f32, int num_rows, int in,
            int out_features, Address, Address, Address stream) {
  const Matrix matrix{at(weight), at(bias), out_features};
  cuda::linear({Dtype(dtype), at(x), &matrix, 1, at(residual), at(out), out_f32, num_rows, in, out_features}, no_norm,
               at(stream));
}

void gate_up(int dtype, Address x, Address gate, Address up, Address neurons, Address out, int num_rows, int hidden,
             int num_neurons, Address, Address, Address stream) {
  cuda::gate_up({Dtype(dtype), at(x), at(gate), at(up), at<int32_t>(neurons), at(out), num_rows, hidden, num_neurons}, no_norm,
                at(stream));
}

void gate(int dtype, Address x, Address weight, Address out, int num_rows, int hidden, int intermediate, Address, Address,
          Address stream) {
  cuda::gate({Dtype(dtype), at(x), at(weight), at<float>(out), num_rows, hidden, intermediate}, no_norm, at(stream));
}

void up(int dtype, Address x, Address weight, Address gates, Address neurons, Address out, int num_rows, int hidden,
        int intermediate, int num_neurons, Address, Address, Address stream) {
  cuda::up({Dtype(dtype), at(x), at(weight), at<float>(gates), at<int32_t>(neurons), at(out), num_rows, hidden, intermediate,
            num_neurons},
           no_norm, nullptr, at(stream));
}

void down(int dtype, Address x, Address weight, Address neurons, Address residual, Address out, int num_rows, int hidden,
          int num_neurons, Address floats, Address counters, Address stream) {
  cuda::down(
      {Dtype(dtype), at(x), at(weight), at<int32_t>(neurons), at(residual), at(out), nullptr, num_rows, hidden, num_neurons},
      nullptr, workspace_at(floats, counters), at(stream));
}

void select_neurons(Address gates, Address threshold, Address neurons, Address count, int num_rows, int intermediate, int kept,
                    Address floats, Address counters, Address stream) {
  cuda::select({at<float>(gates), at<float>(threshold), at<int32_t>(neurons), num_rows, intermediate, kept}, at<int32_t>(count),
               nullptr, workspace_at(floats, counters), at(stream));
}

void rms_norm(int dtype, Address x, Address weight, Address residual, Address out, float eps, int num_rows, int hidden, Address,
              Address, Address stream) {
  cuda::rms_norm({Dtype(dtype), at(x), at(weight), at(residual), at(out), eps, num_rows, hidden}, at(stream));
}

void rope_kv_write(int dtype, Address qkv, Address cos, Address sin, Address positions, Address slots, Address k_cache,
                   Address v_cache, int num_rows, int heads, int kv_heads, int capacity, int head_dim, Address, Address,
                   Address stream) {
  const RopeParams p{Dtype(dtype),       at(qkv), at<float>(cos), at<float>(sin), at<int32_t>(positions),
                     at<int32_t>(slots), 0,       at(k_cache),    at(v_cache),    {kv_heads, capacity, head_dim},
                     num_rows,           heads};
  cuda::rope_kv_write(p, nullptr, at(stream));
}

void follow(int dtype, Address z, Address rows, Address down_squares, Address statistic, Address neurons, float decay, int layers,
            int num_rows, int intermediate, int kept, int count, Address floats, Address counters, Address stream) {
  cuda::follow({Dtype(dtype), at(z), at<int32_t>(rows), at<float>(down_squares), at<float>(statistic), at<int32_t>(neurons),
                decay, layers, num_rows, intermediate, kept, count},
               {}, workspace_at(floats, counters), at(stream));
}

void tree_mask(Address parents, Address mask, int num_nodes, int mask_words, Address, Address, Address stream) {
  cuda::tree_mask({at<int32_t>(parents), at<uint64_t>(mask), num_nodes, mask_words}, at(stream));
}

void argmax(Address logits, int num_rows, int vocab, Address out, Address floats, Address counters, Address stream) {
  cuda::argmax(at<float>(logits), num_rows, vocab, at<int32_t>(out), workspace_at(floats, counters), at(stream));
}

void kv_rewrite(int dtype, Address k_cache, Address v_cache, Address path, int start, int length, int layers, int kv_heads,
                int capacity, int head_dim, Address, Address, Address stream) {
  const KvRewriteParams p{Dtype(dtype), at(k_cache), at(v_cache), at<int32_t>(path), {kv_heads, capacity, head_dim},
                          layers,       start,       length};
  cuda::kv_rewrite(p, nullptr, nullptr, at(stream));
}

void tree_attention(int dtype, Address q, int q_stride, Address k_cache, Address v_cache, Address mask, Address out, float scale,
                    int prefix, int mask_words, int num_rows, int heads, int kv_heads, int capacity, int head_dim, Address floats,
                    Address counters, Address stream) {
  cuda::tree_attention({Dtype(dtype),
                        at(q),
                        q_stride,
                        at(k_cache),
                        at(v_cache),
                        {kv_heads, capacity, head_dim},
                        prefix,
                        at<uint64_t>(mask),
                        mask_words,
                        at(out),
                        nullptr,
                        scale,
                        num_rows,
                        heads},
                       nullptr, workspace_at(floats, counters), at(stream));
}

// What follows reads in device memory what the functions above are given: it can be replayed in a graph.

void rope_kv_write_from(int dtype, Address qkv, Address cos, Address sin, Address positions, int first_slot, Address k_cache,
                        Address v_cache, int num_rows, int heads, int kv_heads, int capacity, int head_dim, Address base, Address,
                        Address, Address stream) {
  const RopeParams p{Dtype(dtype), at(qkv),    at<float>(cos), at<float>(sin), at<int32_t>(positions),
                     nullptr,      first_slot, at(k_cache),    at(v_cache),    {kv_heads, capacity, head_dim},
                     num_rows,     heads};
  cuda::rope_kv_write(p, at<int32_t>(base), at(stream));
}

void tree_attention_from(int dtype, Address q, int q_stride, Address k_cache, Address v_cache, Address mask, Address out,
                         float scale, int mask_words, int num_rows, int heads, int kv_heads, int capacity, int head_dim,
                         Address base, Address floats, Address counters, Address stream) {
  cuda::tree_attention({Dtype(dtype),
                        at(q),
                        q_stride,
                        at(k_cache),
                        at(v_cache),
                        {kv_heads, capacity, head_dim},
                        0,
                        at<uint64_t>(mask),
                        mask_words,
                        at(out),
                        nullptr,
                        scale,
                        num_rows,
                        heads},
                       at<int32_t>(base), workspace_at(floats, counters), at(stream));
}

void accept_within(Address logits, Address drafts, Address parents, Address scores, float threshold, float score_temperature,
                   bool match, Address likelihoods, Address argmax, Address path, Address accepted, int num_rows, int vocab,
                   Address limit, Address fault, Address floats, Address counters, Address stream) {
  cuda::accept(
      {at<float>(logits), at<int32_t>(drafts), at<int32_t>(parents), at<float>(scores), threshold, score_temperature, match,
       at<float>(likelihoods), at<int32_t>(argmax), at<int32_t>(path), at<int32_t>(accepted), nullptr, num_rows, vocab},
      at<int32_t>(limit), at<int32_t>(fault), workspace_at(floats, counters), at(stream));
}

void kv_rewrite_from(int dtype, Address k_cache, Address v_cache, Address path, int start, int layers, int kv_heads, int capacity,
                     int head_dim, Address base, Address length, Address, Address, Address stream) {
  cuda::kv_rewrite({Dtype(dtype), at(k_cache), at(v_cache), at<int32_t>(path), {kv_heads, capacity, head_dim}, layers, start, 0},
                   at<int32_t>(base), at<int32_t>(length), at(stream));
}

void follow_from(int dtype, Address z, Address rows, Address down_squares, Address statistic, Address neurons, float decay,
                 int layers, int num_rows, int intermediate, int kept, Address count, Address fault, Address floats,
                 Address counters, Address stream) {
  cuda::follow({Dtype(dtype), at(z), at<int32_t>(rows), at<float>(down_squares), at<float>(statistic), at<int32_t>(neurons),
                decay, layers, num_rows, intermediate, kept, 0},
               {at<int32_t>(count), at<int32_t>(fault)}, workspace_at(floats, counters), at(stream));
}

void grow(Address rows, Address parents, Address mask, int first, int leaves, int width, int mask_words, Address, Address,
          Address stream) {
  cuda::grow({at<int32_t>(rows), at<int32_t>(parents), at<uint64_t>(mask), first, leaves, width, mask_words}, at(stream));
}

void advance(Address accepted, Address argmax, Address path, Address tokens, Address length, Address remaining, Address limit,
             Address used_limit, Address root, Address kept, int depth, Address, Address, Address stream) {
  cuda::advance(
      {at<int32_t>(accepted), at<int32_t>(argmax), at<int32_t>(path), at<int32_t>(tokens), at<int32_t>(length),
       at<int32_t>(remaining), at<int32_t>(limit), at<int32_t>(used_limit), at<int32_t>(root), at<int32_t>(kept), depth},
      at(stream));
}

class Model : public Weights {
 public:
  using Weights::Weights;

  size_t workspace(int num_rows, int capacity) const { return cuda::decode_workspace(get(), num_rows, capacity); }

  void step(Address tokens, Address positions, Address cos, Address sin, Address mask, int mask_words, Address k_cache,
            Address v_cache, int sparsity, Address neurons, Address thresholds, int kept, Address logits, Address argmax,
            Address workspace, Address z, int num_rows, int first_slot, int capacity, Address base, Address alive,
            Address counters, Address stream) const {
    const DecodeStepParams p = params(tokens, positions, cos, sin, mask, mask_words, k_cache, v_cache, sparsity, neurons,
                                      thresholds, kept, logits, argmax, workspace, z, num_rows, first_slot, 0, capacity);
    cuda::decode_step(p, {at<int32_t>(base), at<int32_t>(alive), at<int32_t>(counters)}, at(stream));
  }
};

void tree_expand_within(Address logits, Address scores, float score_temperature, float prune, Address tokens, Address parents,
                        Address new_scores, Address count, int num_leaves, int vocab, int width, Address fault, Address floats,
                        Address counters, Address stream) {
  cuda::tree_expand({at<float>(logits), at<float>(scores), score_temperature, prune, at<int32_t>(tokens), at<int32_t>(parents),
                     at<float>(new_scores), at<int32_t>(count), nullptr, nullptr, num_leaves, vocab, width},
                    at<int32_t>(fault), workspace_at(floats, counters), at(stream));
}

void tree_expand(Address logits, Address scores, float score_temperature, float prune, Address tokens, Address parents,
                 Address new_scores, Address count, int num_leaves, int vocab, int width, Address floats, Address counters,
                 Address stream) {
  tree_expand_within(logits, scores, score_temperature, prune, tokens, parents, new_scores, count, num_leaves, vocab, width, 0,
                     floats, counters, stream);
}

void accept(Address logits, Address drafts, Address parents, Address scores, float threshold, float score_temperature, bool match,
            Address likelihoods, Address argmax, Address path, Address accepted, int num_rows, int vocab, Address floats,
            Address counters, Address stream) {
  accept_within(logits, drafts, parents, scores, threshold, score_temperature, match, likelihoods, argmax, path, accepted,
                num_rows, vocab, 0, 0, floats, counters, stream);
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.attr("counters") = cuda::kCounters;

  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.def("linear", linear, Unlocked());
  m.def("gate_up", gate_up, Unlocked());
  m.def("gate", gate, Unlocked());
  m.def("up", up, Unlocked());
  m.def("down", down, Unlocked());
  m.def("down_workspace", cuda::down_workspace);
  m.def("select", select_neurons, Unlocked());
  m.def("select_workspace", cuda::select_workspace);
  m.def("follow", follow, Unlocked());
  m.def("follow_workspace", cuda::follow_workspace);
  m.def("rms_norm", rms_norm, Unlocked());
  m.def("rope_kv_write", rope_kv_write, Unlocked());
  m.def("tree_mask", tree_mask, Unlocked());
  m.def("tree_attention", tree_attention, Unlocked());
  m.def("tree_attention_workspace", cuda::attention_workspace);
  m.def("tree_expand", tree_expand, Unlocked());
  m.def("tree_expand_workspace", cuda::tree_expand_workspace);
  m.def("accept", accept, Unlocked());
  m.def("accept_workspace", cuda::accept_workspace);
  m.def("argmax", argmax, Unlocked());
  m.def("argmax_workspace", cuda::accept_workspace);
  m.def("kv_rewrite", kv_rewrite, Unlocked());

  m.def("rope_kv_write_from", rope_kv_write_from, Unlocked());
  m.def("tree_attention_from", tree_attention_from, Unlocked());
  m.def("tree_expand_within", tree_expand_within, Unlocked());
  m.def("accept_within", accept_within, Unlocked());
  m.def("kv_rewrite_from", kv_rewrite_from, Unlocked());
  m.def("follow_from", follow_from, Unlocked());
  m.def("grow", grow, Unlocked());
  m.def("advance", advance, Unlocked());

  py::class_<Model>(m, "Model", py::module_local())
      .def(weights_init())
      .def("workspace", &Model::workspace)
      .def("step", &Model::step, Unlocked());
}
