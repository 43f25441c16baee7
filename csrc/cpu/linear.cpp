#include "isa.h"
#include "ops.h"
#include "team.h"

namespace sirius::cpu {
namespace {

float element(Dtype dtype, const void* p, size_t i) {
  switch (dtype) {
    case Dtype::f32: return static_cast<const float*>(p)[i];
    case Dtype::f16: return to_float(static_cast<const f16_t*>(p)[i]);
    default: return to_float(static_cast<const bf16_t*>(p)[i]);
  }
}

}  // namespace

void linear(const LinearParams& p) {
  const Kernels& k = kernels(p.dtype);
  void* x = scratch<char>(Scratch::packed, k.packed_size(p.num_rows, p.in));
  k.pack(p.x, p.in, p.num_rows, p.in, x);
  float* acc = scratch<float>(Scratch::first, size_t(p.num_rows) * kChunk);

  // The matrices' rows in one line; each thread takes an equal stretch of it, whatever matrix it falls in.
  const auto row_at = [&](int r) {
    const Matrix* matrix = p.matrices;
    while (r >= matrix->rows) r -= (matrix++)->rows;
    return offset(matrix->weight, size_t(r) * p.in, p.dtype);
  };
  const Range range = share(p.out_features, 16);
  int start = 0;
  for (const Matrix* matrix = p.matrices; matrix < p.matrices + p.num_matrices; start += (matrix++)->rows) {
    const int begin = range.begin > start ? range.begin : start;
    const int end = range.end < start + matrix->rows ? range.end : start + matrix->rows;
    for (int r = begin; r < end; r += kChunk) {
      const int n = end - r < kChunk ? end - r : kChunk;
      Rows<> rows;
      rows.fill(r, n, range.end, row_at);
      k.dot(rows.pointers, n, x, p.num_rows, p.in, acc, kChunk);
      const void* bias = matrix->bias ? offset(matrix->bias, r - start, p.dtype) : nullptr;
      for (int j = 0; j < p.num_rows; ++j) {
        const size_t at = size_t(j) * p.out_features + r;
        const void* residual = p.residual ? offset(p.residual, at, p.dtype) : nullptr;
        const float* sums = acc + j * kChunk;
        if (p.out_f32) {
          float* out = static_cast<float*>(p.out) + at;
          for (int i = 0; i < n; ++i)
            out[i] = sums[i] + (bias ? element(p.dtype, bias, i) : 0.0f) + (residual ? element(p.dtype, residual, i) : 0.0f);
        } else {
          k.store(sums, bias, residual, n, offset(p.out, at, p.dtype));
        }
      }
    }
  }
}

}  // namespace sirius::cpu
