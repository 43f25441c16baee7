#include "kernels_simd.h"

namespace sirius::cpu {

const Kernels& kernels_scalar(Dtype dtype) { return table_of(dtype); }

}  // namespace sirius::cpu
