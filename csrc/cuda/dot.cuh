// Rows of weights, wherever they are, times 1..16 rows of input: what gate, up and the projections of attention share.
//
// A block has up to sixteen rows of each of its matrices; its warps take turns at 128 bytes of every row, and their sums are
// added up in order. How a row is cut depends on its length alone, so a column's bits depend neither on the other columns nor on
// the grid. Bytes that must move: the weights', once for every 16 rows of input. Input comes from L1, or one row from shared
// memory.
#pragma once

#include <initializer_list>

#include "mma.cuh"
#include "norm.cuh"
#include "weights.cuh"

namespace sirius::cuda {

constexpr int kDotWarps = kNormWarps;

// Blocks that a multiprocessor shall hold at a time, so that enough loads are in flight: it limits the registers of a thread. The
// bodies that are not for speed, float32 and unaligned rows, take as many as they want.
template <class T, bool Aligned, int Columns, int Matrices>
constexpr int kDotBlocks = sizeof(T) == 4 || !Aligned      ? 1
                           : Columns <= 8 && Matrices == 1 ? 3
                                                           : 2;

// Rows of input, and the format of what they are multiplied with. x: T [num_rows, width].
struct Input {
  const void* x;
  Norm norm;
  int num_rows, width;
  Format format;
};

// A row of input alone, as long as this, is kept in shared memory: normalised once, not by every warp for itself.
constexpr int kLargestRow = 16384;

// What a step begins within is there to its end: zeros after the row.
constexpr int kLongestStep = kNibbleStep * q4::kGroup;
__host__ __device__ constexpr int filled_up(int width) { return ceil_div(width, kLongestStep) * kLongestStep; }

template <class T, class W, int Columns, int Matrices>
struct alignas(16) DotShared {
  // Of a warp: first what it needs to read weights, then its sums.
  union Warp {
    typename WeightRow<T, W, true>::Scratch scratch[Matrices];
    float parts[Matrices][kTileRows][Columns];
  };
  Warp warps[kDotWarps];
  // Of one row beside nibbles, what its groups add up to.
  static constexpr int kTotals = Columns == 1 && std::is_same_v<W, Nibbles> ? kLargestRow / q4::kGroup : 1;
  alignas(16) float totals[kTotals];
  Squares<Columns> squares;
  float scale[Columns];

  // The product of row `row` of the tile of a matrix with row `column` of the block's input.
  __device__ __forceinline__ float sum(int matrix, int row, int column) const {
    float total = warps[0].parts[matrix][row][column];
#pragma unroll
    for (int i = 1; i < kDotWarps; ++i) total += warps[i].parts[matrix][row][column];
    return total;
  }

  // After it, with one column: T [filled_up(width)].
  __device__ __forceinline__ Vec<T>* row() { return reinterpret_cast<Vec<T>*>(this + 1); }
  static size_t bytes(int width) { return sizeof(DotShared) + (Columns == 1 ? filled_up(width) * sizeof(T) : 0); }
};

// The halves of a vector of T as they come from memory, one after the other.
template <class T>
constexpr int kTogether = Vec<T>::size / 2;

// Half a vector's elements of an array of n from k on, and as many from k + Apart on; zero from n on. As load_part.
template <bool Aligned, int Apart, class T>
__device__ __forceinline__ Vec<T> load_halves(const T* array, int k, int n) {
  if constexpr (Apart == kTogether<T>) {
    return load_part<Aligned>(array, k, n);
  } else {
    using Half = Packed<T, kTogether<T>>;
    Vec<T> out{};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int from = k + i * Apart;
      Half half{};
      if constexpr (!Aligned)
        half = load_elements<Half::size>(array, from, n);
      else if (from < n)
        half = *reinterpret_cast<const Half*>(array + from);
      out.put_half(i, half);
    }
    return out;
  }
}

