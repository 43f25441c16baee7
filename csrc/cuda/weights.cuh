// How kernels read a weight matrix: whatever depends on its format.
#pragma once

#include "q8.cuh"

namespace sirius::cuda {

// A matrix's format, as a kernel's template parameter.
struct Plain {};  // an array of T
template <bool kUpper>
struct Q8 {};         // q8 or q8_upper, for tensor cores
struct Q8Numbers {};  // either of them, number by number in float32

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
  __device__ __forceinline__ WeightRow(const Matrix& matrix, int row) : elements_(static_cast<const T*>(matrix.row(row))) {}

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
  __device__ __forceinline__ WeightRow(const Matrix& matrix, int row) : row_(matrix.row(row)) {
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

template <bool Aligned>
class WeightRow<float, Q8Numbers, Aligned> {
 public:
  using Scratch = NoScratch;

  WeightRow() = default;
  __device__ __forceinline__ WeightRow(const Matrix& matrix, int row)
      : row_(matrix.row(row)), lower_(lower_distance(matrix, row)), upper_(matrix.format == Format::q8_upper) {}

  __device__ __forceinline__ Vec<float> load(int begin, int n) const {
    float out[Vec<float>::size];
#pragma unroll
    for (int i = 0; i < Vec<float>::size; ++i) out[i] = begin + i < n ? q8_weight(row_, lower_, begin + i, n, upper_) : 0.0f;
    return Vec<float>::rounded(out);
  }

 private:
  const void* row_;
  int64_t lower_;
  bool upper_;
};

inline bool is_q8(const Matrix& matrix) { return matrix.format == Format::q8 || matrix.format == Format::q8_upper; }

// Whether the matrix's rows may be read by 16 bytes.
template <class T>
bool weights_aligned(const Matrix& matrix) {
  return is_q8(matrix) || (aligned16(matrix.data) && matrix.stride % 16 == 0 && matrix.cols % Vec<T>::size == 0);
}

// body(Type<W>()) for a matrix's format and input of T.
template <class T, class Body>
void with_format(const Matrix& matrix, Body&& body) {
  if (!is_q8(matrix)) return body(Type<Plain>());
  if constexpr (sizeof(T) == 4)
    body(Type<Q8Numbers>());
  else
    with_flag(matrix.format == Format::q8_upper, [&](auto upper) { body(Type<Q8<upper.value>>()); });
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
