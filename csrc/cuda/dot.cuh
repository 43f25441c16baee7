// Rows of weights, wherever they are, times 1..16 rows of input: what gate, up and the projections of attention share.
//
// A block has sixteen rows of each of its matrices; its warps take turns at 128 bytes of every row, and their sums are added up
// in order. How a row is cut depends on its length alone, so a column's bits depend neither on the other columns nor on the grid.
// Bytes that must move: the weights', once for every 16 rows of input. Input comes from L1.
#pragma once

#include <initializer_list>

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

template <class T, class W, int Columns, int Matrices>
struct DotShared {
  // Of a warp: first what it needs to read weights, then its sums.
  union Warp {
    typename WeightRow<T, W, true>::Scratch scratch[Matrices];
    float parts[Matrices][kTileRows][Columns];
  };
  Warp warps[kDotWarps];
  float scale[Columns];

  // The product of row `row` of the tile of a matrix with row `column` of the block's input.
  __device__ __forceinline__ float sum(int matrix, int row, int column) const {
    float total = warps[0].parts[matrix][row][column];
#pragma unroll
    for (int i = 1; i < kDotWarps; ++i) total += warps[i].parts[matrix][row][column];
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
    Vec<T> weight{};
    if (norm_) weight = load_part<Aligned>(norm_, k, width_);
#pragma unroll
    for (int i = 0; i < Sums::kInputs; ++i) {
      const int row = Sums::column(i);
      out[i] = load_part<Aligned>(x_ + size_t(row) * width_, k, row < rows_ ? width_ : 0);
      if (!norm_) continue;
      float normed[Vec<T>::size];
#pragma unroll
      for (int j = 0; j < Vec<T>::size; ++j) normed[j] = out[i][j] * scale_[i] * (weight[j] + offset_);
      out[i] = Vec<T>::rounded(normed);
    }
  }

 private:
  const T *x_, *norm_;
  float offset_;
  int width_, rows_;
  float scale_[Sums::kInputs];
};

// Adds what this warp has of the rows to its tiles. The lane's rows are lane_row() and lane_row() + 8 of each matrix.
template <class T, class W, bool Aligned, int Columns, int Matrices>
__device__ __forceinline__ void add_products(const InputRows<T, Aligned, Columns>& input, int width,
                                             const WeightRow<T, W, Aligned> (&rows)[Matrices][2], NoScratch (&)[Matrices],
                                             Tile<T, Columns> (&tiles)[Matrices]) {
  constexpr int kPart = 4 * Vec<T>::size;  // elements of a row that a warp loads at a time: 64 bytes
  constexpr int kParts = 2;
  constexpr bool kAhead = sizeof(T) == 2 && Aligned;  // the other bodies stay small
  const int begin = int(threadIdx.x) / kWarp * kParts * kPart;
  Vec<T> loaded[kParts][Matrices][2], weights[kParts][Matrices][2];
  const auto load = [&](int step) {
#pragma unroll
    for (int i = 0; i < kParts; ++i)
#pragma unroll
      for (int m = 0; m < Matrices; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          loaded[i][m][half] = rows[m][half].load(step + i * kPart + lane_part() * Vec<T>::size, width);
  };
  const auto take = [&] {
#pragma unroll
    for (int i = 0; i < kParts; ++i)
#pragma unroll
      for (int m = 0; m < Matrices; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) weights[i][m][half] = loaded[i][m][half];
  };
  if (kAhead) load(begin);
  in_steps<kAhead>(begin, width, kDotWarps * kParts * kPart, load, take, [&](int step) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      Vec<T> x[Tile<T, Columns>::kInputs];
      input.load(step + i * kPart + lane_part() * Vec<T>::size, x);
#pragma unroll
      for (int m = 0; m < Matrices; ++m) tiles[m].add(weights[i][m][0], weights[i][m][1], x);
    }
  });
}

