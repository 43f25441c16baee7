#include "isa.h"
#include "ops.h"
#include "team.h"

namespace sirius::cpu {

void rms_norm(const RmsNormParams& p) {
  const Kernels& k = kernels(p.dtype);
  const Range range = share(p.num_rows);
  for (int j = range.begin; j < range.end; ++j) {
    const size_t at = size_t(j) * p.hidden;
    k.rms_norm(offset(p.x, at, p.dtype), p.norm, p.residual ? offset(p.residual, at, p.dtype) : nullptr, p.hidden,
               offset(p.out, at, p.dtype));
  }
}

}  // namespace sirius::cpu
