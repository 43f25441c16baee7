#include <algorithm>
#include <cmath>
#include <numeric>

#include "isa.h"
#include "ops.h"
#include "products.h"
#include "team.h"

namespace sirius::cpu {

void gate_up(const GateUpParams& p) {
  const Kernels& k = kernels(p.dtype);
  const Products products(p.gate, p.dtype, p.x, p.num_rows);
  const Products up_products =
      p.up.format == p.gate.format ? products : Products(p.up, p.dtype, p.x, p.num_rows, Scratch::packed_again);
  float* gates = scratch<float>(Scratch::first, size_t(p.num_rows) * kChunk);
  float* ups = scratch<float>(Scratch::second, size_t(p.num_rows) * kChunk);

  const auto row = [&](const Matrix& matrix, int i) { return matrix.place(p.neurons ? p.neurons[i] : i); };
  const Range range = share(p.num_neurons, 16);
  for (int i = range.begin; i < range.end; i += kChunk) {
    const int n = std::min(kChunk, range.end - i);
    const auto gate_row = [&](int r) { return row(p.gate, std::min(r, range.end - 1)); };
    const auto up_row = [&](int r) { return row(p.up, std::min(r, range.end - 1)); };
    Rows<> rows;
    rows.fill(i, n, gate_row, [&](int r) { return up_row(i + r); });
    products.dot(rows, p.gate.form(), n, gates);
    rows.fill(i, n, up_row, [&](int r) { return gate_row(i + n + r); });
    up_products.dot(rows, p.up.form(), n, ups);
    for (int j = 0; j < p.num_rows; ++j)
      k.activate(p.activation, gates + j * kChunk, ups + j * kChunk, n, offset(p.out, size_t(j) * p.num_neurons + i, p.dtype));
  }
}

void gate(const GateParams& p) {
  const Kernels& k32 = kernels(Dtype::f32);
  const auto row_at = [&](int i) { return p.gate.place(p.neurons ? p.neurons[i] : i); };
  Products(p.gate, p.dtype, p.x, p.num_rows).each_chunk(p.gate, p.num_neurons, row_at, [&](int j, int i, int n, float* sums) {
    float* out = p.out + size_t(j) * p.gate.rows;
    k32.activate(p.activation, sums, nullptr, n, p.neurons ? sums : out + i);
    if (p.neurons)
      for (int r = 0; r < n; ++r) out[p.neurons[i + r]] = sums[r];
  });
}

void select(const SelectParams& p) {
  float* scores = scratch<float>(Scratch::first, p.candidates);
  const auto neuron = [among = p.among](int i) { return among ? among[i] : i; };
  for (int j = 0; j < p.num_rows; ++j) {
    const float* values = p.values + size_t(j) * p.intermediate;
    for (int i = 0; i < p.candidates; ++i) scores[i] = (j ? scores[i] : 0.0f) + std::fabs(values[neuron(i)]);
  }
  // A product of what is not finite may be a NaN with a sign, which would count as the smallest.
  if (p.weights)
    for (int i = 0; i < p.candidates; ++i) scores[i] = std::fabs(scores[i] * p.weights[neuron(i)]);
  int count = 0;
  if (p.threshold) {
    const float least = float(p.num_rows) * *p.threshold;
    for (int i = 0; i < p.candidates; ++i) {
      p.neurons[count] = neuron(i);
      count += scores[i] >= least;
    }
    *p.count = count;
    return;
  }

  // The kept-th largest score by its bits, which order as the numbers do: three histograms, each of the scores that share the
  // digits found so far.
  uint32_t found = 0;
  int wanted = p.kept, shift = 31;
  for (const int digit : {11, 11, 9}) {
    const uint32_t known = shift == 31 ? 0 : ~0u << shift;
    shift -= digit;
    int histogram[1 << 11] = {};
    for (int i = 0; i < p.candidates; ++i) {
      const uint32_t bits = bits_of(scores[i]);
      if ((bits & known) == found) ++histogram[bits >> shift & ((1u << digit) - 1)];
    }
    int bin = (1 << digit) - 1;
    while (histogram[bin] < wanted) wanted -= histogram[bin--];
    found |= uint32_t(bin) << shift;
  }
  for (int i = 0; i < p.candidates && count < p.kept; ++i) {
    const uint32_t bits = bits_of(scores[i]);
    if (bits > found || (bits == found && wanted-- > 0)) p.neurons[count++] = neuron(i);
  }
  *p.count = count;
  if (!p.taken) return;
  float* taken = scores;
  for (int j = 0; j < p.num_rows; ++j) {
    for (int i = 0; i < count; ++i) taken[i] = p.values[size_t(j) * p.intermediate + p.neurons[i]];
    kernels(p.dtype).store(taken, nullptr, 1.0f, 0.0f, nullptr, count, offset(p.taken, size_t(j) * p.kept, p.dtype));
  }
}

void follow_layer(const FollowParams& p, int layer) {
  const Kernels& k = kernels(p.dtype);
  float* scores = scratch<float>(Scratch::second, p.intermediate);
  int32_t* list = scratch<int32_t>(Scratch::neurons, p.intermediate);
  const size_t at = size_t(layer) * p.intermediate;
  float* statistic = p.statistic + at;
  for (int i = 0; i < p.count; ++i) {
    const void* z = offset(p.z, at * p.num_rows + size_t(p.rows[i]) * p.intermediate, p.dtype);
    const float sum = k.square_sum(z, p.intermediate);
    // A row that is all zero uses no neuron, and adds nothing.
    k.blend_squares(z, p.intermediate, p.decay, sum > 0.0f ? (1.0f - p.decay) / sum : 0.0f, statistic);
  }
  for (int i = 0; i < p.intermediate; ++i) scores[i] = statistic[i] * p.down_squares[at + i];
  int32_t count;
  select({.values = scores,
          .neurons = list,
          .count = &count,
          .num_rows = 1,
          .intermediate = p.intermediate,
          .candidates = p.intermediate,
          .kept = p.kept});
  std::copy_n(list, p.kept, p.neurons + size_t(layer) * p.kept);
}

void follow(const FollowParams& p) {
  // A thread has whole layers: no sum depends on the number of threads, and none waits for another.
  const Range range = share(p.layers);
  for (int layer = range.begin; layer < range.end; ++layer) follow_layer(p, layer);
}

void up(const UpParams& p) {
  const Kernels& k = kernels(p.dtype);
  const auto neuron = [&](int i) { return p.neurons ? p.neurons[i] : i; };
  const auto row_at = [&](int i) { return p.up.place(neuron(i)); };
  Products(p.up, p.dtype, p.x, p.num_rows).each_chunk(p.up, p.num_neurons, row_at, [&](int j, int i, int n, float* sums) {
    const float* gates = p.gates + size_t(j) * p.up.rows;
    for (int r = 0; r < n; ++r) sums[r] *= gates[neuron(i + r)];
    if (p.spread) {
      float* out = static_cast<float*>(p.out) + size_t(j) * p.up.rows;
      for (int r = 0; r < n; ++r) out[neuron(i + r)] = sums[r];
      return;
    }
    k.store(sums, nullptr, 1.0f, 0.0f, nullptr, n, offset(p.out, size_t(j) * p.num_neurons + i, p.dtype));
  });
}

namespace {

// The neurons are summed in parts, and the parts in order: where they are cut depends on the number of neurons alone, so that a
// sum never depends on the number of threads. Whole rows are read: in stretches of columns, hardware prefetchers run past each
// stretch's end, and two threads are no faster than one (measured).
struct Parts {
  int count, length;

