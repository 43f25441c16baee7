#include "kernels_simd.h"

namespace sirius::cpu {

const Kernels& kernels_avx2(Dtype dtype) { return table_of(dtype); }

const MatrixKernels& matrix_kernels_avx2(Format format, Dtype dtype) { return matrix_table_of(format, dtype); }

}  // namespace sirius::cpu
