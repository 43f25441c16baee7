#include "dot.cuh"

namespace sirius::cuda {
namespace {

// An output's row of weights: in which of the parts, and where there.
struct Place {
  int part, row;

  __device__ __forceinline__ Place(const LinearParams& p, int output) : part(0), row(output) {
    if (p.num_parts > 1 && row >= p.parts[0].weight.rows) {
      row -= p.parts[0].weight.rows;
      part = 1;
      if (p.num_parts > 2 && row >= p.parts[1].weight.rows) {
        row -= p.parts[1].weight.rows;
        part = 2;
      }
    }
  }
};

// grid: [tiles of some parts' outputs, rows of input / 16]
template <class T, class W, bool Aligned, int Columns>
__global__ void __launch_bounds__(kDotWarps* kWarp, (kDotBlocks<T, Aligned, Columns, 1>))
    linear_kernel(const LinearParams p, const Norm norm, const Tiling tiling, Format format) {
  auto& shared = shared_memory<DotShared<T, W, Columns, 1>>();
  const Input in{p.x, norm, p.num_rows, p.parts[0].weight.cols, format};
  for_each_tile<false, T, W, Aligned>(
      in, shared, tiling.tiles, [&](int tile, int row) { return tiling.at(tile, row); },
      [&](int, int line) {
        const Place at(p, line);
        return WeightRow<T, W, Aligned>(projection_at(p.parts, at.part).weight, at.row);
      },
      [&](int tile, int input_rows) {
        for_each_sum<Columns>(tiling.count(tile), input_rows, [&](int row, int column) {
          const size_t to = (size_t(blockIdx.y) * kTileRows + column) * p.out_features + tiling.first(tile) + row;
          const Place at(p, tiling.first(tile) + row);
          float sum = shared.sum(0, row, column);
          if (const T* bias = static_cast<const T*>(projection_at(p.parts, at.part).bias)) sum += to_float(bias[at.row]);
          const float residual = p.residual ? to_float(static_cast<const T*>(p.residual)[to]) : 0.0f;
          const float value = scaled(sum, p.scale, p.softcap, residual);
          if (p.out_f32)
            static_cast<float*>(p.out)[to] = value;
          else
            static_cast<T*>(p.out)[to] = from_float<T>(value);
        });
      });
}

}  // namespace

void linear(const LinearParams& p, const Norm& norm, Workspace, StreamHandle stream) {
  int done = 0;
  with_bodies(p, norm, [&](auto type, auto format, auto aligned, auto columns, int begin, int end) {
    using T = typename decltype(type)::type;
    using W = typename decltype(format)::type;
    int rows = 0;
    for (int i = begin; i < end; ++i) rows += p.parts[i].weight.rows;
    const Tiling tiling(rows, done);
    launch<linear_kernel<T, W, aligned.value, columns.value>>("linear", tiling.grid(p.num_rows), kDotWarps * kWarp,
                                                              DotShared<T, W, columns.value, 1>::bytes(p.parts[0].weight.cols),
                                                              stream, p, norm, tiling, p.parts[begin].weight.format);
    done += rows;
  });
}

}  // namespace sirius::cuda
