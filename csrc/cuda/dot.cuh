// Rows of weights, wherever they are, times 1..16 rows of input: what gate, up and the projections of attention share.
//
// A tile is up to sixteen rows of each matrix. A block's warps take turns at 128 bytes of every row of it, and their sums are
// added up in order. How a row is cut depends on its length alone, so a column's bits depend neither on the other columns nor on
// the grid. Bytes that must move: the weights', once for every 16 rows of input. Input comes from L1, or one row from shared
// memory.
#pragma once

#include <algorithm>
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

// What a warp needs in shared memory to multiply rows of a matrix.
template <class T, class W, int Columns>
struct ScratchOf {
  using type = typename WeightRow<T, W, true>::Scratch;
};
template <class T, int Columns>
struct ScratchOf<T, Nibbles, Columns> {
  using type = NibbleCodes<(Columns > 1)>;
};

template <class T, class W, int Columns, int Matrices>
struct alignas(16) DotShared {
  using Scratch = typename ScratchOf<T, W, Columns>::type[Matrices];

  // Of a warp: first what it needs to multiply, then its sums.
  union Warp {
    Scratch scratch;
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
#pragma unroll 1
    for (int i = int(threadIdx.x) + (kGroups ? vectors / kStride * kStride : vectors); i < all; i += kStride)
      if (!kGroups || i >= vectors) put(i, {});
    if (!weights) {
#pragma unroll 2
      for (int i = int(threadIdx.x); i < vectors; i += kStride) put(i, cuda::load(x + i * Vec<T>::size));
    } else {
      const float sum = warp_squares<Aligned>(x, in.width);
      if (threadIdx.x % kWarp == 0) shared.squares[0][threadIdx.x / kWarp] = sum;
      __syncthreads();
      const float scale = inverse_rms(shared.squares[0], in.width, in.norm.eps);
// Codes of eight bits leave no registers for two.
#pragma unroll(std::is_same_v<W, Q8<false>> ? 1 : 2)
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

  __device__ __forceinline__ Vec<T> load_group(int group) const { return row_[group * kGroupVectors + lane_part()]; }

  // What this group and the next one add up to.
  __device__ __forceinline__ Packed<float, 2> totals(int group) const {
    return *reinterpret_cast<const Packed<float, 2>*>(totals_ + group);
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
  using Scratch = typename DotShared<T, W, Columns, Matrices>::Scratch;
  using Sums = Tile<T, Columns>;

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
                                           Sums (&tiles)[Matrices]) const {
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
  using Scratch = typename DotShared<T, Q8<false>, Columns, Matrices>::Scratch;
  using Sums = Tile<T, Columns>;

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
                                           Sums (&tiles)[Matrices]) const {
    // Beyond the last group scales and input are zero. All groups at once leave two matrices no registers to load a step ahead.
#pragma unroll(!Aligned ? 1 : Columns == 1 && Matrices == 1 ? kStepGroups : 2)
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

// Of nibbles a warp loads eight groups of a row at a time, 128 bytes and a header.
template <class T, bool Aligned, int Columns, int Matrices>
struct NibbleProducts {
  static constexpr int kStep = kNibbleStep;
  static constexpr bool kAhead = Columns * Matrices < 32;
  using Scratch = typename DotShared<T, Nibbles, Columns, Matrices>::Scratch;

  WeightRow<T, Nibbles, Aligned> rows[Matrices][2];
  NibbleGroups loaded[Matrices][2];
  NibblePlaces places;

  __device__ __forceinline__ explicit NibbleProducts(const Input& in) : places(in.format, in.width) {}

  __device__ __forceinline__ static int steps(int width) { return q4::groups(width); }

  __device__ __forceinline__ void load(int step, const Input&) {
#pragma unroll
    for (int m = 0; m < Matrices; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) rows[m][half].template load<kAhead>(loaded[m][half], places, step);
  }
};

// What two groups give is added up first, and that to the sums: as one row of input has it, see below.
template <class T, bool Aligned, int Columns, int Matrices>
struct Products<T, Nibbles, Aligned, Columns, Matrices> : NibbleProducts<T, Aligned, Columns, Matrices> {
  using Base = NibbleProducts<T, Aligned, Columns, Matrices>;
  using Base::Base, Base::loaded;
  using typename Base::Scratch;
  using Sums = Tile<T, Columns>;

  __device__ __forceinline__ void take(const Input& in, Scratch& codes) {
    __syncwarp();  // all lanes have used the nibbles before
#pragma unroll
    for (int m = 0; m < Matrices; ++m) {
      codes[m].template put<T>(loaded[m]);
      codes[m].put_affine(NibbleAffine(in.format, {loaded[m][0].header, loaded[m][1].header}));
    }
    __syncwarp();
  }

  __device__ __forceinline__ void multiply(int step, const InputRows<T, Nibbles, Aligned, Columns>& input, Scratch& codes,
                                           Sums (&tiles)[Matrices]) const {
    // Beyond the last group scales, minima and input are zero.
#pragma unroll 1
    for (int first = 0; first < kNibbleStep; first += 2) {
      Vec<uint32_t> words[Matrices];
#pragma unroll
      for (int m = 0; m < Matrices; ++m) words[m] = codes[m].two_groups(first);
      Sums two[Matrices];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Vec<T> x[Sums::kInputs];
        input.load_group(step + first + i, x);
        const typename Sums::Totals total(x);
#pragma unroll
        for (int m = 0; m < Matrices; ++m) {
          const Vec<float> affine = codes[m].groups[first + i].affine[lane_row()];
          two[m].add_scaled(eight_numbers<T>(words[m].words[2 * i]), eight_numbers<T>(words[m].words[2 * i + 1]), affine[0],
                            affine[2], x);
          two[m].add_totals(total, affine[1], affine[3]);
        }
      }
#pragma unroll
      for (int m = 0; m < Matrices; ++m) tiles[m].add(two[m]);
    }
  }
};

// Of one row of input, the sums of a warp's tile: in every lane those of rows g and g + 8.
struct RowSums {
  float of[2] = {};

  __device__ __forceinline__ void put(float (&out)[kTileRows][1]) const {
    if (lane_part() == 0)
#pragma unroll
      for (int half = 0; half < 2; ++half) out[lane_row() + half * 8][0] = of[half];
  }
};

// The same with one row of input, where tensor cores have eight columns: the eight groups of a step have one each, as if they
// were rows of input that are zero but for a group. So the sums of all groups come about side by side, and lane 4 g + t then has
// those of rows g and g + 8 in groups 2 t and 2 t + 1: the ones of which it has loaded the scales itself.
template <class T, bool Aligned, int Matrices>
struct Products<T, Nibbles, Aligned, 1, Matrices> : NibbleProducts<T, Aligned, 1, Matrices> {
  using Base = NibbleProducts<T, Aligned, 1, Matrices>;
  using Base::loaded;
  using typename Base::Scratch;
  using Sums = RowSums;

  Packed<uint32_t, 2> headers[Matrices][2];
  Format format;

  __device__ __forceinline__ explicit Products(const Input& in) : Base(in), format(in.format) {}

  __device__ __forceinline__ void take(const Input&, Scratch& codes) {
    __syncwarp();  // all lanes have used the nibbles before
#pragma unroll
    for (int m = 0; m < Matrices; ++m) {
      codes[m].template put<T>(loaded[m]);
#pragma unroll
      for (int half = 0; half < 2; ++half) headers[m][half] = loaded[m][half].header;
    }
    __syncwarp();
  }

  __device__ __forceinline__ void multiply(int step, const InputRows<T, Nibbles, Aligned, 1>& input, Scratch& codes,
                                           Sums (&sums)[Matrices]) const {
    const Vec<T> x = input.load_group(step + lane_row());
    float products[Matrices][4] = {};
#pragma unroll
    for (int first = 0; first < kNibbleStep; first += 2) {
      Vec<uint32_t> words[Matrices];
#pragma unroll
      for (int m = 0; m < Matrices; ++m) words[m] = codes[m].two_groups(first);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Vec<T> column{};
        if (lane_row() == first + i) column = x;
#pragma unroll
        for (int m = 0; m < Matrices; ++m)
          multiply_rows<T>(products[m], eight_numbers<T>(words[m].words[2 * i]), eight_numbers<T>(words[m].words[2 * i + 1]),
                           column);
      }
    }
    const Packed<float, 2> totals = input.totals(step + 2 * lane_part());
#pragma unroll
    for (int m = 0; m < Matrices; ++m) {
      const NibbleAffine affine(format, headers[m]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float two = 0.0f;
#pragma unroll
        for (int i = 0; i < 2; ++i)
          two = fmaf(totals[i], affine.of[i][half].minimum, fmaf(products[m][2 * half + i], affine.of[i][half].scale, two));
        // In the order of the groups.
#pragma unroll
        for (int part = 0; part < 4; ++part) sums[m].of[half] += __shfl_sync(kAllLanes, two, part, 4);
      }
    }
  }
};

// finish(tile, rows of input) for each of the block's tiles, when all of a tile's sums are in `shared`. line_at(tile, row): which
// row is one of a tile's sixteen, as row_at(matrix, line) wants it for the WeightRow; each must be readable. The first weights
// are on their way before the kernel before has ended.
//
// A block has one tile; or with `Several` each gridDim.x-th, and then the first weights of the next one are on their way while
// the last of this one are multiplied. Between one block's end and the next one's begin memory would have nothing to do. But it
// costs a step some twenty instructions, which is worth it where there are far more tiles than blocks run at a time.
template <bool Several, class T, class W, bool Aligned, int Columns, int Matrices, class LineAt, class RowAt, class Finish>
__device__ __forceinline__ void for_each_tile(const Input& in, DotShared<T, W, Columns, Matrices>& shared, int tiles,
                                              LineAt&& line_at, RowAt&& row_at, Finish&& finish) {
  using Part = Products<T, W, Aligned, Columns, Matrices>;
  const int warp = int(threadIdx.x) / kWarp, begin = warp * Part::kStep, end = Part::steps(in.width);
  auto& scratch = shared.warps[warp].scratch;
  Part part(in);
  int lines[2];
  const auto look_up = [&](int tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) lines[half] = line_at(tile, lane_row() + half * 8);
  };
  const auto point_to_lines = [&] {
#pragma unroll
    for (int m = 0; m < Matrices; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) part.rows[m][half] = row_at(m, lines[half]);
  };
  int tile = int(blockIdx.x);
  look_up(tile);
  point_to_lines();
  prefetch_norm(in.norm.weight, in.width * int(sizeof(T)));
  if (Part::kAhead) part.load(begin, in);

