// Products of all input rows with rows of a weight matrix: what linear and the MLP's first half have in common.
#pragma once

#include <algorithm>

#include "isa.h"
#include "team.h"

namespace sirius::cpu {

class Products {
 public:
  // With rows of `matrix` and of others of its format; packs x, T [m, matrix.cols], for this thread, into memory of its own.
  Products(const Matrix& matrix, Dtype dtype, const void* x, int m, Scratch memory = Scratch::packed)
      : kernels_(matrix_kernels(matrix.format, dtype)),
        packed_(scratch<char>(memory, kernels_.packed_size(m, matrix.cols))),
        m_(m) {
    kernels_.pack(x, matrix.cols, m, matrix.cols, packed_);
  }

  // sums[j * kChunk + i] = rows[i] . x[j] for n <= kChunk rows.
  void dot(const Rows<>& rows, const RowForm& form, int n, float* sums) const {
    kernels_.dot(rows.all(), n, packed_, m_, form, sums, kChunk);
  }

  // Rows begin .. end - 1 of a matrix by `row_at`, a chunk at a time: `use(j, i, n, sums)` gets the products of rows i .. i + n -
  // 1 with x[j], and may change them. The thread reads on up to row `last` - 1.
  template <class RowAt, class Use>
  void each_chunk(const Matrix& matrix, int begin, int end, int last, const RowAt& row_at, const Use& use) const {
    float* sums = scratch<float>(Scratch::first, size_t(m_) * kChunk);
    for (int i = begin; i < end; i += kChunk) {
      const int n = std::min(kChunk, end - i);
      Rows<> rows;
      rows.fill(i, n, last, row_at);
      dot(rows, matrix.form(), n, sums);
      for (int j = 0; j < m_; ++j) use(j, i, n, sums + j * kChunk);
    }
  }

  // The same for this thread's share of `num_rows` rows.
  template <class RowAt, class Use>
  void each_chunk(const Matrix& matrix, int num_rows, const RowAt& row_at, const Use& use) const {
    const Range range = share(num_rows, 16);
    each_chunk(matrix, range.begin, range.end, range.end, row_at, use);
  }

 private:
  const MatrixKernels& kernels_;
  void* const packed_;
  const int m_;
};

}  // namespace sirius::cpu
