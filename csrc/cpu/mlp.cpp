#include <algorithm>

#include "isa.h"
#include "ops.h"
#include "team.h"

namespace sirius::cpu {

void gate_up(const GateUpParams& p) {
  const Kernels& k = kernels(p.dtype);
  void* x = scratch<char>(Scratch::packed, k.packed_size(p.num_rows, p.hidden));
  k.pack(p.x, p.hidden, p.num_rows, p.hidden, x);
  float* gates = scratch<float>(Scratch::first, size_t(p.num_rows) * kChunk);
  float* ups = scratch<float>(Scratch::second, size_t(p.num_rows) * kChunk);

  const auto row = [&](const void* weight, int i) {
    return offset(weight, size_t(p.neurons ? p.neurons[i] : i) * p.hidden, p.dtype);
  };
  const Range range = share(p.num_neurons, 16);
  for (int i = range.begin; i < range.end; i += kChunk) {
    const int n = std::min(kChunk, range.end - i);
    const auto gate_row = [&](int r) { return row(p.gate, std::min(r, range.end - 1)); };
    const auto up_row = [&](int r) { return row(p.up, std::min(r, range.end - 1)); };
    Rows<> rows;
    rows.fill(i, n, gate_row, [&](int r) { return up_row(i + r); });
    k.dot(rows.pointers, n, x, p.num_rows, p.hidden, gates, kChunk);
    rows.fill(i, n, up_row, [&](int r) { return gate_row(i + n + r); });
    k.dot(rows.pointers, n, x, p.num_rows, p.hidden, ups, kChunk);
    for (int j = 0; j < p.num_rows; ++j)
      k.silu_mul(gates + j * kChunk, ups + j * kChunk, n, offset(p.out, size_t(j) * p.num_neurons + i, p.dtype));
  }
}

// Each thread owns a stretch of columns, so that a sum never depends on the number of threads.
void down(const DownParams& p) {
  const Kernels& k = kernels(p.dtype);
  const Range range = share(p.hidden, 32);
  const int width = range.end - range.begin;
  if (width == 0) return;
  float* acc = scratch<float>(Scratch::accumulator, size_t(p.num_rows) * width);
  std::fill_n(acc, size_t(p.num_rows) * width, 0.0f);

  const auto row_at = [&](int i) {
    return offset(p.down, size_t(p.neurons ? p.neurons[i] : i) * p.hidden + range.begin, p.dtype);
  };
  static_assert(kChunk % 32 == 0, "sums may be cut at multiples of 32 rows only");
  for (int i = 0; i < p.num_neurons; i += kChunk) {
    const int n = std::min(kChunk, p.num_neurons - i);
    Rows<> rows;
    rows.fill(i, n, p.num_neurons, row_at);
    k.sum(rows.pointers, n, offset(p.x, i, p.dtype), p.num_neurons, p.num_rows, 0, width, acc, width);
  }
  for (int j = 0; j < p.num_rows; ++j) {
    const size_t at = size_t(j) * p.hidden + range.begin;
    k.store(acc + size_t(j) * width, nullptr, p.residual ? offset(p.residual, at, p.dtype) : nullptr, width,
            offset(p.out, at, p.dtype));
  }
}

}  // namespace sirius::cpu
