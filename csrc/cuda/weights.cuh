// How kernels read a weight matrix: whatever depends on its format.
#pragma once

#include "nibbles.cuh"
#include "q8.cuh"

namespace sirius::cuda {

// How a kernel reads a matrix, as its template parameter. Formats that differ in little have one in common.
struct Plain {};  // an array of T
template <bool kUpper>
struct Q8 {};       // q8 or q8_upper, for tensor cores
struct Nibbles {};  // q8_upper, q4 or q4_k, whose rows are multiplied, for tensor cores
template <bool kHeld>
struct Across {};   // q4_across or q4_k_across, for tensor cores; with kHeld of rows that say whose they are
struct Numbers {};  // any of them, number by number in float32

// As Matrix::row: a stride has 32 bits, which makes one multiplication of it.
__device__ __forceinline__ const void* row_at(const Matrix& matrix, int row) {
  return static_cast<const char*>(matrix.data) + uint64_t(uint32_t(row)) * uint32_t(matrix.stride);
}

// What a warp needs in shared memory to read a matrix, if anything.
struct NoScratch {};

// One row of a matrix. Rows are read once a pass: by 16 bytes, if they are `Aligned`.
template <class T, class W, bool Aligned>
class WeightRow;

template <class T, bool Aligned>
class WeightRow<T, Plain, Aligned> {
 public:
  using Scratch = NoScratch;

  WeightRow() = default;
  __device__ __forceinline__ WeightRow(const Matrix& matrix, int row) : elements_(static_cast<const T*>(row_at(matrix, row))) {}

  // Elements [begin, begin + Vec::size) of n, zero from n on; begin is a multiple of Vec::size.
  __device__ __forceinline__ Vec<T> load(int begin, int n) const { return load_part_streaming<Aligned>(elements_, begin, n); }

 private:
  const T* elements_;
};

// Such rows are always aligned. They are no vectors of T before they have gone through the scratch.
template <class T, bool kUpper, bool Aligned>
class WeightRow<T, Q8<kUpper>, Aligned> {
 public:
  using Scratch = Q8Codes;

  WeightRow() = default;
  __device__ __forceinline__ WeightRow(const Matrix& matrix, int row) : row_(row_at(matrix, row)) {
    if constexpr (!kUpper) lower_ = uint32_t(lower_distance(matrix, row) / 16);
  }

  // Nothing is read unless the row is there.
  __device__ __forceinline__ void load(Q8Group<kUpper>& to, int group, int cols, bool there = true) const {
    to.load(row_, kUpper ? 0 : int64_t(lower_) * 16, group, cols, there && group < q8::groups(cols));
  }

 private:
  const void* row_;
  uint32_t lower_;  // bytes to the lower nibbles / 16: half of a register that the address of another row would take
};

template <class T, bool Aligned>
class WeightRow<T, Nibbles, Aligned> {
 public:
  WeightRow() = default;
  __device__ __forceinline__ WeightRow(const Matrix& matrix, int row)
      : row_(added_up(static_cast<const char*>(row_at(matrix, row)))) {}

  template <bool Ahead>
  __device__ __forceinline__ void load(NibbleGroups& to, const NibblePlaces& places, int step) const {
    to.load<Ahead>(places, row_, step);
  }

 private:
  const char* row_;
};

// Without its scales.
template <class T, bool kHeld, bool Aligned>
class WeightRow<T, Across<kHeld>, Aligned> {
 public:
  using Scratch = AcrossCodes;

  __device__ __forceinline__ WeightRow(const Matrix& matrix, int row)
      : nibbles_(static_cast<const uint32_t*>(row_at(matrix, row))) {}

  __device__ __forceinline__ Vec<uint32_t> load(int group, bool there) const {
    return load_streaming(nibbles_ + group * (q4::kGroupBytes / 4), there);
  }

 private:
  const uint32_t* nibbles_;
};

// One weight, for bodies that are not for speed.
__device__ __forceinline__ float packed_weight(const Matrix& matrix, int row, int column) {
  const void* const at = matrix.row(row);
  switch (matrix.format) {
    case Format::q8: return q8_weight(at, lower_distance(matrix, row), column, matrix.cols);
    case Format::q4_across:
    case Format::q4_k_across:
      return across_weight(matrix.format, at, matrix.shared, matrix.neuron(row) / q4::kGroup, column, matrix.cols);
    default: return nibble_weight(matrix.format, at, column, matrix.cols);
  }
}

template <bool Aligned>
class WeightRow<float, Numbers, Aligned> {
 public:
  using Scratch = NoScratch;

  WeightRow() = default;
  __device__ __forceinline__ WeightRow(const Matrix& matrix, int row) : matrix_(matrix), row_(row) {}

  __device__ __forceinline__ Vec<float> load(int begin, int n) const {
    float out[Vec<float>::size];
#pragma unroll
    for (int i = 0; i < Vec<float>::size; ++i) out[i] = begin + i < n ? packed_weight(matrix_, row_, begin + i) : 0.0f;
    return Vec<float>::rounded(out);
  }

 private:
  Matrix matrix_;
  int row_;
};

// Whether the matrix's rows may be read by 16 bytes.
template <class T>
bool weights_aligned(const Matrix& matrix) {
  return !is_plain(matrix.format) || (aligned16(matrix.data) && matrix.stride % 16 == 0 && matrix.cols % Vec<T>::size == 0);
}

// The steps of a warp over what it multiplies: every `stride`, from `begin` to `end`. load(step) has what a step needs put on its
// way, take() brings what was loaded last to where multiply(step) finds it. With `Ahead` a step is loaded before the products of
// the one before, and load(begin) before this is called; without, for bodies whose registers do not suffice, just before its own.
template <bool Ahead, class Load, class Take, class Multiply>
__device__ __forceinline__ void in_steps(int begin, int end, int stride, Load&& load, Take&& take, Multiply&& multiply) {
#pragma unroll 1
  for (int step = begin; step < end; step += stride) {
    if (!Ahead) load(step);
    take();
    if (Ahead) load(step + stride);
    multiply(step);
  }
}

// One of the projections whose outputs stand side by side. By comparison: an index would copy a kernel's parameters to local
// memory.
__device__ __forceinline__ Projection projection_at(const Projection (&parts)[3], int which) {
  return which == 0 ? parts[0] : which == 1 ? parts[1] : parts[2];
}

}  // namespace sirius::cuda