// The same of rows in eight bits. A warp loads four groups of a row at a time, 64 bytes of a plane.
template <class T, bool kUpper, bool Aligned, int Columns, int Matrices>
__device__ __forceinline__ void add_products(const InputRows<T, Aligned, Columns>& input, int width,
                                             const WeightRow<T, Q8<kUpper>, Aligned> (&rows)[Matrices][2],
                                             Q8Codes (&codes)[Matrices], Tile<T, Columns> (&tiles)[Matrices]) {
  constexpr bool kAhead = kUpper || Columns * Matrices < 32;
  const int groups = q8::groups(width), begin = int(threadIdx.x) / kWarp * kStepGroups;
  Q8Group<kUpper> loaded[Matrices][2];
  const auto load = [&](int first) {
#pragma unroll
    for (int m = 0; m < Matrices; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) rows[m][half].load(loaded[m][half], first + lane_part(), width);
  };
  const auto take = [&] {
    __syncwarp();  // all lanes have used the codes before
#pragma unroll
    for (int m = 0; m < Matrices; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) codes[m].put(lane_row() + half * 8, lane_part(), loaded[m][half]);
    __syncwarp();
  };
  if (kAhead) load(begin);
  in_steps<kAhead>(begin, groups, kDotWarps * kStepGroups, load, take, [&](int first) {
#pragma unroll(Aligned ? 2 : 1)
    for (int i = 0; i < kStepGroups; ++i) {
      if (first + i >= groups) break;
      Vec<T> x[Tile<T, Columns>::kInputs];
      input.load((first + i) * q8::kGroup + lane_part() * Vec<T>::size, x);
#pragma unroll
      for (int m = 0; m < Matrices; ++m) {
        Vec<T> numbers[2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
          numbers[half] = codes[m].template eight<T, kUpper>(lane_row() + half * 8, i, lane_part());
        tiles[m].add_scaled(numbers[0], numbers[1], codes[m].scales[i][lane_row()], codes[m].scales[i][lane_row() + 8], x);
      }
    }
  });
  __syncwarp();  // the sums are put where the codes were
}

// Leaves every sum of the block's tiles in `shared`. row_at(matrix, row): the WeightRow of one of the 16 rows of a matrix, of
// which each must be readable.
template <class T, class W, bool Aligned, int Columns, int Matrices, class RowAt>
__device__ __forceinline__ void dot_rows(const InputRows<T, Aligned, Columns>& input, int width,
                                         DotShared<T, W, Columns, Matrices>& shared, RowAt&& row_at) {
  const int warp = int(threadIdx.x) / kWarp;
  WeightRow<T, W, Aligned> rows[Matrices][2];
#pragma unroll
  for (int m = 0; m < Matrices; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) rows[m][half] = row_at(m, lane_row() + half * 8);

  Tile<T, Columns> tiles[Matrices];
  add_products<T>(input, width, rows, shared.warps[warp].scratch, tiles);
#pragma unroll
  for (int m = 0; m < Matrices; ++m) tiles[m].put(shared.warps[warp].parts[m]);
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

// body(Type<T>(), Type<W>(), whether 16-byte loads are possible, columns) for rows of some matrices of one format, and of x.
template <class Body>
void with_body(Dtype dtype, const void* x, std::initializer_list<const Matrix*> weights, const Norm& norm, int num_rows,
               Body&& body) {
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Matrix& weight = **weights.begin();
    bool aligned = rows_aligned<T>(x, weight.cols) && aligned16(norm.weight);
    for (const Matrix* each : weights) aligned = aligned && weights_aligned<T>(*each);
    with_format<T>(weight, [&](auto format) {
      const auto for_speed = [&](auto is_aligned) {
        with_columns(num_rows, [&](auto columns) { body(type, format, is_aligned, columns); });
      };
      if constexpr (std::is_same_v<typename decltype(format)::type, Plain>) return with_flag(aligned, for_speed);
      // Of what is not for speed there is one body.
      if constexpr (sizeof(T) == 2)
        if (aligned) return for_speed(std::true_type());
      body(type, format, std::false_type(), std::integral_constant<int, 16>());
    });
  });
}

}  // namespace sirius::cuda
