// Where C++ meets Python: addresses and sizes in, nothing owned, nothing checked. sirius_ext/ops.py and model.py check first.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "../csrc/cpu/isa.h"
#include "../csrc/cpu/ops.h"
#include "../csrc/cpu/team.h"
#if defined(SIRIUS_HAVE_CUDA)
#include "bindings_cuda.h"
#endif
#include "weights.h"

namespace py = pybind11;
using namespace sirius;

namespace {

class Model : public Weights {
 public:
  using Weights::Weights;

  size_t workspace(int num_rows, int slots) const { return cpu::decode_workspace(get(), num_rows, slots); }

  void step(Address tokens, Address positions, Address cos, Address sin, Address mask, int mask_words, Address k_cache,
            Address v_cache, int sparsity, Address neurons, Address thresholds, int kept, Address logits, Address argmax,
            Address workspace, Address z, int num_rows, int first_slot, int prefix, int capacity, int threads) const {
    const DecodeStepParams p = params(tokens, positions, cos, sin, mask, mask_words, k_cache, v_cache, sparsity, neurons,
                                      thresholds, kept, logits, argmax, workspace, z, num_rows, first_slot, prefix, capacity);
    cpu::with_team(threads, [&] { cpu::decode_step(p); });
  }
};

void linear(int dtype, Address x, Address weight, Address bias, Address residual, Address out, bool out_f32, int num_rows, int in,
            int out_features, int threads) {
  const Matrix matrix{at(weight), at(bias), out_features};
  const LinearParams p{Dtype(dtype), at(x), &matrix, 1, at(residual), at(out), out_f32, num_rows, in, out_features};
  cpu::with_team(threads, [&] { cpu::linear(p); });
}

void gate_up(int dtype, Address x, Address gate, Address up, Address neurons, Address out, int num_rows, int hidden,
             int num_neurons, int threads) {
  const GateUpParams p{Dtype(dtype), at(x), at(gate), at(up), at<int32_t>(neurons), at(out), num_rows, hidden, num_neurons};
  cpu::with_team(threads, [&] { cpu::gate_up(p); });
}

void gate(int dtype, Address x, Address weight, Address out, int num_rows, int hidden, int intermediate, int threads) {
  const GateParams p{Dtype(dtype), at(x), at(weight), at<float>(out), num_rows, hidden, intermediate};
  cpu::with_team(threads, [&] { cpu::gate(p); });
}

// One thread's work, as tree_mask is; every op takes the number of threads.
void select_neurons(Address gates, Address threshold, Address neurons, Address count, int num_rows, int intermediate, int kept,
                    int) {
  *at<int32_t>(count) = cpu::select({at<float>(gates), at<float>(threshold), at<int32_t>(neurons), num_rows, intermediate, kept});
}

void follow(int dtype, Address z, Address rows, Address down_squares, Address statistic, Address neurons, float decay, int layers,
            int num_rows, int intermediate, int kept, int count, int threads) {
  const FollowParams p{Dtype(dtype),
                       at(z),
                       at<int32_t>(rows),
                       at<float>(down_squares),
                       at<float>(statistic),
                       at<int32_t>(neurons),
                       decay,
                       layers,
                       num_rows,
                       intermediate,
                       kept,
                       count};
  cpu::with_team(threads, [&] { cpu::follow(p); });
}

void up(int dtype, Address x, Address weight, Address gates, Address neurons, Address out, int num_rows, int hidden,
        int intermediate, int num_neurons, int threads) {
  const UpParams p{Dtype(dtype), at(x),    at(weight), at<float>(gates), at<int32_t>(neurons),
                   at(out),      num_rows, hidden,     intermediate,     num_neurons};
  cpu::with_team(threads, [&] { cpu::up(p); });
}

void down(int dtype, Address x, Address weight, Address neurons, Address residual, Address out, int num_rows, int hidden,
          int num_neurons, int threads) {
  std::vector<float> workspace(cpu::down_workspace(num_rows, hidden, num_neurons));
  const DownParams p{Dtype(dtype),     at(x),    at(weight), at<int32_t>(neurons), at(residual), at(out),
                     workspace.data(), num_rows, hidden,     num_neurons};
  cpu::with_team(threads, [&] { cpu::down(p); });
}

void rms_norm(int dtype, Address x, Address weight, Address residual, Address out, float eps, int num_rows, int hidden,
              int threads) {
  const RmsNormParams p{Dtype(dtype), at(x), at(weight), at(residual), at(out), eps, num_rows, hidden};
  cpu::with_team(threads, [&] { cpu::rms_norm(p); });
}

void rope_kv_write(int dtype, Address qkv, Address cos, Address sin, Address positions, Address slots, Address k_cache,
                   Address v_cache, int num_rows, int heads, int kv_heads, int capacity, int head_dim, int threads) {
  const RopeParams p{Dtype(dtype),       at(qkv), at<float>(cos), at<float>(sin), at<int32_t>(positions),
                     at<int32_t>(slots), 0,       at(k_cache),    at(v_cache),    {kv_heads, capacity, head_dim},
                     num_rows,           heads};
  cpu::with_team(threads, [&] { cpu::rope_kv_write(p); });
}

void tree_mask(Address parents, Address mask, int num_nodes, int mask_words, int) {
  cpu::tree_mask({at<int32_t>(parents), at<uint64_t>(mask), num_nodes, mask_words});
}

void tree_attention(int dtype, Address q, int q_stride, Address k_cache, Address v_cache, Address mask, Address out, float scale,
                    int prefix, int mask_words, int num_rows, int heads, int kv_heads, int capacity, int head_dim, int threads) {
  std::vector<float> workspace(cpu::attention_workspace(num_rows, heads, head_dim, prefix + mask_words * 64));
  const AttentionParams p{Dtype(dtype),     at(q),
                          q_stride,         at(k_cache),
                          at(v_cache),      {kv_heads, capacity, head_dim},
                          prefix,           at<uint64_t>(mask),
                          mask_words,       at(out),
                          workspace.data(), scale,
                          num_rows,         heads};
  cpu::with_team(threads, [&] { cpu::tree_attention(p); });
}

void tree_expand(Address logits, Address scores, float score_temperature, float prune, Address tokens, Address parents,
                 Address new_scores, Address count, int num_leaves, int vocab, int width, int threads) {
  std::vector<int32_t> candidates(size_t(num_leaves) * width);
  std::vector<float> likelihoods(size_t(num_leaves) * width);
  const TreeExpandParams p{at<float>(logits),
                           at<float>(scores),
                           score_temperature,
                           prune,
                           at<int32_t>(tokens),
                           at<int32_t>(parents),
                           at<float>(new_scores),
                           at<int32_t>(count),
                           candidates.data(),
                           likelihoods.data(),
                           num_leaves,
                           vocab,
                           width};
  cpu::with_team(threads, [&] { cpu::tree_expand(p); });
}

void accept(Address logits, Address drafts, Address parents, Address scores, float threshold, float score_temperature, bool match,
            Address likelihoods, Address argmax, Address path, Address accepted, int num_rows, int vocab, int threads) {
  std::vector<float> workspace(2 * size_t(num_rows));
  const AcceptParams p{at<float>(logits),
                       at<int32_t>(drafts),
                       at<int32_t>(parents),
                       at<float>(scores),
                       threshold,
                       score_temperature,
                       match,
                       at<float>(likelihoods),
                       at<int32_t>(argmax),
                       at<int32_t>(path),
                       at<int32_t>(accepted),
                       workspace.data(),
                       num_rows,
                       vocab};
  cpu::with_team(threads, [&] { cpu::accept(p); });
}

void argmax(Address logits, int num_rows, int vocab, Address out, int threads) {
  cpu::with_team(threads, [&] { cpu::argmax(at<float>(logits), num_rows, vocab, at<int32_t>(out)); });
}

void kv_rewrite(int dtype, Address k_cache, Address v_cache, Address path, int start, int length, int layers, int kv_heads,
                int capacity, int head_dim, int threads) {
  const KvRewriteParams p{Dtype(dtype), at(k_cache), at(v_cache), at<int32_t>(path), {kv_heads, capacity, head_dim},
                          layers,       start,       length};
  cpu::with_team(threads, [&] { cpu::kv_rewrite(p); });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("isa", cpu::isa);
  m.def("available_isas", cpu::available_isas);
  m.def("set_isa", cpu::set_isa);

  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.def("linear", linear, Unlocked());
  m.def("gate_up", gate_up, Unlocked());
  m.def("gate", gate, Unlocked());
  m.def("select", select_neurons, Unlocked());
  m.def("follow", follow, Unlocked());
  m.def("up", up, Unlocked());
  m.def("down", down, Unlocked());
  m.def("rms_norm", rms_norm, Unlocked());
  m.def("rope_kv_write", rope_kv_write, Unlocked());
  m.def("tree_mask", tree_mask, Unlocked());
  m.def("tree_attention", tree_attention, Unlocked());
  m.def("tree_expand", tree_expand, Unlocked());
  m.def("accept", accept, Unlocked());
  m.def("argmax", argmax, Unlocked());
  m.def("kv_rewrite", kv_rewrite, Unlocked());

  py::class_<Model>(m, "Model").def(weights_init()).def("workspace", &Model::workspace).def("step", &Model::step, Unlocked());

#if defined(SIRIUS_HAVE_CUDA)
  auto cuda = m.def_submodule("cuda");
  bind_cuda(cuda);
#endif
}
