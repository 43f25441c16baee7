// The MLP's products that read rows of gate and up: gate_up, gate and up.
#include "dot.cuh"

namespace sirius::cuda {
namespace {

// grid: [neurons / a tile's, rows of input / 16]
template <class T, class W, bool Aligned, int Columns>
__global__ void __launch_bounds__(kDotWarps* kWarp, (kDotBlocks<T, Aligned, Columns, 2>))
    gate_up_kernel(const GateUpParams p, const Norm norm, const Tiling tiling) {
  auto& shared = shared_memory<DotShared<T, W, Columns, 2>>();
  const Input in{p.x, norm, p.num_rows, p.gate.cols, p.gate.format};
  if (p.neurons && !p.settled) wait_for_kernel_before();
  const int input_rows = dot_rows<T, W, Aligned>(in, shared, [&](int matrix, int row) {
    const int i = tiling.at(row);
    return WeightRow<T, W, Aligned>(matrix == 0 ? p.gate : p.up, p.neurons ? p.neurons[i] : i);
  });
  for_each_sum<Columns>(tiling.count(), input_rows, [&](int row, int column) {
    const size_t at = (size_t(blockIdx.y) * kTileRows + column) * p.num_neurons + tiling.first() + row;
    const float gate = activate(p.activation, shared.sum(0, row, column));
    static_cast<T*>(p.out)[at] = from_float<T>(gate * shared.sum(1, row, column));
  });
}

// grid: [neurons / a tile's, rows of input / 16]
template <class T, class W, bool Aligned, int Columns>
__global__ void __launch_bounds__(kDotWarps* kWarp, (kDotBlocks<T, Aligned, Columns, 1>))
    gate_kernel(const GateParams p, const Norm norm, const Tiling tiling) {
  auto& shared = shared_memory<DotShared<T, W, Columns, 1>>();
  const auto neuron = [&](int i) { return p.neurons ? p.neurons[i] : i; };
  const Input in{p.x, norm, p.num_rows, p.gate.cols, p.gate.format};
  if (p.neurons && !p.settled) wait_for_kernel_before();
  const int input_rows =
      dot_rows<T, W, Aligned>(in, shared, [&](int, int row) { return WeightRow<T, W, Aligned>(p.gate, neuron(tiling.at(row))); });
  for_each_sum<Columns>(tiling.count(), input_rows, [&](int row, int column) {
    const size_t line = size_t(blockIdx.y) * kTileRows + column;
    p.out[line * p.gate.rows + neuron(tiling.first() + row)] = activate(p.activation, shared.sum(0, row, column));
  });
}

// grid: [neurons / a tile's, rows of input / 16]; blocks beyond the neurons that there are leave
template <class T, class W, bool Aligned, int Columns>
__global__ void __launch_bounds__(kDotWarps* kWarp, (kDotBlocks<T, Aligned, Columns, 1>))
    up_kernel(const UpParams p, const Norm norm, Tiling tiling) {
  auto& shared = shared_memory<DotShared<T, W, Columns, 1>>();
  const auto neuron = [&](int i) { return p.neurons ? p.neurons[i] : i; };
  wait_for_kernel_before();  // it chose the neurons
  if (p.num_neurons_at) tiling.rows = *p.num_neurons_at;
  if (tiling.count() <= 0) return;
  const Input in{p.x, norm, p.num_rows, p.up.cols, p.up.format};
  const int input_rows =
      dot_rows<T, W, Aligned>(in, shared, [&](int, int row) { return WeightRow<T, W, Aligned>(p.up, neuron(tiling.at(row))); });
  for_each_sum<Columns>(tiling.count(), input_rows, [&](int row, int column) {
    const size_t line = size_t(blockIdx.y) * kTileRows + column;
    const size_t place = line * p.up.rows + neuron(tiling.first() + row);
    const float value = p.gates[place] * shared.sum(0, row, column);
    if (p.spread)
      static_cast<float*>(p.out)[place] = value;
    else
      static_cast<T*>(p.out)[line * p.num_neurons + tiling.first() + row] = from_float<T>(value);
  });
}

}  // namespace

void gate_up(const GateUpParams& p, const Norm& norm, Workspace, StreamHandle stream) {
  const Tiling tiling(p.num_neurons);
  with_body(p.dtype, p.x, {&p.gate, &p.up}, norm, p.num_rows, [&](auto type, auto format, auto aligned, auto columns) {
    using T = typename decltype(type)::type;
    using W = typename decltype(format)::type;
    launch<gate_up_kernel<T, W, aligned.value, columns.value>>("gate_up", tiling.grid(p.num_rows), kDotWarps * kWarp,
                                                               DotShared<T, W, columns.value, 2>::bytes(p.gate.cols), stream, p,
                                                               norm, tiling);
  });
}

void gate(const GateParams& p, const Norm& norm, Workspace, StreamHandle stream) {
  const Tiling tiling(p.num_neurons);
  with_body(p.dtype, p.x, {&p.gate}, norm, p.num_rows, [&](auto type, auto format, auto aligned, auto columns) {
    using T = typename decltype(type)::type;
    using W = typename decltype(format)::type;
    launch<gate_kernel<T, W, aligned.value, columns.value>>("gate", tiling.grid(p.num_rows), kDotWarps * kWarp,
                                                            DotShared<T, W, columns.value, 1>::bytes(p.gate.cols), stream, p,
                                                            norm, tiling);
  });
}

void up(const UpParams& p, const Norm& norm, Workspace, StreamHandle stream) {
  if (p.num_neurons == 0) return;
  const Tiling tiling(p.num_neurons);
  with_body(p.dtype, p.x, {&p.up}, norm, p.num_rows, [&](auto type, auto format, auto aligned, auto columns) {
    using T = typename decltype(type)::type;
    using W = typename decltype(format)::type;
    launch<up_kernel<T, W, aligned.value, columns.value>>("up", tiling.grid(p.num_rows), kDotWarps * kWarp,
                                                          DotShared<T, W, columns.value, 1>::bytes(p.up.cols), stream, p, norm,
                                                          tiling);
  });
}

}  // namespace sirius::cuda
