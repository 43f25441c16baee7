#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "isa.h"
#include "ops.h"
#include "team.h"

namespace sirius::cpu {
namespace {

// The `width` largest of n numbers, largest first, the lower index first among equals. Returns how many there are.
int largest(const float* x, int n, int width, int32_t* indices) {
  const auto before = [&](int32_t a, int32_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); };
  const int count = std::min(n, width);
  std::iota(indices, indices + count, 0);
  std::sort(indices, indices + count, before);
  float least = x[indices[count - 1]];
  for (int i = count; i < n; ++i) {
    if (!(x[i] > least)) continue;
    int32_t* place = std::upper_bound(indices, indices + count - 1, i, before);
    std::copy_backward(place, indices + count - 1, indices + count);
    *place = i;
    least = x[indices[count - 1]];
  }
  return count;
}

}  // namespace

void tree_expand(const TreeExpandParams& p) {
  constexpr float impossible = -std::numeric_limits<float>::infinity();
  const Kernels& k = kernels(Dtype::f32);
  const float inverse_temperature = 1.0f / p.score_temperature;
  const Range range = share(p.num_leaves);
  for (int leaf = range.begin; leaf < range.end; ++leaf) {
    const float* logits = p.logits + size_t(leaf) * p.vocab;
    int32_t* candidates = p.candidates + size_t(leaf) * p.width;
    float* likelihoods = p.likelihoods + size_t(leaf) * p.width;
    float max, sum;
    int32_t argmax;
    k.logit_stats(logits, p.vocab, inverse_temperature, false, &max, &argmax, &sum);
    std::fill_n(likelihoods, p.width, impossible);
    if (argmax < 0) continue;  // nothing can follow this leaf; and where there is a NaN, numbers have no order
    int count = largest(logits, p.vocab, p.width, candidates);
    if (1.0f / sum > p.prune) count = 1;
    for (int i = 0; i < count; ++i)
      likelihoods[i] = (logits[candidates[i]] - max) * inverse_temperature - std::log(sum) + p.scores[leaf];
  }
  sync();
  if (member.id != 0) return;

  int32_t* order = scratch<int32_t>(Scratch::pointers, size_t(p.width) + 1);
  const int count = largest(p.likelihoods, p.num_leaves * p.width, p.width, order);
  *p.count = 0;
  for (int i = 0; i < count && p.likelihoods[order[i]] > impossible; ++i) {
    p.tokens[i] = p.candidates[order[i]];
    p.parents[i] = order[i] / p.width;
    p.new_scores[i] = p.likelihoods[order[i]];
    *p.count = i + 1;
  }
}

}  // namespace sirius::cpu
