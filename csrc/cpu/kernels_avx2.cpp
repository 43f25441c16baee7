#include "kernels_simd.h"

namespace sirius::cpu {

const Kernels& kernels_avx2(Dtype dtype) { return table_of(dtype); }

const MatrixKernels& matrix_kernels_avx2(Format format, Dtype) { return matrix_table_of(format); }

}  // namespace sirius::cpu
