// The fields of every params struct, named once: what Python calls them, and how its values become them. Both backends' ops take
// their arguments by these names.
//
// An optional field may be left out and is then what params.h says. A workspace is not named: what an op needs of it the bindings
// know.
#pragma once

#include <pybind11/pybind11.h>

#include <limits>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../csrc/params.h"

namespace sirius::binding {

namespace py = pybind11;

struct Optional {};
constexpr Optional optional;

template <class P>
struct Fields;

template <>
struct Fields<Matrix> {
  template <class V>
  static void visit(V& v) {
    using P = Matrix;
    v("data", &P::data);
    v("format", &P::format);
    v("rows", &P::rows);
    v("cols", &P::cols);
    v("stride", &P::stride);
    v("lower", &P::lower, optional);
    v("lower_stride", &P::lower_stride, optional);
    v("shared", &P::shared, optional);
    v("places", &P::places, optional);
    v("place_at", &P::place_at, optional);
    v("neuron_of", &P::neuron_of, optional);
  }
};

template <>
struct Fields<Projection> {
  template <class V>
  static void visit(V& v) {
    using P = Projection;
    v("weight", &P::weight);
    v("bias", &P::bias, optional);
  }
};

template <>
struct Fields<Norm> {
  template <class V>
  static void visit(V& v) {
    using P = Norm;
    v("weight", &P::weight);
    v("eps", &P::eps);
    v("offset", &P::offset, optional);
  }
};

template <>
struct Fields<CacheShape> {
  template <class V>
  static void visit(V& v) {
    using P = CacheShape;
    v("kv_heads", &P::kv_heads);
    v("capacity", &P::capacity);
    v("head_dim", &P::head_dim);
  }
};

template <>
struct Fields<Sparsity> {
  template <class V>
  static void visit(V& v) {
    using P = Sparsity;
    v("kind", &P::kind);
    v("neurons", &P::neurons, optional);
    v("thresholds", &P::thresholds, optional);
    v("kept", &P::kept, optional);
    v("down_norms", &P::down_norms, optional);
    v("kept_up", &P::kept_up, optional);
    v("kept_down", &P::kept_down, optional);
  }
};

template <>
struct Fields<LinearParams> {
  template <class V>
  static void visit(V& v) {
    using P = LinearParams;
    v("dtype", &P::dtype);
    v("x", &P::x);
    v("parts", &P::parts, &P::num_parts);
    v("residual", &P::residual, optional);
    v("out", &P::out);
    v("out_f32", &P::out_f32, optional);
    v("scale", &P::scale, optional);
    v("softcap", &P::softcap, optional);
    v("num_rows", &P::num_rows);
    v("out_features", &P::out_features);
  }
};

template <>
struct Fields<PackParams> {
  template <class V>
  static void visit(V& v) {
    using P = PackParams;
    v("dtype", &P::dtype);
    v("x", &P::x);
    v("out", &P::out);
  }
};

template <>
struct Fields<UnpackParams> {
  template <class V>
  static void visit(V& v) {
    using P = UnpackParams;
    v("dtype", &P::dtype);
    v("matrix", &P::matrix);
    v("first_row", &P::first_row);
    v("num_rows", &P::num_rows);
    v("first_col", &P::first_col);
    v("num_cols", &P::num_cols);
    v("out", &P::out);
  }
};

template <>
struct Fields<GateUpParams> {
  template <class V>
  static void visit(V& v) {
    using P = GateUpParams;
    v("dtype", &P::dtype);
    v("x", &P::x);
    v("gate", &P::gate);
    v("up", &P::up);
    v("neurons", &P::neurons, optional);
    v("settled", &P::settled, optional);
    v("out", &P::out);
    v("activation", &P::activation, optional);
    v("num_rows", &P::num_rows);
    v("num_neurons", &P::num_neurons);
  }
};

template <>
struct Fields<GateParams> {
  template <class V>
  static void visit(V& v) {
    using P = GateParams;
    v("dtype", &P::dtype);
    v("x", &P::x);
    v("gate", &P::gate);
    v("neurons", &P::neurons, optional);
    v("settled", &P::settled, optional);
    v("out", &P::out);
    v("activation", &P::activation, optional);
    v("num_rows", &P::num_rows);
    v("num_neurons", &P::num_neurons);
  }
};

template <>
struct Fields<SelectParams> {
  template <class V>
  static void visit(V& v) {
    using P = SelectParams;
    v("dtype", &P::dtype, optional);
    v("values", &P::values);
    v("among", &P::among, optional);
    v("weights", &P::weights, optional);
    v("threshold", &P::threshold, optional);
    v("neurons", &P::neurons);
    v("count", &P::count);
    v("taken", &P::taken, optional);
    v("alive", &P::alive, optional);
    v("num_rows", &P::num_rows);
    v("intermediate", &P::intermediate);
    v("candidates", &P::candidates);
    v("kept", &P::kept, optional);
  }
};

template <>
struct Fields<FollowParams> {
  template <class V>
  static void visit(V& v) {
    using P = FollowParams;
    v("dtype", &P::dtype);
    v("z", &P::z);
    v("rows", &P::rows);
    v("count_at", &P::count_at, optional);
    v("fault", &P::fault, optional);
    v("down_squares", &P::down_squares);
    v("statistic", &P::statistic);
    v("neurons", &P::neurons);
    v("decay", &P::decay);
    v("layers", &P::layers);
    v("num_rows", &P::num_rows);
    v("intermediate", &P::intermediate);
    v("kept", &P::kept);
    v("count", &P::count, optional);
  }
};

template <>
struct Fields<UpParams> {
  template <class V>
  static void visit(V& v) {
    using P = UpParams;
    v("dtype", &P::dtype);
    v("x", &P::x);
    v("up", &P::up);
    v("gates", &P::gates);
    v("neurons", &P::neurons, optional);
    v("num_neurons_at", &P::num_neurons_at, optional);
    v("out", &P::out);
    v("spread", &P::spread, optional);
    v("num_rows", &P::num_rows);
    v("num_neurons", &P::num_neurons);
  }
};

template <>
struct Fields<DownParams> {
  template <class V>
  static void visit(V& v) {
    using P = DownParams;
    v("dtype", &P::dtype);
    v("x", &P::x);
    v("down", &P::down);
    v("neurons", &P::neurons, optional);
    v("settled", &P::settled, optional);
    v("num_neurons_at", &P::num_neurons_at, optional);
    v("residual", &P::residual, optional);
    v("out", &P::out);
    v("scale", &P::scale, optional);
    v("num_rows", &P::num_rows);
    v("num_neurons", &P::num_neurons);
  }
};

template <>
struct Fields<RmsNormParams> {
  template <class V>
  static void visit(V& v) {
    using P = RmsNormParams;
    v("dtype", &P::dtype);
    v("x", &P::x);
    v("norm", &P::norm);
    v("residual", &P::residual, optional);
    v("out", &P::out);
    v("num_rows", &P::num_rows);
    v("hidden", &P::hidden);
  }
};

template <>
struct Fields<RopeParams> {
  template <class V>
  static void visit(V& v) {
    using P = RopeParams;
    v("dtype", &P::dtype);
    v("qkv", &P::qkv);
    v("q_norm", &P::q_norm, optional);
    v("k_norm", &P::k_norm, optional);
    v("cos", &P::cos);
    v("sin", &P::sin);
    v("positions", &P::positions);
    v("slots", &P::slots, optional);
    v("first_slot", &P::first_slot, optional);
    v("base", &P::base, optional);
    v("k_cache", &P::k_cache);
    v("v_cache", &P::v_cache);
    v("cache", &P::cache);
    v("num_rows", &P::num_rows);
    v("heads", &P::heads);
    v("rotary_dim", &P::rotary_dim);
  }
};

template <>
struct Fields<AttentionParams> {
  template <class V>
  static void visit(V& v) {
    using P = AttentionParams;
    v("dtype", &P::dtype);
    v("q", &P::q);
    v("q_stride", &P::q_stride);
    v("k_cache", &P::k_cache);
    v("v_cache", &P::v_cache);
    v("cache", &P::cache);
    v("prefix", &P::prefix, optional);
    v("base", &P::base, optional);
    v("mask", &P::mask);
    v("mask_words", &P::mask_words);
    v("positions", &P::positions, optional);
    v("window", &P::window, optional);
    v("out", &P::out);
    v("scale", &P::scale, optional);
    v("softcap", &P::softcap, optional);
    v("num_rows", &P::num_rows);
    v("heads", &P::heads);
  }
};

template <>
struct Fields<TreeMaskParams> {
  template <class V>
  static void visit(V& v) {
    using P = TreeMaskParams;
    v("parents", &P::parents);
    v("mask", &P::mask);
    v("num_nodes", &P::num_nodes);
    v("mask_words", &P::mask_words);
  }
};

template <>
struct Fields<TreeExpandParams> {
  template <class V>
  static void visit(V& v) {
    using P = TreeExpandParams;
    v("logits", &P::logits);
    v("scores", &P::scores);
    v("score_temperature", &P::score_temperature);
    v("prune", &P::prune);
    v("tokens", &P::tokens);
    v("parents", &P::parents);
    v("new_scores", &P::new_scores);
    v("count", &P::count);
    v("fault", &P::fault, optional);
    v("num_leaves", &P::num_leaves);
    v("vocab", &P::vocab);
    v("width", &P::width);
  }
};

template <>
struct Fields<AcceptParams> {
  template <class V>
  static void visit(V& v) {
    using P = AcceptParams;
    v("logits", &P::logits);
    v("drafts", &P::drafts);
    v("parents", &P::parents, optional);
    v("scores", &P::scores, optional);
    v("threshold", &P::threshold);
    v("score_temperature", &P::score_temperature);
    v("match", &P::match);
    v("likelihoods", &P::likelihoods);
    v("argmax", &P::argmax);
    v("path", &P::path);
    v("accepted", &P::accepted);
    v("limit", &P::limit, optional);
    v("fault", &P::fault, optional);
    v("num_rows", &P::num_rows);
    v("vocab", &P::vocab);
  }
};

template <>
struct Fields<ArgmaxParams> {
  template <class V>
  static void visit(V& v) {
    using P = ArgmaxParams;
    v("logits", &P::logits);
    v("argmax", &P::argmax);
    v("likelihoods", &P::likelihoods, optional);
    v("score_temperature", &P::score_temperature, optional);
    v("num_rows", &P::num_rows);
    v("vocab", &P::vocab);
  }
};

template <>
struct Fields<KvRewriteParams> {
  template <class V>
  static void visit(V& v) {
    using P = KvRewriteParams;
    v("dtype", &P::dtype);
    v("k_cache", &P::k_cache);
    v("v_cache", &P::v_cache);
    v("path", &P::path);
    v("base", &P::base, optional);
    v("length_at", &P::length_at, optional);
    v("cache", &P::cache);
    v("layers", &P::layers);
    v("start", &P::start);
    v("length", &P::length, optional);
  }
};

template <>
struct Fields<LayerWeights> {
  template <class V>
  static void visit(V& v) {
    using P = LayerWeights;
    v("before_attention", &P::before_attention, optional);
    v("after_attention", &P::after_attention, optional);
    v("before_mlp", &P::before_mlp, optional);
    v("after_mlp", &P::after_mlp, optional);
    v("q_norm", &P::q_norm, optional);
    v("k_norm", &P::k_norm, optional);
    v("qkv", &P::qkv);
    v("output", &P::output);
    v("gate", &P::gate);
    v("up", &P::up);
    v("down", &P::down);
    v("window", &P::window, optional);
    v("rope", &P::rope, optional);
  }
};

// Its layers are a list of their own: see weights.h.
template <>
struct Fields<ModelWeights> {
  template <class V>
  static void visit(V& v) {
    using P = ModelWeights;
    v("dtype", &P::dtype);
    v("embedding", &P::embedding);
    v("final_norm", &P::final_norm, optional);
    v("lm_head", &P::lm_head);
    v("hidden", &P::hidden);
    v("intermediate", &P::intermediate);
    v("vocab", &P::vocab);
    v("heads", &P::heads);
    v("kv_heads", &P::kv_heads);
    v("head_dim", &P::head_dim);
    v("rotary_dim", &P::rotary_dim);
    v("activation", &P::activation, optional);
    v("embedding_scale", &P::embedding_scale, optional);
    v("residual_scale", &P::residual_scale, optional);
    v("attention_scale", &P::attention_scale, optional);
    v("attention_softcap", &P::attention_softcap, optional);
    v("logit_scale", &P::logit_scale, optional);
    v("logit_softcap", &P::logit_softcap, optional);
    v("stream", &P::stream, optional);
    v("head_rows", &P::head_rows, optional);
  }
};

template <>
struct Fields<Watch> {
  template <class V>
  static void visit(V& v) {
    using P = Watch;
    v("statistic", &P::statistic);
    v("down_squares", &P::down_squares);
    v("decay", &P::decay);
  }
};

// The model is the one whose method is called.
template <>
struct Fields<DecodeStepParams> {
  template <class V>
  static void visit(V& v) {
    using P = DecodeStepParams;
    v("tokens", &P::tokens);
    v("positions", &P::positions);
    v("cos", &P::cos);
    v("sin", &P::sin);
    v("max_position", &P::max_position);
    v("mask", &P::mask);
    v("mask_words", &P::mask_words);
    v("k_cache", &P::k_cache);
    v("v_cache", &P::v_cache);
    v("sparsity", &P::sparsity);
    v("logits", &P::logits);
    v("argmax", &P::argmax, optional);
    v("workspace", &P::workspace);
    v("z", &P::z, optional);
    v("watch", &P::watch, optional);
    v("num_rows", &P::num_rows);
    v("first_slot", &P::first_slot);
    v("prefix", &P::prefix, optional);
    v("capacity", &P::capacity);
  }
};

// ------------------------------------------------------------------------------------------------------ Python's values to
// fields

// What is being read, for errors: `linear: parts: 1: bias`.
struct Where {
  const Where* outer;
  const char* name;  // or null: the index says it
  size_t index = 0;

