// The MLP's products that read rows of gate and up: gate_up, gate and up.
#include "dot.cuh"

namespace sirius::cuda {
namespace {

// grid: [neurons / 16, rows of input / 16]
template <class T, class W, bool Aligned, int Columns>
__global__ void __launch_bounds__(kDotWarps* kWarp, (kDotBlocks<T, Aligned, Columns, 2>))
    gate_up_kernel(const GateUpParams p, const Norm norm) {
  auto& shared = shared_memory<DotShared<T, W, Columns, 2>>();
  const int first = int(blockIdx.x) * kTileRows;
  const InputRows<T, Aligned, Columns> input({p.x, norm, p.num_rows, p.gate.cols}, shared.scale);
  dot_rows(input, p.gate.cols, shared, [&](int matrix, int row) {
    const int i = first + row < p.num_neurons ? first + row : p.num_neurons - 1;
    return WeightRow<T, W, Aligned>(matrix == 0 ? p.gate : p.up, p.neurons ? p.neurons[i] : i);
  });
  for_each_sum<Columns>(p.num_neurons - first, input.rows(), [&](int row, int column) {
    const size_t at = (size_t(blockIdx.y) * kTileRows + column) * p.num_neurons + first + row;
    const float gate = activate(p.activation, shared.sum(0, row, column));
    static_cast<T*>(p.out)[at] = from_float<T>(gate * shared.sum(1, row, column));
  });
}

// grid: [neurons / 16, rows of input / 16]
template <class T, class W, bool Aligned, int Columns>
__global__ void __launch_bounds__(kDotWarps* kWarp, (kDotBlocks<T, Aligned, Columns, 1>))
    gate_kernel(const GateParams p, const Norm norm) {
  auto& shared = shared_memory<DotShared<T, W, Columns, 1>>();
  const int first = int(blockIdx.x) * kTileRows;
  const auto neuron = [&](int i) { return p.neurons ? p.neurons[i] : i; };
  const InputRows<T, Aligned, Columns> input({p.x, norm, p.num_rows, p.gate.cols}, shared.scale);
  dot_rows(input, p.gate.cols, shared, [&](int, int row) {
    return WeightRow<T, W, Aligned>(p.gate, neuron(first + row < p.num_neurons ? first + row : p.num_neurons - 1));
  });
  for_each_sum<Columns>(p.num_neurons - first, input.rows(), [&](int row, int column) {
    const size_t line = size_t(blockIdx.y) * kTileRows + column;
    p.out[line * p.gate.rows + neuron(first + row)] = activate(p.activation, shared.sum(0, row, column));
  });
}

// grid: [neurons / 16, rows of input / 16]; blocks beyond the neurons that there are leave
template <class T, class W, bool Aligned, int Columns>
__global__ void __launch_bounds__(kDotWarps* kWarp, (kDotBlocks<T, Aligned, Columns, 1>))
    up_kernel(const UpParams p, const Norm norm) {
  auto& shared = shared_memory<DotShared<T, W, Columns, 1>>();
  const int first = int(blockIdx.x) * kTileRows, neurons = p.num_neurons_at ? *p.num_neurons_at : p.num_neurons;
  if (first >= neurons) return;
  const InputRows<T, Aligned, Columns> input({p.x, norm, p.num_rows, p.up.cols}, shared.scale);
  dot_rows(input, p.up.cols, shared, [&](int, int row) {
    return WeightRow<T, W, Aligned>(p.up, p.neurons[first + row < neurons ? first + row : neurons - 1]);
  });
  for_each_sum<Columns>(neurons - first, input.rows(), [&](int row, int column) {
    const size_t line = size_t(blockIdx.y) * kTileRows + column;
    const size_t place = line * p.up.rows + p.neurons[first + row];
    const float value = p.gates[place] * shared.sum(0, row, column);
    if (p.spread)
      static_cast<float*>(p.out)[place] = value;
    else
      static_cast<T*>(p.out)[line * p.num_neurons + first + row] = from_float<T>(value);
  });
}

}  // namespace

void gate_up(const GateUpParams& p, const Norm& norm, Workspace, StreamHandle stream) {
  with_body(p.dtype, p.x, {&p.gate, &p.up}, norm, p.num_rows, [&](auto type, auto format, auto aligned, auto columns) {
    using T = typename decltype(type)::type;
    using W = typename decltype(format)::type;
    launch("gate_up", gate_up_kernel<T, W, aligned.value, columns.value>, dot_grid(p.num_neurons, p.num_rows), kDotWarps * kWarp,
           sizeof(DotShared<T, W, columns.value, 2>), stream, p, norm);
  });
}

void gate(const GateParams& p, const Norm& norm, Workspace, StreamHandle stream) {
  with_body(p.dtype, p.x, {&p.gate}, norm, p.num_rows, [&](auto type, auto format, auto aligned, auto columns) {
    using T = typename decltype(type)::type;
    using W = typename decltype(format)::type;
    launch("gate", gate_kernel<T, W, aligned.value, columns.value>, dot_grid(p.num_neurons, p.num_rows), kDotWarps * kWarp,
           sizeof(DotShared<T, W, columns.value, 1>), stream, p, norm);
  });
}

void up(const UpParams& p, const Norm& norm, Workspace, StreamHandle stream) {
  if (p.num_neurons == 0) return;
  with_body(p.dtype, p.x, {&p.up}, norm, p.num_rows, [&](auto type, auto format, auto aligned, auto columns) {
    using T = typename decltype(type)::type;
    using W = typename decltype(format)::type;
    launch("up", up_kernel<T, W, aligned.value, columns.value>, dot_grid(p.num_neurons, p.num_rows), kDotWarps * kWarp,
           sizeof(DotShared<T, W, columns.value, 1>), stream, p, norm);
  });
}

}  // namespace sirius::cuda
