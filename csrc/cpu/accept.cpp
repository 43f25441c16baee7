#include <cmath>

#include "isa.h"
#include "ops.h"
#include "team.h"

namespace sirius::cpu {

void accept(const AcceptParams& p) {
  const Kernels& k = kernels(Dtype::f32);
  const float inverse_temperature = 1.0f / p.score_temperature;
  float *max = p.workspace, *sum = max + p.num_rows;
  const Range range = share(p.num_rows);
  for (int i = range.begin; i < range.end; ++i)
    k.logit_stats(p.logits + size_t(i) * p.vocab, p.vocab, inverse_temperature, false, max + i, p.argmax + i, sum + i);
  sync();
  if (member.id != 0) return;

  // run[i]: length of the run that ends with node i, or -1 where a node on the way to it is rejected.
  int32_t* run = scratch<int32_t>(Scratch::pointers, p.num_rows);
  run[0] = 0;
  int best = 0;
  for (int i = 1; i < p.num_rows; ++i) {
    const int parent = p.parents ? p.parents[i] : i - 1;
    const int32_t token = p.drafts[i - 1];
    const float logit = p.logits[size_t(parent) * p.vocab + token];
    p.likelihoods[i - 1] = std::exp((logit - max[parent]) * inverse_temperature) / sum[parent];
    const bool kept = p.match ? token == p.argmax[parent] : p.likelihoods[i - 1] >= p.threshold;
    run[i] = kept && run[parent] >= 0 ? run[parent] + 1 : -1;
    if (run[i] > run[best] || (run[i] == run[best] && p.scores && p.scores[i] > p.scores[best])) best = i;
  }
  *p.accepted = run[best];
  for (int i = best, at = run[best] - 1; at >= 0; i = p.parents ? p.parents[i] : i - 1) p.path[at--] = i;
}

void argmax(const ArgmaxParams& p) {
  const Kernels& k = kernels(Dtype::f32);
  const Range range = share(p.num_rows);
  for (int i = range.begin; i < range.end; ++i) {
    float max;
    k.logit_stats(p.logits + size_t(i) * p.vocab, p.vocab, 1.0f, true, &max, p.argmax + i, nullptr);
  }
}

}  // namespace sirius::cpu