  std::string text() const { return (outer ? outer->text() + ": " : "") + (name ? name : std::to_string(index)); }
};

[[noreturn]] inline void fail(const Where& where, const std::string& what) { throw py::type_error(where.text() + ": " + what); }

[[noreturn]] inline void refuse(PyObject* value, const std::string& wanted, const Where& where) {
  PyErr_Clear();
  fail(where, "expected " + wanted + ", got " + Py_TYPE(value)->tp_name);
}

// The names of P's fields as Python strings that are made once: looking one up costs no allocation.
template <class P>
const std::vector<PyObject*>& names() {
  static const std::vector<PyObject*> all = [] {
    std::vector<PyObject*> found;
    const auto collect = [&](const char* name, const auto&...) { found.push_back(PyUnicode_InternFromString(name)); };
    Fields<P>::visit(collect);
    return found;
  }();
  return all;
}

// Where fields get their values from: a dict, by name, or a tuple, in order.
class Source {
 public:
  explicit Source(PyObject* values) : values_(values), by_name_(PyDict_Check(values)) {}

  // The next field's value, or null.
  PyObject* take(PyObject* name) {
    PyObject* value = by_name_                            ? PyDict_GetItemWithError(values_, name)
                      : used_ < PyTuple_GET_SIZE(values_) ? PyTuple_GET_ITEM(values_, used_)
                                                          : nullptr;
    used_ += value != nullptr;
    return value;
  }

