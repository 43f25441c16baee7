#include <algorithm>
#include <optional>

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
  constexpr int kRows = 32;       // that may have their scales together
  constexpr int kNumbers = 4096;  // of which a copy in float stays in the L1 cache
  const Kernels& k = kernels(p.dtype);
  const MatrixKernels& matrix = matrix_kernels(p.matrix.format, p.dtype);
  const int together = std::min(matrix.together, kRows), stretch = kNumbers / together;
  float* numbers = scratch<float>(Scratch::first, kNumbers);
  const Range range = share(p.num_rows, kRows);
  for (int i = range.begin, n; i < range.end; i += n) {
    n = std::min(together, range.end - i);
    Rows<kRows> rows;
    rows.fill(p.first_row + i, n, p.first_row + range.end, [&](int r) { return p.matrix.place(r); });
    const RowForm form = p.matrix.form((p.first_row + i) / kRows);
    for (int c = 0; c < p.num_cols; c += stretch) {
      const int width = std::min(stretch, p.num_cols - c);
      matrix.read(rows.all(), n, form, p.first_col + c, p.first_col + c + width, numbers, stretch);
      for (int r = 0; r < n; ++r)
        k.store(numbers + r * stretch, nullptr, 1.0f, 0.0f, nullptr, width,
                offset(p.out, size_t(i + r) * p.num_cols + c, p.dtype));
    }
  }
}

}  // namespace sirius::cpu