// What a warp multiplies with. `begin` comes before all else, and by all of the block.
template <class T, class W, bool Aligned, int Columns>
class InputRows {
 public:
  using Sums = Tile<T, Columns>;

  template <class Shared>
  __device__ __forceinline__ void begin(const Input& in, Shared& shared) {
    const int first = int(blockIdx.y) * kTileRows;
    x_ = static_cast<const T*>(in.x) + size_t(first) * in.width;
    norm_ = static_cast<const T*>(in.norm.weight);
    offset_ = in.norm.offset;
    width_ = in.width;
    rows_ = in.num_rows - first < Columns ? in.num_rows - first : Columns;
    if (!norm_) return;
#pragma unroll 2
    for (int row = 0; row < rows_; ++row) {
      const float sum = warp_squares<Aligned>(x_ + size_t(row) * width_, width_);
      if (threadIdx.x % kWarp == 0) shared.squares[row][threadIdx.x / kWarp] = sum;
    }
    __syncthreads();
    if (int(threadIdx.x) < Columns)
      shared.scale[threadIdx.x] = int(threadIdx.x) < rows_ ? inverse_rms(shared.squares[threadIdx.x], width_, in.norm.eps) : 0.0f;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Sums::kInputs; ++i) scale_[i] = shared.scale[Sums::column(i)];
  }

  // Of the rows that this lane multiplies its elements of a group as nibbles want them, four and those 16 further on.
  __device__ __forceinline__ void load_group(int group, Vec<T> (&out)[Sums::kInputs]) const {
    load<q4::kGroup / 2>(group * q4::kGroup + lane_part() * kTogether<T>, out);
  }

  // What those of two groups each add up to.
  struct Totals {
    __device__ __forceinline__ typename Sums::Totals of(int, const Vec<T> (&x)[Sums::kInputs]) const {
      return typename Sums::Totals(x);
    }
  };
  __device__ __forceinline__ Totals totals(int) const { return {}; }

  // The same of elements k and on, as `load_halves` has them.
  template <int Apart = kTogether<T>>
  __device__ __forceinline__ void load(int k, Vec<T> (&out)[Sums::kInputs]) const {
    Vec<T> weight{};
    if (norm_) weight = load_halves<Aligned, Apart>(norm_, k, width_);
#pragma unroll
    for (int i = 0; i < Sums::kInputs; ++i) {
      const int row = Sums::column(i);
      out[i] = load_halves<Aligned, Apart>(x_ + size_t(row) * width_, k, row < rows_ ? width_ : 0);
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
  float scale_[Sums::kInputs] = {};
};

// One row, which stands in shared memory as it is multiplied. The lanes of the other columns multiply it, too: no one looks at
// what comes of that.
//
// With nibbles a warp itself brings what it multiplies, and so waits for itself alone. It has what a lane needs of a group side
// by side, and the groups' sums besides: eight groups are the eight columns of one product with ones.
template <class T, class W, bool Aligned>
class InputRows<T, W, Aligned, 1> {
 public:
  template <class Shared>
  __device__ __forceinline__ void begin(const Input& in, Shared& shared) {
    const T *x = static_cast<const T*>(in.x) + size_t(blockIdx.y) * kTileRows * in.width,
            *weights = static_cast<const T*>(in.norm.weight);
    row_ = shared.row();
    totals_ = shared.totals;
    constexpr int kStride = kDotWarps * kWarp;
    const int vectors = in.width / Vec<T>::size, all = filled_up(in.width) / Vec<T>::size;
    // Zeros after the row. With nibbles they are brought by the warp that has the vectors before them.
    for (int i = int(threadIdx.x) + (kGroups ? vectors / kStride * kStride : vectors); i < all; i += kStride)
      if (!kGroups || i >= vectors) put(i, {});
    if (!weights) {
      for (int i = int(threadIdx.x); i < vectors; i += kStride) put(i, cuda::load(x + i * Vec<T>::size));
    } else {
      const float sum = warp_squares<Aligned>(x, in.width);
      if (threadIdx.x % kWarp == 0) shared.squares[0][threadIdx.x / kWarp] = sum;
      __syncthreads();
      const float scale = inverse_rms(shared.squares[0], in.width, in.norm.eps);
      for (int i = int(threadIdx.x); i < vectors; i += kStride) {
        const Vec<T> from = cuda::load(x + i * Vec<T>::size), weight = cuda::load(weights + i * Vec<T>::size);
        float normed[Vec<T>::size];
#pragma unroll
        for (int j = 0; j < Vec<T>::size; ++j) normed[j] = from[j] * scale * (weight[j] + in.norm.offset);
        put(i, Vec<T>::rounded(normed));
      }
    }
    if constexpr (kGroups)
      add_up(all / kGroupVectors);
    else
      __syncthreads();
  }

  __device__ __forceinline__ void load(int k, Vec<T> (&out)[1]) const { out[0] = row_[unsigned(k) / Vec<T>::size]; }

  __device__ __forceinline__ void load_group(int group, Vec<T> (&out)[1]) const {
    out[0] = row_[group * kGroupVectors + lane_part()];
  }

  struct Totals {
    Packed<float, 2> two;
    __device__ __forceinline__ typename Tile<T, 1>::Totals of(int i, const Vec<T> (&)[1]) const {
      return typename Tile<T, 1>::Totals(two[i]);
    }
  };
  __device__ __forceinline__ Totals totals(int group) const {
    return {*reinterpret_cast<const Packed<float, 2>*>(totals_ + group)};
  }

 private:
  static constexpr bool kGroups = std::is_same_v<W, Nibbles>;
  static constexpr int kGroupVectors = q4::kGroup / Vec<T>::size;

  // Vector i of the row.
  __device__ __forceinline__ void put(int i, const Vec<T>& value) {
    if constexpr (kGroups) {
      // Four elements of one part, and four of the next: of each part's vector its first half, or of elements 16 and on its
      // second.
      auto* const to = reinterpret_cast<Packed<uint32_t, 2>*>(row_ + (i / kGroupVectors * kGroupVectors + i % 2 * 2)) + i / 2 % 2;
      to[0] = {value.words[0], value.words[1]};
      to[2] = {value.words[2], value.words[3]};
    } else {
      row_[i] = value;
    }
  }

  // The warp's vectors are those of its steps.
  __device__ __forceinline__ void add_up(int groups) {
    static_assert(kNibbleStep * kGroupVectors == kWarp);
    __syncwarp();
#pragma unroll 1
    for (int step = int(threadIdx.x) / kWarp * kNibbleStep; step < groups; step += kDotWarps * kNibbleStep) {
      const Vec<T> x[1] = {row_[step * kGroupVectors + int(threadIdx.x) % kWarp]};
      const typename Tile<T, kNibbleStep>::Totals totals(x);
      if (lane_row() == 0)
        *reinterpret_cast<Packed<float, 2>*>(totals_ + step + 2 * lane_part()) =
            Packed<float, 2>::rounded({totals[0], totals[1]});
    }
    __syncwarp();
  }

  Vec<T>* row_;
  float* totals_;
};

// How a warp multiplies 16 rows of each matrix: `load` puts what a step needs on its way, `take` and `multiply` as in_steps wants
// them. The lane's rows are lane_row() and lane_row() + 8 of each matrix.
template <class T, class W, bool Aligned, int Columns, int Matrices>
struct Products {
  static constexpr int kPart = 4 * Vec<T>::size;  // elements of a row that a warp loads at a time: 64 bytes
  static constexpr int kParts = 2;
  static constexpr int kStep = kParts * kPart;
  static constexpr bool kAhead = sizeof(T) == 2 && Aligned;  // the other bodies stay small
  using Scratch = NoScratch[Matrices];

  WeightRow<T, W, Aligned> rows[Matrices][2];
  Vec<T> loaded[kParts][Matrices][2], weights[kParts][Matrices][2];

  __device__ __forceinline__ explicit Products(const Input&) {}

  __device__ __forceinline__ static int steps(int width) { return width; }

  __device__ __forceinline__ void load(int step, const Input& in) {
#pragma unroll
    for (int i = 0; i < kParts; ++i)
#pragma unroll
      for (int m = 0; m < Matrices; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          loaded[i][m][half] = rows[m][half].load(step + i * kPart + lane_part() * Vec<T>::size, in.width);
  }

  __device__ __forceinline__ void take(const Input&, Scratch&) {
#pragma unroll
    for (int i = 0; i < kParts; ++i)
#pragma unroll
      for (int m = 0; m < Matrices; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) weights[i][m][half] = loaded[i][m][half];
  }

  __device__ __forceinline__ void multiply(int step, const InputRows<T, W, Aligned, Columns>& input, Scratch&,
                                           Tile<T, Columns> (&tiles)[Matrices]) const {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      Vec<T> x[Tile<T, Columns>::kInputs];
      input.load(step + i * kPart + lane_part() * Vec<T>::size, x);
#pragma unroll
      for (int m = 0; m < Matrices; ++m) tiles[m].add(weights[i][m][0], weights[i][m][1], x);
    }
  }
};

// The same of rows in eight bits, whose steps are groups. A warp loads four groups of a row at a time, 64 bytes of a plane.
template <class T, bool Aligned, int Columns, int Matrices>
struct Products<T, Q8<false>, Aligned, Columns, Matrices> {
  static constexpr int kStep = kStepGroups;
  static constexpr bool kAhead = Columns * Matrices < 32;
  using Scratch = Q8Codes[Matrices];

  WeightRow<T, Q8<false>, Aligned> rows[Matrices][2];
  Q8Group<false> loaded[Matrices][2];

  __device__ __forceinline__ explicit Products(const Input&) {}

  __device__ __forceinline__ static int steps(int width) { return q8::groups(width); }

  __device__ __forceinline__ void load(int step, const Input& in) {
#pragma unroll
    for (int m = 0; m < Matrices; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) rows[m][half].load(loaded[m][half], step + lane_part(), in.width);
  }

  __device__ __forceinline__ void take(const Input&, Scratch& codes) {
    __syncwarp();  // all lanes have used the codes before
#pragma unroll
    for (int m = 0; m < Matrices; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) codes[m].put(lane_row() + half * 8, lane_part(), loaded[m][half]);
    __syncwarp();
  }

  __device__ __forceinline__ void multiply(int step, const InputRows<T, Q8<false>, Aligned, Columns>& input, Scratch& codes,
                                           Tile<T, Columns> (&tiles)[Matrices]) const {
    // Beyond the last group scales and input are zero.
#pragma unroll(!Aligned ? 1 : Columns == 1 ? kStepGroups : 2)
    for (int i = 0; i < kStepGroups; ++i) {
      Vec<T> x[Tile<T, Columns>::kInputs];
      input.load((step + i) * q8::kGroup + lane_part() * Vec<T>::size, x);
#pragma unroll
      for (int m = 0; m < Matrices; ++m) {
        Vec<T> numbers[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) numbers[half] = codes[m].template eight<T>(lane_row() + half * 8, i, lane_part());
        tiles[m].add_scaled(numbers[0], numbers[1], codes[m].scales[i][lane_row()], codes[m].scales[i][lane_row() + 8], x);
      }
    }
  }
};

// The same of nibbles. A warp loads eight groups of a row at a time, 128 bytes and a header.
template <class T, bool Aligned, int Columns, int Matrices>
struct Products<T, Nibbles, Aligned, Columns, Matrices> {
  static constexpr int kStep = kNibbleStep;
  static constexpr bool kAhead = Columns * Matrices < 32;
  using Scratch = NibbleCodes[Matrices];

  WeightRow<T, Nibbles, Aligned> rows[Matrices][2];
  NibbleGroups loaded[Matrices][2];
  NibblePlaces places;

  __device__ __forceinline__ explicit Products(const Input& in) : places(in.format, in.width) {}

  __device__ __forceinline__ static int steps(int width) { return q4::groups(width); }

  __device__ __forceinline__ void load(int step, const Input&) {
#pragma unroll
    for (int m = 0; m < Matrices; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) rows[m][half].template load<kAhead>(loaded[m][half], places, step);
  }

  __device__ __forceinline__ void take(const Input& in, Scratch& codes) {
    __syncwarp();  // all lanes have used the nibbles before
#pragma unroll
    for (int m = 0; m < Matrices; ++m) codes[m].template put<T>(in.format, loaded[m]);
    __syncwarp();
  }

  __device__ __forceinline__ void multiply(int step, const InputRows<T, Nibbles, Aligned, Columns>& input, Scratch& codes,
                                           Tile<T, Columns> (&tiles)[Matrices]) const {
    // Beyond the last group scales, minima and input are zero.
#pragma unroll 1
    for (int first = 0; first < kNibbleStep; first += 2) {
      Vec<uint32_t> words[Matrices];
#pragma unroll
      for (int m = 0; m < Matrices; ++m) words[m] = codes[m].two_groups(first);
      const auto totals = input.totals(step + first);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Vec<T> x[Tile<T, Columns>::kInputs];
        input.load_group(step + first + i, x);
        const auto total = totals.of(i, x);
#pragma unroll
        for (int m = 0; m < Matrices; ++m) {
          const Vec<float> affine = codes[m].groups[first + i].affine[lane_row()];
          tiles[m].add_scaled(eight_numbers<T>(words[m].words[2 * i]), eight_numbers<T>(words[m].words[2 * i + 1]), affine[0],
                              affine[2], x);
          tiles[m].add_totals(total, affine[1], affine[3]);
        }
      }
    }
  }
};