  // TypeError where some values were never taken. all: the names that could have been.
  void finish(const std::vector<const std::vector<PyObject*>*>& all, const Where& where) const {
    const Py_ssize_t given = by_name_ ? PyDict_GET_SIZE(values_) : PyTuple_GET_SIZE(values_);
    if (used_ == given) return;
    if (!by_name_) fail(where, "expected at most " + std::to_string(used_) + " values, got " + std::to_string(given));
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(values_, &at, &key, &value);) {
      bool known = false;
      for (const auto* some : all)
        for (PyObject* name : *some) known = known || PyObject_RichCompareBool(key, name, Py_EQ) == 1;
      if (!known) fail(where, "there is no argument named " + std::string(py::str(key)));
    }
  }

 private:
  PyObject* const values_;
  const bool by_name_;
  Py_ssize_t used_ = 0;
};

template <class P>
void read_fields(Source& source, P& to, const Where& where);

template <class T>
void read(PyObject* value, T& to, const Where& where) {
  if constexpr (std::is_pointer_v<T>) {
    const size_t address = PyLong_Check(value) ? PyLong_AsSize_t(value) : size_t(-1);
    if (address == size_t(-1)) refuse(value, "an address", where);
    to = reinterpret_cast<T>(address);
  } else if constexpr (std::is_same_v<T, bool>) {
    if (!PyBool_Check(value)) refuse(value, "a bool", where);
    to = value == Py_True;
  } else if constexpr (std::is_enum_v<T>) {
    int number;
    read(value, number, where);
    to = T(number);
  } else if constexpr (std::is_integral_v<T>) {
    const long long number = PyLong_Check(value) ? PyLong_AsLongLong(value) : -1;
    if (number == -1 && (PyErr_Occurred() || !PyLong_Check(value))) refuse(value, "an integer", where);
    if (number < std::numeric_limits<T>::min() || number > std::numeric_limits<T>::max())
      fail(where, "does not fit, got " + std::to_string(number));
    to = T(number);
  } else if constexpr (std::is_floating_point_v<T>) {
    if (!PyFloat_Check(value) && !PyLong_Check(value)) refuse(value, "a number", where);
    to = T(PyFloat_AsDouble(value));
    if (PyErr_Occurred()) refuse(value, "a number", where);
  } else if constexpr (std::is_same_v<T, Matrix>) {
    py::detail::make_caster<Matrix> matrix;
    if (!matrix.load(value, false)) refuse(value, "a Matrix", where);
    to = py::detail::cast_op<Matrix&>(matrix);
  } else {
    if (!PyDict_Check(value) && !PyTuple_Check(value)) refuse(value, "a tuple or a dict", where);
    Source source(value);
    read_fields(source, to, where);
    source.finish({&names<T>()}, where);
  }
}

