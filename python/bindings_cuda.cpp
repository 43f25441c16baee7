// The CUDA backend's functions. Each takes the fields of its params struct by their names, then a workspace, the counters and the
// stream, in place of the CPU's threads.
#include "bindings_cuda.h"

#include "../csrc/cuda/ops.h"
#include "../csrc/cuda/stop.h"
#include "../csrc/cuda/weight_stream.h"
#include "weights.h"

#if !defined(SIRIUS_HAVE_CUDA)
#include "../csrc/simt/simt.h"
#endif

namespace sirius::binding {

// What every op ends with.
struct Launch {
  float* workspace;
  int32_t* counters;
  void* stream;

  operator cuda::Workspace() const { return {workspace, counters}; }
};

template <>
struct Fields<Launch> {
  template <class V>
  static void visit(V& v) {
    using P = Launch;
    v("workspace", &P::workspace);
    v("counters", &P::counters);
    v("stream", &P::stream);
  }
};

// By which an op may normalise its input.
struct InputNorm {
  Norm norm = {};
};

template <>
struct Fields<InputNorm> {
  template <class V>
  static void visit(V& v) {
    v("norm", &InputNorm::norm, optional);
  }
};

template <>
struct Fields<cuda::GrowParams> {
  template <class V>
  static void visit(V& v) {
    using P = cuda::GrowParams;
    v("rows", &P::rows);
    v("parents", &P::parents);
    v("mask", &P::mask);
    v("scores", &P::scores);
    v("confidence", &P::confidence, optional);
    v("first", &P::first);
    v("leaves", &P::leaves);
    v("width", &P::width);
    v("mask_words", &P::mask_words);
  }
};

template <>
struct Fields<cuda::StopParams> {
  template <class V>
  static void visit(V& v) {
    using P = cuda::StopParams;
    v("rule", &P::rule);
    v("confidences", &P::confidences);
    v("reach", &P::reach);
    v("goes_on", &P::goes_on);
    v("counts", &P::counts);
    v("scores", &P::scores);
    v("condition", &P::condition, optional);
    v("edges", &P::edges);
    v("depth", &P::depth);
    v("depths", &P::depths);
    v("width", &P::width);
  }
};

template <>
struct Fields<cuda::AdvanceParams> {
  template <class V>
  static void visit(V& v) {
    using P = cuda::AdvanceParams;
    v("accepted", &P::accepted);
    v("argmax", &P::argmax);
    v("path", &P::path);
    v("tokens", &P::tokens);
    v("length", &P::length);
    v("remaining", &P::remaining);
    v("limit", &P::limit);
    v("used_limit", &P::used_limit);
    v("root", &P::root);
    v("kept", &P::kept);
    v("depth", &P::depth);
  }
};

template <>
struct Fields<cuda::HoldParams> {
  template <class V>
  static void visit(V& v) {
    using P = cuda::HoldParams;
    v("neurons", &P::neurons);
    v("held", &P::held);
    v("row_of", &P::row_of);
    v("neuron_of", &P::neuron_of);
    v("listed_rows", &P::listed_rows);
    v("taken", &P::taken);
    v("count", &P::count);
    v("weights", &P::weights, optional);
    v("row_weights", &P::row_weights, optional);
    v("layers", &P::layers);
    v("intermediate", &P::intermediate);
    v("rows", &P::rows);
    v("kept", &P::kept);
  }
};

// Where a pass is launched: the rest is among its own fields.
struct OnStream {
  void* stream;
};

template <>
struct Fields<OnStream> {
  template <class V>
  static void visit(V& v) {
    v("stream", &OnStream::stream);
  }
};

template <>
struct Fields<cuda::Pass> {
  template <class V>
  static void visit(V& v) {
    using P = cuda::Pass;
    v("base", &P::base, optional);
    v("alive", &P::alive, optional);
    v("counters", &P::counters);
    v("weights", &P::weights, optional);
    v("all_streams", &P::all_streams, optional);
    v("z_in_host", &P::z_in_host, optional);
  }
};

template <>
struct Fields<cuda::StreamedImage> {
  template <class V>
  static void visit(V& v) {
    using P = cuda::StreamedImage;
    v("nbytes", &P::nbytes);
    v("resident", &P::resident);
    v("slots", &P::slots);
  }
};

namespace {

// What was launched has run when a function returns over simt, unless the tests let it wait for what is launched next.
void launched() {
#if !defined(SIRIUS_HAVE_CUDA)
  if (!simt::held()) simt::finish();
#endif
}

template <class P>
void define_op(py::module_& m, const char* name, void (*op)(const P&, cuda::Workspace, cuda::StreamHandle)) {
  define<P, Launch>(m, name, [op](const P& p, const Launch& launch) {
    op(p, launch, launch.stream);
    launched();
  });
}

template <class P>
void define_op(py::module_& m, const char* name, void (*op)(const P&, const Norm&, cuda::Workspace, cuda::StreamHandle)) {
  define<P, InputNorm, Launch>(m, name, [op](const P& p, const InputNorm& input, const Launch& launch) {
    op(p, input.norm, launch, launch.stream);
    launched();
  });
}

class Model : public Weights {
 public:
  using Weights::Weights;

