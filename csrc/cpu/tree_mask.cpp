#include "ops.h"
#include "team.h"

namespace sirius::cpu {

void tree_mask(const TreeMaskParams& p) {
  const Range range = share(p.num_nodes);
  for (int i = range.begin; i < range.end; ++i) {
    uint64_t* row = p.mask + size_t(i) * p.mask_words;
    for (int w = 0; w < p.mask_words; ++w) row[w] = 0;
    for (int node = i; node >= 0; node = p.parents[node]) row[node / 64] |= uint64_t(1) << node % 64;
  }
}

}  // namespace sirius::cpu