// Gives the fields of `to` their values, one call a field.
template <class P>
class Reader {
 public:
  Reader(Source& source, P& to, const Where& where) : source_(source), to_(to), where_(where) {}

  template <class T>
  void operator()(const char* name, T P::* field) {
    required(name, [&](PyObject* value, const Where& here) { read(value, to_.*field, here); });
  }

  template <class T>
  void operator()(const char* name, T P::* field, Optional) {
    if (PyObject* value = next()) read(value, to_.*field, {&where_, name});
  }

  // As many as there are.
  template <class T, size_t N>
  void operator()(const char* name, T (P::*field)[N]) {
    required(name, [&](PyObject* value, const Where& here) {
      if (read_list(value, to_.*field, N, here) != N) fail(here, "expected " + std::to_string(N));
    });
  }

  // Up to as many as there are.
  template <class T, size_t N>
  void operator()(const char* name, T (P::*field)[N], int P::* count) {
    required(name, [&](PyObject* value, const Where& here) { to_.*count = int(read_list(value, to_.*field, N, here)); });
  }

 private:
  PyObject* next() { return source_.take(names<P>()[at_++]); }

  template <class Read>
  void required(const char* name, const Read& use) {
    PyObject* value = next();
    if (!value) fail(where_, std::string("missing argument ") + name);
    use(value, Where{&where_, name});
  }

