#include <algorithm>
#include <optional>

#include "../q8.h"
#include "isa.h"
#include "ops.h"
#include "products.h"
#include "team.h"

namespace sirius::cpu {

void linear(const LinearParams& p) {
  const Kernels& k = kernels(p.dtype);
  const auto store = p.out_f32 ? k.store_f32 : k.store;
  const Dtype out_dtype = p.out_f32 ? Dtype::f32 : p.dtype;

  // The parts' rows in one line; each thread takes an equal stretch of it, whatever part it falls in.
  const auto row_at = [&](int r) {
    const Projection* part = p.parts;
    while (r >= part->weight.rows) r -= (part++)->weight.rows;
    return part->weight.place(r);
  };
  const Range range = share(p.out_features, 16);
  std::optional<Products> products;
  Format format{};
  int start = 0;
  for (const Projection* part = p.parts; part < p.parts + p.num_parts; start += (part++)->weight.rows) {
    const int begin = std::max(range.begin, start), end = std::min(range.end, start + part->weight.rows);
    if (begin >= end) continue;
    if (!products || part->weight.format != format) products.emplace(part->weight, p.dtype, p.x, p.num_rows);
    format = part->weight.format;
    products->each_chunk(part->weight, begin, end, range.end, row_at, [&](int j, int r, int n, const float* sums) {
      const size_t at = size_t(j) * (p.out_stride ? p.out_stride : p.out_features) + r;
      const void* bias = part->bias ? offset(part->bias, r - start, p.dtype) : nullptr;
      const void* residual = p.residual ? offset(p.residual, at, p.dtype) : nullptr;
      store(sums, bias, p.scale, p.softcap, residual, n, offset(p.out, at, out_dtype));
    });
  }
}

void pack(const PackParams& p) {
  const MatrixKernels& matrix = matrix_kernels(p.out.format, p.dtype);
  const Range rows = share(p.out.rows);
  for (int r = rows.begin; r < rows.end; ++r)
    matrix.write(offset(p.x, size_t(r) * p.out.cols, p.dtype), p.out.form(), p.out.place(r));
}

void unpack(const UnpackParams& p) {
  constexpr int kRows = q8::kGroup;  // as many as may have their scales together
  const MatrixKernels& matrix = matrix_kernels(p.matrix.format, p.dtype);
  const Range range = share(p.num_rows, kRows);
  for (int i = range.begin; i < range.end; i += kRows) {
    const int n = std::min(kRows, range.end - i), row = p.first_row + i;
    Rows<kRows> rows;
    rows.fill(row, n, row + n, [&](int r) { return p.matrix.place(r); });
    matrix.unpack(rows.all(), n, p.matrix.form(row / kRows), p.first_col, p.first_col + p.num_cols,
                  offset(p.out, size_t(i) * p.num_cols, p.dtype), p.num_cols);
  }
}

}  // namespace sirius::cpu