// Leaves every sum of the block's tiles in `shared`. row_at(matrix, row): the WeightRow of one of the 16 rows of a matrix, of
// which each must be readable. The first weights are on their way before the kernel before has ended. Returns the rows of input.
template <class T, class W, bool Aligned, int Columns, int Matrices, class RowAt>
__device__ __forceinline__ int dot_rows(const Input& in, DotShared<T, W, Columns, Matrices>& shared, RowAt&& row_at) {
  using Part = Products<T, W, Aligned, Columns, Matrices>;
  const int warp = int(threadIdx.x) / kWarp, begin = warp * Part::kStep, end = Part::steps(in.width);
  auto& scratch = shared.warps[warp].scratch;
  Part part(in);
#pragma unroll
  for (int m = 0; m < Matrices; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) part.rows[m][half] = row_at(m, lane_row() + half * 8);
  if (Part::kAhead) part.load(begin, in);

  wait_for_kernel_before();
  InputRows<T, W, Aligned, Columns> input;
  input.begin(in, shared);
  Tile<T, Columns> tiles[Matrices];
  in_steps<Part::kAhead>(
      begin, end, kDotWarps * Part::kStep, [&](int step) { part.load(step, in); }, [&] { part.take(in, scratch); },
      [&](int step) { part.multiply(step, input, scratch, tiles); });
  __syncwarp();  // the sums are put where the scratch was
#pragma unroll
  for (int m = 0; m < Matrices; ++m) tiles[m].put(shared.warps[warp].parts[m]);
  __syncthreads();
  const int rows = in.num_rows - int(blockIdx.y) * kTileRows;
  return rows < Columns ? rows : Columns;
}

