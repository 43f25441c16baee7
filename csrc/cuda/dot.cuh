// Rows of weights, wherever they are, times 1..16 rows of input: what gate, up and the projections of attention share.
//
// A block has sixteen rows of each of its matrices; its warps take turns at 128 bytes of every row, and their sums are added up
// in order. How a row is cut depends on its length alone, so a column's bits depend neither on the other columns nor on the grid.
// Bytes that must move: the weights', once for every 16 rows of input. Input comes from L1.
#pragma once

#include "mma.cuh"
#include "norm.cuh"
#include "weights.cuh"

namespace sirius::cuda {

constexpr int kDotWarps = 8;

// Blocks that a multiprocessor shall hold at a time, so that enough loads are in flight: it limits the registers of a thread. The
// bodies that are not for speed, float32 and unaligned rows, take as many as they want.
template <class T, bool Aligned, int Columns, int Matrices>
constexpr int kDotBlocks = sizeof(T) == 4 || !Aligned ? 1
                           : Columns * Matrices == 8  ? 3
                                                      : 2;

// Rows of input. x: T [num_rows, width]; those of this block start at `first`.
struct Input {
  const void* x;
  Norm norm;
  int num_rows, width;
};

template <int Columns, int Matrices>
struct DotShared {
  float scale[Columns];
  float parts[kDotWarps][Matrices][kTileRows][Columns];

  // The product of row `row` of the tile of a matrix with row `column` of the block's input.
  __device__ __forceinline__ float sum(int matrix, int row, int column) const {
    float total = parts[0][matrix][row][column];
#pragma unroll
    for (int i = 1; i < kDotWarps; ++i) total += parts[i][matrix][row][column];
    return total;
  }
};

template <class T, bool Aligned, int Columns>
class InputRows {
 public:
  using Sums = Tile<T, Columns>;

  __device__ InputRows(const Input& in, float (&scale)[Columns])
      : x_(static_cast<const T*>(in.x)), norm_(static_cast<const T*>(in.norm.weight)), offset_(in.norm.offset), width_(in.width) {
    const int first = int(blockIdx.y) * kTileRows;
    x_ += size_t(first) * width_;
    rows_ = in.num_rows - first < Columns ? in.num_rows - first : Columns;
    if (!norm_) return;
    for (int row = int(threadIdx.x) / kWarp; row < Columns; row += kDotWarps) {
      const float value = row < rows_ ? inverse_rms<Aligned>(x_ + size_t(row) * width_, width_, in.norm.eps) : 0.0f;
      if (threadIdx.x % kWarp == 0) scale[row] = value;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Sums::kInputs; ++i) scale_[i] = scale[Sums::column(i)];
  }

  __device__ int rows() const { return rows_; }

  // Elements [k, k + Vec::size) of the rows that this lane multiplies.
  __device__ __forceinline__ void load(int k, Vec<T> (&out)[Sums::kInputs]) const {
    Vec<T> weight;
    if (norm_) weight = load_part<Aligned>(norm_, k, width_);
#pragma unroll
    for (int i = 0; i < Sums::kInputs; ++i) {
      const int row = Sums::column(i);
      out[i] = load_part<Aligned>(x_ + size_t(row) * width_, k, row < rows_ ? width_ : 0);
      if (!norm_) continue;
#pragma unroll
      for (int j = 0; j < Vec<T>::size; ++j)
        out[i].v[j] = from_float<T>(to_float(out[i].v[j]) * scale_[i] * (to_float(weight.v[j]) + offset_));
    }
  }

 private:
  const T *x_, *norm_;
  float offset_;
  int width_, rows_;
  float scale_[Sums::kInputs];
};

// Leaves every sum of the block's tiles in `shared`. row_at(matrix, row): the WeightRow of one of the 16 rows of a matrix, of
// which each must be readable.
template <class T, bool Aligned, int Columns, int Matrices, class RowAt>
__device__ __forceinline__ void dot_rows(const InputRows<T, Aligned, Columns>& input, int width,
                                         DotShared<Columns, Matrices>& shared, RowAt&& row_at) {
  constexpr int kPart = 4 * Vec<T>::size;  // elements of a row that a warp loads at a time: 64 bytes
  constexpr int kParts = 2;
  const int warp = int(threadIdx.x) / kWarp;
  WeightRow<T, Aligned> rows[Matrices][2];
#pragma unroll
  for (int m = 0; m < Matrices; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) rows[m][half] = row_at(m, lane_row() + half * 8);

  Tile<T, Columns> tiles[Matrices];
#pragma unroll(Matrices == 1 && sizeof(T) == 2 && Aligned ? 2 : 1)  // bodies that are not for speed stay small
  for (int begin = warp * kParts * kPart; begin < width; begin += kDotWarps * kParts * kPart) {
    Vec<T> weights[kParts][Matrices][2];
#pragma unroll
    for (int i = 0; i < kParts; ++i)
#pragma unroll
      for (int m = 0; m < Matrices; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          weights[i][m][half] = rows[m][half].load(begin + i * kPart + lane_part() * Vec<T>::size, width);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      Vec<T> x[Tile<T, Columns>::kInputs];
      input.load(begin + i * kPart + lane_part() * Vec<T>::size, x);
#pragma unroll
      for (int m = 0; m < Matrices; ++m) tiles[m].add(weights[i][m][0], weights[i][m][1], x);
    }
  }
#pragma unroll
  for (int m = 0; m < Matrices; ++m) tiles[m].put(shared.parts[warp][m]);
  __syncthreads();
}

// body(row of the tile, row of the input) for every sum, one thread each.
template <int Columns, class Body>
__device__ __forceinline__ void for_each_sum(int rows, int input_rows, Body&& body) {
  for (int i = int(threadIdx.x); i < kTileRows * Columns; i += kDotWarps * kWarp)
    if (i % kTileRows < rows && i / kTileRows < input_rows) body(i % kTileRows, i / kTileRows);
}

inline dim3 dot_grid(int rows, int num_rows) { return dim3(ceil_div(rows, kTileRows), ceil_div(num_rows, kTileRows)); }

// Whether every row of a [*, width] array of T can be read by 16-byte loads.
template <class T>
bool rows_aligned(const void* array, int width) {
  return aligned16(array) && width % Vec<T>::size == 0;
}

}  // namespace sirius::cuda
