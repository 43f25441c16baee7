// The addresses of a model's weights, for both backends.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "../csrc/params.h"
#include "address.h"

// The weights' addresses. The Python object that made it keeps the tensors alive.
class Weights {
 public:
  Weights(int dtype, int hidden, int intermediate, int vocab, int heads, int kv_heads, int head_dim, float eps, float scale,
          Address embedding, Address final_norm, Address lm_head, const std::vector<std::vector<Address>>& layers) {
    for (const auto& a : layers) {
      sirius::LayerWeights layer{};
      layer.input_norm = at(a.at(0));
      layer.post_norm = at(a.at(1));
      layer.qkv[0] = {at(a.at(2)), at(a.at(3)), heads * head_dim};
      layer.qkv[1] = {at(a.at(4)), at(a.at(5)), kv_heads * head_dim};
      layer.qkv[2] = {at(a.at(6)), at(a.at(7)), kv_heads * head_dim};
      layer.output = {at(a.at(8)), at(a.at(9)), hidden};
      layer.gate = at(a.at(10));
      layer.up = at(a.at(11));
      layer.down = at(a.at(12));
      layers_.push_back(layer);
    }
    weights_.dtype = sirius::Dtype(dtype);
    weights_.embedding = at(embedding);
    weights_.final_norm = at(final_norm);
    weights_.lm_head = at(lm_head);
    weights_.layers = layers_.data();
    weights_.num_layers = int(layers_.size());
    weights_.hidden = hidden;
    weights_.intermediate = intermediate;
    weights_.vocab = vocab;
    weights_.heads = heads;
    weights_.kv_heads = kv_heads;
    weights_.head_dim = head_dim;
    weights_.eps = eps;
    weights_.attention_scale = scale;
  }
  Weights(const Weights&) = delete;

  const sirius::ModelWeights& get() const { return weights_; }

  // Of a pass over these weights.
  sirius::DecodeStepParams params(Address tokens, Address positions, Address cos, Address sin, Address mask, int mask_words,
                                  Address k_cache, Address v_cache, int sparsity, Address neurons, Address thresholds, int kept,
                                  Address logits, Address argmax, Address workspace, Address z, int num_rows, int first_slot,
                                  int prefix, int capacity) const {
    return {&weights_,
            at<int32_t>(tokens),
            at<int32_t>(positions),
            at<float>(cos),
            at<float>(sin),
            at<uint64_t>(mask),
            mask_words,
            at(k_cache),
            at(v_cache),
            {sirius::Sparsity::Kind(sparsity), at<int32_t>(neurons), at<float>(thresholds), kept},
            at<float>(logits),
            at<int32_t>(argmax),
            at(workspace),
            at(z),
            num_rows,
            first_slot,
            prefix,
            capacity};
  }

 private:
  sirius::ModelWeights weights_{};
  std::vector<sirius::LayerWeights> layers_;
};

inline auto weights_init() {
  return pybind11::init<int, int, int, int, int, int, int, float, float, Address, Address, Address,
                        const std::vector<std::vector<Address>>&>();
}
