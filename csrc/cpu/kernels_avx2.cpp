#include "kernels_simd.h"

namespace sirius::cpu {

const Kernels& kernels_avx2(Dtype dtype) { return table_of(dtype); }

}  // namespace sirius::cpu