  wait_for_kernel_before();
  InputRows<T, W, Aligned, Columns> input;
  input.begin(in, shared);
  const int left = in.num_rows - int(blockIdx.y) * kTileRows, input_rows = left < Columns ? left : Columns;
#pragma unroll 1
  while (true) {
    const int next = tile + int(gridDim.x);
    const bool more = Several && next < tiles;
    if (more) look_up(next);
    typename Part::Sums sums[Matrices];
    in_steps<Part::kAhead>(
        begin, end, kDotWarps * Part::kStep,
        [&](int step) {
          if (Part::kAhead && more && step >= end) {
            point_to_lines();
            step = begin;
          }
          part.load(step, in);
        },
        [&] { part.take(in, scratch); }, [&](int step) { part.multiply(step, input, scratch, sums); });
    __syncwarp();  // the sums are put where the scratch was
#pragma unroll
    for (int m = 0; m < Matrices; ++m) sums[m].put(shared.warps[warp].parts[m]);
    __syncthreads();
    finish(tile, input_rows);
    if (!more) return;
    if (!Part::kAhead) point_to_lines();
    tile = next;
    __syncthreads();  // the scratch comes where the sums were
  }
}

// body(row of the tile, row of the input) for every sum, one thread each.
template <int Columns, class Body>
__device__ __forceinline__ void for_each_sum(int rows, int input_rows, Body&& body) {
  static_assert(kTileRows * Columns <= kDotWarps * kWarp);
  const int i = int(threadIdx.x), row = i % kTileRows, column = i / kTileRows;
  if (row < rows && column < input_rows) body(row, column);
}

// How a matrix's rows, from `begin` on, are cut into tiles: up to sixteen, and fewer where all multiprocessors then have more
// equally much to read.
struct Tiling {
  int rows, of_tile, begin, tiles, blocks;

