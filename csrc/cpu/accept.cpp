#include <cmath>

#include "isa.h"
#include "ops.h"
#include "team.h"

namespace sirius::cpu {

void accept(const AcceptParams& p) {
  const Kernels& k = kernels(Dtype::f32);
  const float inverse_temperature = 1.0f / p.score_temperature;
  const Range range = share(p.num_rows);
  for (int j = range.begin; j < range.end; ++j) {
    const float* logits = p.logits + size_t(j) * p.vocab;
    float max, sum;
    k.logit_stats(logits, p.vocab, inverse_temperature, &max, p.argmax + j, &sum);
    if (j < p.num_rows - 1) p.likelihoods[j] = std::exp((logits[p.drafts[j]] - max) * inverse_temperature) / sum;
  }
  sync();
  if (member.id == 0) {
    int a = 0;
    while (a < p.num_rows - 1 && (p.match ? p.drafts[a] == p.argmax[a] : p.likelihoods[a] >= p.threshold)) ++a;
    *p.accepted = a;
  }
}

}  // namespace sirius::cpu
