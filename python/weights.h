// A model's weights as Python describes them, for both backends.
#pragma once

#include <vector>

#include "fields.h"

namespace sirius::binding {

// Addresses alone: the Python object that made it keeps the tensors alive.
class Weights {
 public:
  // The fields of ModelWeights, and `layers`, a list of dicts of LayerWeights' fields.
  explicit Weights(const py::kwargs& named) {
    const py::dict own = named.attr("copy")();
    if (!own.contains("layers")) throw py::type_error("Model: missing argument layers");
    const py::list layers = own.attr("pop")("layers");
    std::tie(weights_) = read_all<ModelWeights>("Model", own);
    const Where where{nullptr, "Model"};
    const Where list{&where, "layers"};
    layers_.resize(layers.size());
    for (size_t i = 0; i < layers_.size(); ++i) read(layers[i].ptr(), layers_[i], {&list, nullptr, i});
    weights_.layers = layers_.data();
    weights_.num_layers = int(layers_.size());
  }
  Weights(const Weights&) = delete;

  const ModelWeights& get() const { return weights_; }

 private:
  ModelWeights weights_{};
  std::vector<LayerWeights> layers_;
};

// Defines `step` of a Model, as `define` does: `run` gets the pass over its weights and the structs Ps.
template <class... Ps, class Model, class Run>
void define_step(py::class_<Model>& model, Run run) {
  model.def("step", [run](const Model& self, const py::kwargs& named) {
    auto structs = read_all<DecodeStepParams, Ps...>("step", named);
    std::get<0>(structs).model = &self.get();
    py::gil_scoped_release unlocked;
    std::apply(run, structs);
  });
}

}  // namespace sirius::binding