  template <class T>
  static size_t read_list(PyObject* value, T* to, size_t most, const Where& where) {
    if (!PyList_Check(value) && !PyTuple_Check(value)) refuse(value, "a list", where);
    const size_t size = size_t(PySequence_Fast_GET_SIZE(value));
    if (size > most) fail(where, "expected at most " + std::to_string(most) + ", got " + std::to_string(size));
    for (size_t i = 0; i < size; ++i) read(PySequence_Fast_GET_ITEM(value, i), to[i], {&where, nullptr, i});
    return size;
  }

  Source& source_;
  P& to_;
  const Where& where_;
  size_t at_ = 0;
};

template <class P>
void read_fields(Source& source, P& to, const Where& where) {
  Reader<P> reader(source, to, where);
  Fields<P>::visit(reader);
}

// The structs Ps, out of one call's named arguments: each has the fields that only it names.
template <class... Ps>
std::tuple<Ps...> read_all(const char* function, const py::dict& named) {
  std::tuple<Ps...> structs{};
  const Where where{nullptr, function};
  Source source(named.ptr());
  std::apply([&](Ps&... each) { (read_fields(source, each, where), ...); }, structs);
  source.finish({&names<Ps>()...}, where);
  return structs;
}

// Defines a function of Python whose named arguments are the fields of the structs Ps. `run` gets the structs, without the GIL.
template <class... Ps, class Run>
void define(py::module_& m, const char* name, Run run) {
  m.def(name, [name, run](const py::kwargs& named) {
    std::tuple<Ps...> structs = read_all<Ps...>(name, named);
    py::gil_scoped_release unlocked;
    std::apply(run, structs);
  });
}

inline void bind_matrix(py::module_& m) {
  py::class_<Matrix>(m, "Matrix", py::module_local()).def(py::init([](const py::kwargs& named) {
    return std::get<0>(read_all<Matrix>("Matrix", named));
  }));
}

}  // namespace sirius::binding
