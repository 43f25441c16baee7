// How kernels read a weight matrix: whatever depends on its format.
#pragma once

#include "common.cuh"

namespace sirius::cuda {

// One row of a matrix whose format is a plain array of T. Rows are read once a pass: by 16 bytes, if they are `Aligned`.
template <class T, bool Aligned>
class WeightRow {
 public:
  WeightRow() = default;
  __device__ __forceinline__ WeightRow(const Matrix& matrix, int row) : elements_(static_cast<const T*>(matrix.row(row))) {}

  // Elements [begin, begin + Vec::size) of n, zero from n on; begin is a multiple of Vec::size.
  __device__ __forceinline__ Vec<T> load(int begin, int n) const { return load_part_streaming<Aligned>(elements_, begin, n); }

 private:
  const T* elements_;
};

// Whether the matrix's rows may be read by 16 bytes.
template <class T>
bool weights_aligned(const Matrix& matrix) {
  return aligned16(matrix.data) && matrix.stride % 16 == 0 && matrix.cols % Vec<T>::size == 0;
}

// One of the projections whose outputs stand side by side. By comparison: an index would copy a kernel's parameters to local
// memory.
__device__ __forceinline__ Projection projection_at(const Projection (&parts)[3], int which) {
  return which == 0 ? parts[0] : which == 1 ? parts[1] : parts[2];
}

}  // namespace sirius::cuda