// body(row of the tile, row of the input) for every sum, one thread each.
template <int Columns, class Body>
__device__ __forceinline__ void for_each_sum(int rows, int input_rows, Body&& body) {
  for (int i = int(threadIdx.x); i < kTileRows * Columns; i += kDotWarps * kWarp)
    if (i % kTileRows < rows && i / kTileRows < input_rows) body(i % kTileRows, i / kTileRows);
}

// What a block takes of a matrix's rows, from `begin` on: up to sixteen, and fewer where all multiprocessors then have more
// equally much to read.
struct Tiling {
  int rows, of_tile, begin;

  explicit Tiling(int rows_, int begin_ = 0) : rows(rows_), of_tile(kTileRows), begin(begin_) {
    const int processors = multiprocessors();
    const auto busiest = [&](int each) { return ceil_div(ceil_div(rows, each), processors) * each; };  // rows that it reads
    // Tiles that are not full cost instructions.
    for (int each = kTileRows - 1; each >= kTileRows * 3 / 4; --each)
      if (busiest(each) * 32 <= busiest(of_tile) * 31) of_tile = each;
  }

  dim3 grid(int num_rows) const { return dim3(ceil_div(rows, of_tile), ceil_div(num_rows, kTileRows)); }

  __device__ __forceinline__ int first() const { return begin + int(blockIdx.x) * of_tile; }
  __device__ __forceinline__ int count() const {
    const int left = rows - int(blockIdx.x) * of_tile;
    return left < of_tile ? left : of_tile;
  }
  // One of the tile's sixteen rows. What is no row of this block is its last one: the same bytes, which are loaded once.
  __device__ __forceinline__ int at(int row) const { return first() + (row < count() ? row : count() - 1); }
};