  // most: blocks that there shall be, each with several tiles if need be. 0: one for each tile.
  explicit Tiling(int rows_, int begin_ = 0, int most = 0) : rows(rows_), of_tile(kTileRows), begin(begin_) {
    const int processors = multiprocessors();
    const auto blocks_of = [&](int each) {
      const int tiles = ceil_div(rows, each);
      return most > 0 && most < tiles ? most : tiles;
    };
    const auto busiest = [&](int each) {  // rows that a multiprocessor reads at most
      return ceil_div(ceil_div(rows, each), blocks_of(each)) * ceil_div(blocks_of(each), processors) * each;
    };
    // Tiles that are not full cost instructions.
    for (int each = kTileRows - 1; each >= kTileRows * 3 / 4; --each)
      if (busiest(each) * 32 <= busiest(of_tile) * 31) of_tile = each;
    tiles = ceil_div(rows, of_tile);
    blocks = blocks_of(of_tile);
  }

  dim3 grid(int num_rows) const { return dim3(blocks, ceil_div(num_rows, kTileRows)); }

  __device__ __forceinline__ int first(int tile) const { return begin + tile * of_tile; }
  __device__ __forceinline__ int count(int tile) const {
    const int left = rows - tile * of_tile;
    return left < of_tile ? left : of_tile;
  }
  // One of a tile's sixteen rows. What is no row of it is its last one: the same bytes, which are loaded once.
  __device__ __forceinline__ int at(int tile, int row) const { return first(tile) + (row < count(tile) ? row : count(tile) - 1); }
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