  explicit Parts(int num_neurons) : count(num_neurons < 4096 ? 4 : 8) {
    length = (num_neurons + count - 1) / count;
    length = (length + 31) / 32 * 32;  // see MatrixKernels::sum
  }
};

}  // namespace

void down(const DownParams& p) {
  const MatrixKernels& matrix = matrix_kernels(p.down.format, p.dtype);
  const int hidden = p.down.cols;
  const Parts parts(p.num_neurons);
  // Columns are divided too where that lets every thread have an equal number of tasks.
  const int slices = std::clamp(member.size / std::gcd(member.size, parts.count), 1, std::max(1, hidden / 256));
  const int slice_width = ((hidden + slices - 1) / slices + 31) / 32 * 32;
  const size_t plane = size_t(p.num_rows) * hidden;

  const Range tasks = share(parts.count * slices);
  for (int task = tasks.begin; task < tasks.end; ++task) {
    const int first = std::min(task / slices * parts.length, p.num_neurons), last = std::min(first + parts.length, p.num_neurons);
    const int begin = std::min(task % slices * slice_width, hidden), end = std::min(begin + slice_width, hidden);
    float* acc = p.workspace + task / slices * plane;
    for (int j = 0; j < p.num_rows; ++j) std::fill(acc + size_t(j) * hidden + begin, acc + size_t(j) * hidden + end, 0.0f);
    static_assert(kChunk % 32 == 0, "sums may be cut at multiples of 32 rows only");
    const auto neuron_at = [&](int i) { return p.neurons ? p.neurons[i] : i; };
    const auto row_at = [&](int i) { return p.down.place(neuron_at(i)); };
    const auto group_of = [&](int i) { return matrix.together == 1 ? 0 : neuron_at(i) / matrix.together; };
    // Where the rows that are added up with row i end, of those before `limit`.
    const auto end_of = [&](int i, int limit) {
      if (matrix.together == 1) return std::min(i + kChunk, limit);
      int next = i + 1;
      while (next < std::min(i + matrix.together, limit) && group_of(next) == group_of(i)) ++next;
      return next;
    };
    for (int i = first, next; i < last; i = next) {
      next = end_of(i, last);
      const int ahead = matrix.together == 1 || next == p.num_neurons ? p.num_neurons : end_of(next, p.num_neurons);
      Rows<> rows;
      rows.fill(i, next - i, ahead, row_at);
      matrix.sum(rows.all(), next - i, offset(p.x, i, p.dtype), p.num_neurons, p.num_rows, p.down.form(group_of(i)), begin, end,
                 acc, hidden);
    }
  }
  sync();

  const Range columns = share(hidden, 16);
  const int width = columns.end - columns.begin;
  if (width == 0) return;
  for (int j = 0; j < p.num_rows; ++j) {
    const size_t at = size_t(j) * hidden + columns.begin;
    float* acc = p.workspace + at;
    for (int part = 1; part < parts.count; ++part)
      for (int c = 0; c < width; ++c) acc[c] += acc[part * plane + c];
    kernels(p.dtype).store(acc, nullptr, p.scale, 0.0f, p.residual ? offset(p.residual, at, p.dtype) : nullptr, width,
                           offset(p.out, at, p.dtype));
  }
}

size_t down_workspace(int num_rows, int hidden, int num_neurons) { return size_t(Parts(num_neurons).count) * num_rows * hidden; }

}  // namespace sirius::cpu