// Whether every row of a [*, width] array of T can be read by 16-byte loads.
template <class T>
bool rows_aligned(const void* array, int width) {
  return aligned16(array) && width % Vec<T>::size == 0;
}

// body(Type<W>()) for a format whose rows are multiplied with input of T.
template <class T, class Body>
void with_product(Format format, Body&& body) {
  if (is_plain(format)) return body(Type<Plain>());
  if constexpr (sizeof(T) == 4) {
    body(Type<Numbers>());
  } else {
    if (format == Format::q8) return body(Type<Q8<false>>());
    body(Type<Nibbles>());
  }
}

// body(Type<T>(), Type<W>(), whether 16-byte loads are possible, columns) for rows of some matrices of one format, and of x.
template <class Body>
void with_body(Dtype dtype, const void* x, std::initializer_list<const Matrix*> weights, const Norm& norm, int num_rows,
               Body&& body) {
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr bool kHalves = sizeof(T) == 2;
    const Matrix& weight = **weights.begin();
    bool aligned = rows_aligned<T>(x, weight.cols) && aligned16(norm.weight);
    for (const Matrix* each : weights) aligned = aligned && weights_aligned<T>(*each);
    with_product<T>(weight.format, [&](auto format) {
      const auto for_speed = [&](auto is_aligned) {
        if constexpr (kHalves && is_aligned.value)
          if (num_rows == 1 && weight.cols <= kLargestRow)
            return body(type, format, is_aligned, std::integral_constant<int, 1>());
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

// The same for matrices whose outputs stand side by side: body(..., begin, end) for each stretch of them that are of one format.
template <class Body>
void with_bodies(const LinearParams& p, const Norm& norm, Body&& body) {
  for (int begin = 0, end; begin < p.num_parts; begin = end) {
    end = begin + 1;
    while (end < p.num_parts && p.parts[end].weight.format == p.parts[begin].weight.format) ++end;
    const auto part = [&](int i) { return &p.parts[begin + i < end ? begin + i : begin].weight; };
    with_body(p.dtype, p.x, {part(0), part(1), part(2)}, norm, p.num_rows,
              [&](auto type, auto format, auto aligned, auto columns) { body(type, format, aligned, columns, begin, end); });
  }
}

}  // namespace sirius::cuda
