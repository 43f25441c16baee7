// AVX2 with products of bytes: what it changes is matrices of few bits.
#include "kernels_simd.h"

namespace sirius::cpu {

const MatrixKernels& matrix_kernels_avxvnni(Format format, Dtype dtype) {
  return format == plain(dtype) ? matrix_kernels_avx2(format, dtype) : matrix_table_of(format, dtype);
}

}  // namespace sirius::cpu
