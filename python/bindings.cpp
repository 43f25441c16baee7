// Where C++ meets Python: addresses and sizes in, nothing owned, nothing checked but that all of them are there. sirius_ext's
// kernels/ops.py and runtime/model.py check first.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "../csrc/cpu/checks.h"
#include "../csrc/cpu/crew.h"
#include "../csrc/cpu/isa.h"
#include "../csrc/cpu/ops.h"
#include "../csrc/cpu/team.h"
#if defined(SIRIUS_HAVE_CUDA)
#include "bindings_cuda.h"
#endif
#include "stream.h"
#include "weights.h"

namespace py = pybind11;
using namespace sirius;

namespace {

// What every op takes beside its own fields.
struct Team {
  int threads;
};

class Model : public binding::Weights {
 public:
  using Weights::Weights;

  size_t workspace(int num_rows, int slots) const { return cpu::decode_workspace(get(), num_rows, slots); }
};

}  // namespace

template <>
struct sirius::binding::Fields<Team> {
  template <class V>
  static void visit(V& v) {
    v("threads", &Team::threads);
  }
};

namespace {

// An op that is one thread's work.
template <class P>
void define_alone(py::module_& m, const char* name, void (*op)(const P&)) {
  binding::define<P, Team>(m, name, [op](const P& p, const Team&) { op(p); });
}

// An op whose params lack nothing.
template <class P>
void define(py::module_& m, const char* name, void (*op)(const P&)) {
  binding::define<P, Team>(m, name, [op](const P& p, const Team& team) { cpu::with_team(team.threads, [&] { op(p); }); });
}

// An op whose params get their workspace by `prepare`, which returns who owns it.
template <class P, class Prepare>
void define(py::module_& m, const char* name, void (*op)(const P&), Prepare prepare) {
  binding::define<P, Team>(m, name, [op, prepare](P& p, const Team& team) {
    const auto owner = prepare(p);
    cpu::with_team(team.threads, [&] { op(p); });
  });
}

std::vector<float> floats(size_t count, float*& workspace) {
  std::vector<float> owner(count);
  workspace = owner.data();
  return owner;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("isa", cpu::isa);
  m.def("available_isas", cpu::available_isas);
  m.def("set_isa", cpu::set_isa);

  binding::bind_matrix(m);
  define(m, "linear", cpu::linear);
  define(m, "pack", cpu::pack);
  define(m, "unpack", cpu::unpack);
  define(m, "gate_up", cpu::gate_up);
  define(m, "gate", cpu::gate);
  define_alone(m, "select", cpu::select);
  define(m, "follow", cpu::follow);
  define(m, "up", cpu::up);
  define(m, "down", cpu::down,
         [](DownParams& p) { return floats(cpu::down_workspace(p.num_rows, p.down.cols, p.num_neurons), p.workspace); });
  define(m, "rms_norm", cpu::rms_norm);
  define(m, "rope_kv_write", cpu::rope_kv_write);
  define_alone(m, "tree_mask", cpu::tree_mask);
  define(m, "tree_attention", cpu::tree_attention, [](AttentionParams& p) {
    const int slots = p.prefix + p.mask_words * 64;
    return floats(cpu::attention_workspace(p.num_rows, p.heads, p.cache.head_dim, slots), p.workspace);
  });
  define(m, "tree_expand", cpu::tree_expand, [](TreeExpandParams& p) {
    std::vector<int32_t> candidates(size_t(p.num_leaves) * p.width);
    p.candidates = candidates.data();
    return std::pair(std::move(candidates), floats(size_t(p.num_leaves) * p.width, p.likelihoods));
  });
  define(m, "accept", cpu::accept, [](AcceptParams& p) { return floats(2 * size_t(p.num_rows), p.workspace); });
  define(m, "argmax", cpu::argmax);
  define(m, "kv_rewrite", cpu::kv_rewrite);

  py::class_<cpu::Crew>(m, "Crew", py::module_local())
      .def(py::init<>())
      .def("size", &cpu::Crew::size, py::arg("most"))
      .def("passed", &cpu::Crew::passed, py::arg("threads"), py::arg("seconds"), py::arg("stalled"));

  m.def("checksums", [](size_t data, size_t size, int count, size_t sums) {
    const py::gil_scoped_release unlocked;
    cpu::checksums(reinterpret_cast<const void*>(data), size, count, reinterpret_cast<uint32_t*>(sums));
  });

  binding::bind_stream(m);

  py::class_<Model> model(m, "Model", py::module_local());
  model.def(py::init<const py::kwargs&>()).def("workspace", &Model::workspace);
  binding::define_step<Team>(model, [](const DecodeStepParams& p, const Team& team) { cpu::decode_step(p, team.threads); });

#if defined(SIRIUS_HAVE_CUDA)
  auto cuda = m.def_submodule("cuda");
  bind_cuda(cuda);
#endif
}