  size_t workspace(int num_rows, int capacity) const { return cuda::decode_workspace(get(), num_rows, capacity); }
};

// Streams and flags are addresses.
void bind_conditions(py::module_& m) {
  const auto on = [](size_t stream) { return reinterpret_cast<cuda::StreamHandle>(stream); };
  m.def("has_conditions", &cuda::has_conditions);
  m.def("new_condition", [=](size_t stream) { return cuda::new_condition(on(stream)); });
  m.def("begin_if", [=](int64_t condition, size_t stream, size_t body) { cuda::begin_if(condition, on(stream), on(body)); });
  m.def("end_if", [=](size_t body) { cuda::end_if(on(body)); });
  m.def("is_set", [=](size_t flag, size_t stream) {
    const py::gil_scoped_release unlocked;
    return cuda::is_set(reinterpret_cast<const int32_t*>(flag), on(stream));
  });
}

// layers: lists of StreamedImage.
std::unique_ptr<cuda::WeightStream> make_weight_stream(const py::list& layers, int buffers) {
  const Where where{nullptr, "WeightStream"};
  std::vector<std::vector<cuda::StreamedImage>> images;
  for (const py::handle layer : layers) {
    auto& own = images.emplace_back();
    for (const py::handle image : py::reinterpret_borrow<py::list>(layer)) read(image.ptr(), own.emplace_back(), where);
  }
  const py::gil_scoped_release unlocked;
  return std::make_unique<cuda::WeightStream>(std::move(images), buffers);
}

void bind_weight_stream(py::module_& m) {
  using cuda::WeightStream;
  const auto address = [](const void* at) { return reinterpret_cast<size_t>(at); };
  const auto on = [](size_t stream) { return reinterpret_cast<cuda::StreamHandle>(stream); };
  py::class_<cuda::PinnedMemory>(m, "PinnedMemory", py::module_local())
      .def(py::init<int64_t>(), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("address", [=](const cuda::PinnedMemory& memory) { return address(memory.data()); });
  m.def("to_host", [=](size_t from, size_t to, size_t nbytes, size_t stream) {
    cuda::to_host(reinterpret_cast<const void*>(from), reinterpret_cast<void*>(to), nbytes, on(stream));
    launched();
  });
  py::class_<WeightStream>(m, "WeightStream", py::module_local())
      .def(py::init(&make_weight_stream), py::kw_only(), py::arg("layers"), py::arg("buffers"))
      .def_static("granularity", &WeightStream::granularity)
      .def_property_readonly("address", [=](const WeightStream& s) { return address(&s); })
      .def("image", [=](const WeightStream& s, int layer, int number) { return address(s.image(layer, number)); })
      .def("host", [=](const WeightStream& s, int layer, int number) { return address(s.host(layer, number)); })
      .def("slots", [=](const WeightStream& s, int layer, int number) { return address(s.slots(layer, number)); })
      .def("share",
           [](WeightStream& s, size_t held, size_t row_of, int intermediate) {
             s.share(reinterpret_cast<const cuda::HeldLayer*>(held), reinterpret_cast<const int32_t*>(row_of), intermediate);
           })
      .def("ahead",
           [=](WeightStream& s, int first, int last, size_t stream) {
             s.ahead(first, last, on(stream));
             launched();
           })
      .def("need",
           [=](WeightStream& s, int layer, size_t stream) {
             s.need(layer, on(stream));
             launched();
           })
      .def("done",
           [=](WeightStream& s, int layer, size_t stream) {
             s.done(layer, on(stream));
             launched();
           })
      .def("end", [=](WeightStream& s, size_t stream) {
        s.end(on(stream));
        launched();
      });
}

}  // namespace
}  // namespace sirius::binding

void bind_cuda(pybind11::module_& m) {
  using namespace sirius;
  using namespace sirius::binding;
  m.attr("counters") = cuda::kCounters;

  define_op(m, "linear", cuda::linear);
  define_op(m, "gate_up", cuda::gate_up);
  define_op(m, "gate", cuda::gate);
  define_op(m, "up", cuda::up);
  define_op(m, "down", cuda::down);
  m.def("down_workspace", cuda::down_workspace);
  define_op(m, "select", cuda::select);
  m.def("select_workspace", cuda::select_workspace);
  define_op(m, "follow", cuda::follow);
  m.def("follow_workspace", cuda::follow_workspace);
  define_op(m, "rms_norm", cuda::rms_norm);
  define_op(m, "rope_kv_write", cuda::rope_kv_write);
  define_op(m, "tree_mask", cuda::tree_mask);
  define_op(m, "tree_attention", cuda::tree_attention);
  m.def("tree_attention_workspace", cuda::attention_workspace);
  define_op(m, "tree_expand", cuda::tree_expand);
  m.def("tree_expand_workspace", cuda::tree_expand_workspace);
  define_op(m, "accept", cuda::accept);
  m.def("accept_workspace", cuda::accept_workspace);
  define_op(m, "argmax", cuda::argmax);
  m.def("argmax_workspace", cuda::accept_workspace);
  define_op(m, "kv_rewrite", cuda::kv_rewrite);
  define_op(m, "grow", cuda::grow);
  define_op(m, "advance", cuda::advance);
  define_op(m, "stop", cuda::stop);
  bind_conditions(m);
  define_op(m, "hold", cuda::hold);

  bind_weight_stream(m);

  py::class_<Model> model(m, "Model", py::module_local());
  model.def(py::init<const py::kwargs&>()).def("workspace", &Model::workspace);
  define_step<cuda::Pass, OnStream>(model, [](const DecodeStepParams& p, const cuda::Pass& pass, const OnStream& launch) {
    cuda::decode_step(p, pass, launch.stream);
    launched();
  });
}
