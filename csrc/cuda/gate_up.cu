// The MLP's products that read rows of gate and up: gate_up, gate and up.
#include "dot.cuh"

namespace sirius::cuda {
namespace {

// grid: [blocks for the tiles of neurons, rows of input / 16]
template <class T, class W, bool Aligned, int Columns>
__global__ void __launch_bounds__(kDotWarps* kWarp, (kDotBlocks<T, Aligned, Columns, 2>))
    gate_up_kernel(const GateUpParams p, const Norm norm, const Tiling tiling) {
  auto& shared = shared_memory<DotShared<T, W, Columns, 2>>();
  const Input in{p.x, norm, p.num_rows, p.gate.cols, p.gate.format};
  if (p.neurons && !p.settled) wait_for_kernel_before();
  for_each_tile<true, T, W, Aligned>(
      in, shared, tiling.tiles,
      [&](int tile, int row) {
        const int i = tiling.at(tile, row);
        return p.neurons ? p.neurons[i] : i;
      },
      [&](int matrix, int neuron) { return WeightRow<T, W, Aligned>(matrix == 0 ? p.gate : p.up, neuron); },
      [&](int tile, int input_rows) {
        for_each_sum<Columns>(tiling.count(tile), input_rows, [&](int row, int column) {
          const size_t at = (size_t(blockIdx.y) * kTileRows + column) * p.num_neurons + tiling.first(tile) + row;
          const float gate = activate(p.activation, shared.sum(0, row, column));
          static_cast<T*>(p.out)[at] = from_float<T>(gate * shared.sum(1, row, column));
        });
      });
}

// grid: [tiles of neurons, rows of input / 16]
template <class T, class W, bool Aligned, int Columns>
__global__ void __launch_bounds__(kDotWarps* kWarp, (kDotBlocks<T, Aligned, Columns, 1>))
    gate_kernel(const GateParams p, const Norm norm, const Tiling tiling) {
  auto& shared = shared_memory<DotShared<T, W, Columns, 1>>();
  const auto neuron = [&](int i) { return p.neurons ? p.neurons[i] : i; };
  const Input in{p.x, norm, p.num_rows, p.gate.cols, p.gate.format};
  if (p.neurons && !p.settled) wait_for_kernel_before();
  for_each_tile<false, T, W, Aligned>(
      in, shared, tiling.tiles, [&](int tile, int row) { return neuron(tiling.at(tile, row)); },
      [&](int, int line) { return WeightRow<T, W, Aligned>(p.gate, line); },
      [&](int tile, int input_rows) {
        for_each_sum<Columns>(tiling.count(tile), input_rows, [&](int row, int column) {
          const size_t line = size_t(blockIdx.y) * kTileRows + column;
          p.out[line * p.gate.rows + neuron(tiling.first(tile) + row)] = activate(p.activation, shared.sum(0, row, column));
        });
      });
}

// grid: [tiles of neurons, rows of input / 16]; blocks beyond the neurons that there are leave
template <class T, class W, bool Aligned, int Columns>
__global__ void __launch_bounds__(kDotWarps* kWarp, (kDotBlocks<T, Aligned, Columns, 1>))
    up_kernel(const UpParams p, const Norm norm, Tiling tiling) {
  auto& shared = shared_memory<DotShared<T, W, Columns, 1>>();
  const auto neuron = [&](int i) { return p.neurons ? p.neurons[i] : i; };
  wait_for_kernel_before();  // it chose the neurons
  if (p.num_neurons_at) tiling.rows = *p.num_neurons_at;
  if (tiling.count(int(blockIdx.x)) <= 0) return;
  const Input in{p.x, norm, p.num_rows, p.up.cols, p.up.format};
  for_each_tile<false, T, W, Aligned>(
      in, shared, tiling.tiles, [&](int tile, int row) { return neuron(tiling.at(tile, row)); },
      [&](int, int line) { return WeightRow<T, W, Aligned>(p.up, line); },
      [&](int tile, int input_rows) {
        for_each_sum<Columns>(tiling.count(tile), input_rows, [&](int row, int column) {
          const size_t line = size_t(blockIdx.y) * kTileRows + column;
          const size_t place = line * p.up.rows + neuron(tiling.first(tile) + row);
          const float value = p.gates[place] * shared.sum(0, row, column);
          if (p.spread)
            static_cast<float*>(p.out)[place] = value;
          else
            static_cast<T*>(p.out)[line * p.num_neurons + tiling.first(tile) + row] = from_float<T>(value);
        });
      });
}

}  // namespace

void gate_up(const GateUpParams& p, const Norm& norm, Workspace, StreamHandle stream) {
  with_body(p.dtype, p.x, {&p.gate, &p.up}, norm, p.num_rows, [&](auto type, auto format, auto aligned, auto columns) {
    using T = typename decltype(type)::type;
    using W = typename decltype(format)::type;
    const int together = kDotBlocks<T, aligned.value, columns.value, 2> * multiprocessors();
    const Tiling tiling(p.num_neurons, 0, std::max(1, together / ceil_div(p.num_rows, kTileRows)));
    launch<gate_up_kernel<T, W, aligned.value, columns.value>>("gate_up", tiling.grid(p.num_rows), kDotWarps * kWarp,
                                                               DotShared<T, W, columns.value, 2>::bytes(p.gate.cols), stream, p,
                                                               norm, tiling);
  });
}

void gate(const GateParams& p, const Norm& norm, Workspace, StreamHandle stream) {
  with_body(p.dtype, p.x, {&p.gate}, norm, p.num_rows, [&](auto type, auto format, auto aligned, auto columns) {
    using T = typename decltype(type)::type;
    using W = typename decltype(format)::type;
    const Tiling tiling(p.num_neurons);
    launch<gate_kernel<T, W, aligned.value, columns.value>>("gate", tiling.grid(p.num_rows), kDotWarps * kWarp,
                                                            DotShared<T, W, columns.value, 1>::bytes(p.gate.cols), stream, p,
                                                            norm, tiling);
  });
}

void up(const UpParams& p, const Norm& norm, Workspace, StreamHandle stream) {
  if (p.num_neurons == 0) return;
  with_body(p.dtype, p.x, {&p.up}, norm, p.num_rows, [&](auto type, auto format, auto aligned, auto columns) {
    using T = typename decltype(type)::type;
    using W = typename decltype(format)::type;
    const Tiling tiling(p.num_neurons);
    launch<up_kernel<T, W, aligned.value, columns.value>>("up", tiling.grid(p.num_rows), kDotWarps * kWarp,
                                                          DotShared<T, W, columns.value, 1>::bytes(p.up.cols), stream, p, norm,
                                                          tiling);
  });
}

}  // namespace sirius::cuda
