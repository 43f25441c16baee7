// The down projection, whose rows are added up. Neurons are the sum's k and stand one after the other in memory, so the tensor
// cores' pairs of k are put together from two rows.
//
// A block has a stretch of columns of `out` and a part of the neurons; its warps take turns at 16 neurons, reading 128 bytes of
// each, or of a plane 64. Parts and warps are added up in order. Where the neurons are cut depends on their number, on `hidden`,
// on the format and on the card alone. Bytes that must move: hidden * neurons elements, once for every 16 rows of input; the
// parts' sums stay in L2.
//
// In eight bits a neuron's scale differs from group to group of its columns, and a sum is over neurons. So it is multiplied with
// the coefficient, in float32, and what tensor cores get is the product's first 16 bits, as two numbers of bf16. bf16 holds every
// code, and has float32's range, so this is done for any 16-bit T.
#include <algorithm>

#include "mma.cuh"
#include "weights.cuh"

namespace sirius::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kStep = 16;  // neurons that a warp adds up at a time: four a lane
constexpr int kLaneNeurons = 4;
constexpr int kPartNeurons = 128;  // least of a part: one step for each warp

// What the parts' lengths are multiples of.
template <class W>
constexpr int kPartUnit = kStep;
template <bool kHeld>
constexpr int kPartUnit<Across<kHeld>> = q4::kGroup;

// Columns of `out` that a warp has: 16 bytes for each of eight lanes, or of a plane for each of four.
template <class T, class W>
constexpr int kStretch = 8 * Vec<T>::size;
template <class T, bool kUpper>
constexpr int kStretch<T, Q8<kUpper>> = kStepGroups * q8::kGroup;
template <class T, bool kHeld>
constexpr int kStretch<T, Across<kHeld>> = kStepGroups * q4::kGroup;
constexpr int kLargestStretch = kStretch<bf16_t, Q8<false>>;

// Blocks of one row of input that a multiprocessor holds at a time, and of 16-bit types at least two thirds as many of sixteen.
template <class T, class W>
constexpr int kResident = sizeof(T) == 2 && std::is_same_v<W, Plain> ? 3 : 2;
constexpr int kMostProcessors = 192;  // that a card may have, as far as the workspace is concerned

// As many as run at a time, or fewer if all multiprocessors then have more equally much to read.
int parts_of(int stretches, int resident, int num_neurons) {
  const int processors = std::min(multiprocessors(), kMostProcessors), longest = ceil_div(num_neurons, kPartNeurons);
  const int most = std::max(1, std::min(resident * processors / stretches, longest));
  const auto share = [&](int parts) {  // of the multiprocessors' time that is used
    return double(parts * stretches) / (ceil_div(parts * stretches, processors) * processors);
  };
  int best = most;
  for (int parts = most - 1; parts > 0; --parts)
    if (share(parts) > share(best)) best = parts;
  return best;
}

// Neurons 4 t .. 4 t + 3 of a row of x.
template <class T>
using Quad = Packed<T, kLaneNeurons>;

// A coefficient times its neuron's scale, as two numbers of bf16: their sum.
struct ScaledQuad {
  Quad<bf16_t> first, rest;

  template <class T>
  __device__ __forceinline__ ScaledQuad(const Quad<T>& x, const Vec<float>& scales) {
    float product[kLaneNeurons], beyond[kLaneNeurons];
#pragma unroll
    for (int k = 0; k < kLaneNeurons; ++k) product[k] = x[k] * scales[k];
    first = Quad<bf16_t>::rounded(product);
#pragma unroll
    for (int k = 0; k < kLaneNeurons; ++k) beyond[k] = product[k] - first[k];
    rest = Quad<bf16_t>::rounded(beyond);
  }

  // sums += a times the column of input that this is.
  __device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&a)[4]) const {
    mma<bf16_t>(sums, {{a[0], a[1], a[2], a[3]}, {first.words[0], first.words[1]}});
    mma<bf16_t>(sums, {{a[0], a[1], a[2], a[3]}, {rest.words[0], rest.words[1]}});
  }
};

// The sums of a warp: kStretch columns of out by Columns rows of input.
template <class T, class W, int Columns>
class Sums {
 public:
  static constexpr int kInputs = Columns / 8;
  __device__ static __forceinline__ int column(int input) { return input * 8 + lane_row(); }

  // weights[i]: 16 bytes of neuron 4 t + i, from column 8 g of the stretch on.
  __device__ __forceinline__ void add(const Vec<T> (&weights)[kLaneNeurons], const Quad<T> (&x)[kInputs]) {
    // The tile's row g is the even one of the lane's columns 2 j and 2 j + 1, and row g + 8 the odd one.
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t w[kLaneNeurons] = {weights[0].words[j], weights[1].words[j], weights[2].words[j], weights[3].words[j]};
#pragma unroll
      for (int i = 0; i < kInputs; ++i)
        mma<T>(sums_[j][i],
               {{lower_halves(w[0], w[1]), upper_halves(w[0], w[1]), lower_halves(w[2], w[3]), upper_halves(w[2], w[3])},
                {x[i].words[0], x[i].words[1]}});
    }
  }

  __device__ __forceinline__ void put(float (&out)[Columns][kStretch<T, W>]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < kInputs; ++i)
#pragma unroll
        for (int k = 0; k < 4; ++k) out[i * 8 + lane_part() * 2 + k % 2][lane_row() * 8 + 2 * j + k / 2] = sums_[j][i][k];
  }

 private:
  float sums_[4][kInputs][4] = {};
};

template <class W, int Columns>
class Sums<float, W, Columns> {
 public:
  static constexpr int kInputs = Columns;
  __device__ static __forceinline__ int column(int input) { return input; }

  __device__ __forceinline__ void add(const Vec<float> (&weights)[kLaneNeurons], const Quad<float> (&x)[kInputs]) {
#pragma unroll
    for (int i = 0; i < Columns; ++i)
#pragma unroll
      for (int n = 0; n < kLaneNeurons; ++n)
#pragma unroll
        for (int c = 0; c < Vec<float>::size; ++c) sums_[i][c] += weights[n][c] * x[i][n];
  }

  __device__ __forceinline__ void put(float (&out)[Columns][kStretch<float, W>]) const {
#pragma unroll
    for (int i = 0; i < Columns; ++i)
#pragma unroll
      for (int c = 0; c < Vec<float>::size; ++c) {
        float sum = sums_[i][c];
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        if (lane_part() == 0) out[i][lane_row() * Vec<float>::size + c] = sum;
      }
  }

 private:
  float sums_[Columns][Vec<float>::size] = {};
};

template <class T, bool kUpper, int Columns>
class Sums<T, Q8<kUpper>, Columns> {
 public:
  static constexpr int kInputs = Columns / 8;
  __device__ static __forceinline__ int column(int input) { return input * 8 + lane_row(); }

  // codes: of the step's neurons, in the stretch's groups.
  __device__ __forceinline__ void add(const Q8Codes& codes, const Quad<T> (&x)[kInputs]) {
#pragma unroll
    for (int group = 0; group < kStepGroups; ++group) {
      uint32_t four[kLaneNeurons], a[2][4];
#pragma unroll
      for (int i = 0; i < kLaneNeurons; ++i) four[i] = codes.four(lane_part() * kLaneNeurons + i, group, lane_row());
      // The tile's row g is the even one of the lane's columns 2 j and 2 j + 1, and row g + 8 the odd one.
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k) a[j][k] = both(four[k / 2 * 2], four[k / 2 * 2 + 1], 2 * j + k % 2);
      const Vec<float> scales = load(codes.scales[group] + lane_part() * kLaneNeurons);
#pragma unroll
      for (int i = 0; i < kInputs; ++i) {
        const ScaledQuad scaled(x[i], scales);
#pragma unroll
        for (int j = 0; j < 2; ++j) scaled.multiply(sums_[group][j][i], a[j]);
      }
    }
  }

  __device__ __forceinline__ void put(float (&out)[Columns][kStretch<T, Q8<kUpper>>]) const {
#pragma unroll
    for (int group = 0; group < kStepGroups; ++group)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < kInputs; ++i)
#pragma unroll
          for (int k = 0; k < 4; ++k)
            out[i * 8 + lane_part() * 2 + k % 2][group * q8::kGroup + lane_row() * 4 + 2 * j + k / 2] = sums_[group][j][i][k];
  }

 private:
  // The numbers of byte `which` of two neurons' codes.
  __device__ static __forceinline__ uint32_t both(uint32_t a, uint32_t b, int which) {
    return q8_numbers<bf16_t, kUpper>(__byte_perm(a, b, which | (which + 4) << 8));
  }

  float sums_[kStepGroups][2][kInputs][4] = {};
};

// The upper nibbles of sixteen neurons' codes, and their scales, in a warp's shared memory.
struct alignas(16) UpperCodes {
  NibbleQuads quads;
  float scales[kStepGroups][kTileRows + 8];  // neurons apart: 32 lanes write to 32 banks

  __device__ __forceinline__ void put(int neuron, int group, const Q8Group<true>& from) {
    quads.put(neuron % 8, neuron / 8, group, from.upper);
    scales[group][neuron] = to_float(from.scale);
  }
};

// The same of the upper nibbles alone with one row of input, where tensor cores have eight columns: four of them are the row
// times the scales of the stretch's four groups. A tile has columns of `out` from two groups, and each counts where its group is.
template <class T>
class Sums<T, Q8<true>, 1> {
 public:
  static constexpr int kInputs = 1;
  __device__ static __forceinline__ int column(int) { return 0; }

  __device__ __forceinline__ void add(const UpperCodes& codes, const Quad<T> (&x)[1]) {
    const ScaledQuad scaled(x[0], load(codes.scales[lane_row() % kStepGroups] + lane_part() * kLaneNeurons));
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      uint32_t words[kLaneNeurons];
#pragma unroll
      for (int i = 0; i < kLaneNeurons; ++i) words[i] = codes.quads.word(lane_part(), i, lane_row() + 8 * q);
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        uint32_t a[4];
        nibble_tile<bf16_t>(words, b, a);
#pragma unroll
        for (int k = 0; k < 4; ++k) a[k] = upper_numbers(a[k], 0xc1c0c1c0u);  // 16 + code - 24
        scaled.multiply(sums_[q][b], a);
      }
    }
  }

  __device__ __forceinline__ void put(float (&out)[1][kStretch<T, Q8<true>>]) const {
    const bool second = lane_row() >= 4;  // of the tile's groups
#pragma unroll
    for (int q = 0; q < 2; ++q)
#pragma unroll
      for (int b = 0; b < 4; ++b)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float of_first = sums_[q][b][2 * half], of_second = sums_[q][b][2 * half + 1];
          if (lane_part() == q)
            out[0][(2 * q + second) * q8::kGroup + half * 16 + lane_row() % 4 * 4 + b] = second ? of_second : of_first;
        }
  }

 private:
  float sums_[2][4][4] = {};
};

// 32 slots for neurons of one group, of which a lane multiplies four in each half.
constexpr int kSlots = q4::kGroup;

template <class T, bool kHeld, int Columns>
class Sums<T, Across<kHeld>, Columns> {
 public:
  static constexpr int kInputs = Columns / 8;
  __device__ static __forceinline__ int column(int input) { return input * 8 + lane_row(); }

  // x: coefficients of the slots, zero where a slot is empty. What is in the second half counts if `both`.
  __device__ __forceinline__ void add(const AcrossCodes& codes, const Quad<T> (&x)[2][kInputs], bool both) {
    float totals[kInputs][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < kInputs; ++i)
        mma<T>(totals[i], {{kOnes<T>, kOnes<T>, kOnes<T>, kOnes<T>}, {x[half][i].words[0], x[half][i].words[1]}});
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      uint32_t words[2][kLaneNeurons];
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < kLaneNeurons; ++i) words[half][i] = codes.quads[half].word(lane_part(), i, lane_row() + 8 * q);
      // One of a word's four bytes after the other: all sums at once are more than a thread has registers for.
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        float sums[kInputs][4] = {};
        multiply(sums, words[0], b, x[0]);
        if (both) multiply(sums, words[1], b, x[1]);
        const Affine first = codes.affine[q][b][lane_row()][0], second = codes.affine[q][b][lane_row()][1];
#pragma unroll
        for (int i = 0; i < kInputs; ++i)
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const Affine of = k < 2 ? first : second;
            sums_[q][b][i][k] = fmaf(of.minimum, totals[i][k % 2], fmaf(of.scale, sums[i][k], sums_[q][b][i][k]));
          }
      }
    }
  }

  __device__ __forceinline__ void put(float (&out)[Columns][kStretch<T, Across<kHeld>>]) const {
#pragma unroll
    for (int q = 0; q < 2; ++q)
#pragma unroll
      for (int b = 0; b < 4; ++b)
#pragma unroll
        for (int i = 0; i < kInputs; ++i)
#pragma unroll
          for (int k = 0; k < 4; ++k)
            out[i * 8 + lane_part() * 2 + k % 2][(2 * q + lane_row() / 4) * q4::kGroup + k / 2 * 16 + lane_row() % 4 * 4 + b] =
                sums_[q][b][i][k];
  }

 private:
  __device__ static __forceinline__ void multiply(float (&sums)[kInputs][4], const uint32_t (&words)[kLaneNeurons], int b,
                                                  const Quad<T> (&x)[kInputs]) {
    uint32_t a[4];
    nibble_tile<T>(words, b, a);
#pragma unroll
    for (int i = 0; i < kInputs; ++i) mma<T>(sums[i], {{a[0], a[1], a[2], a[3]}, {x[i].words[0], x[i].words[1]}});
  }

  float sums_[2][4][kInputs][4] = {};
};

// What a warp has in shared memory of a step, and how many steps' weights it loads at a time: as many as keep memory busy.
template <class T, class W, int Columns>
struct StepOf {
  using Scratch = typename WeightRow<T, W, true>::Scratch;
  static constexpr int kTogether = 1;
};
template <class T>
struct StepOf<T, Q8<true>, 1> {
  using Scratch = UpperCodes;
  static constexpr int kTogether = 2;
};

template <class T, class W, int Columns>
struct Shared {
  // Of a warp: first what it multiplies, then its sums.
  union Warp {
    typename StepOf<T, W, Columns>::Scratch scratch[StepOf<T, W, Columns>::kTogether];
    float sums[Columns][kStretch<T, W>];
  };
  Warp warps[kWarps];
  int32_t last;
};

// What a block adds up of one row of `x` after another.
template <class T>
struct Part {
  const T* x;      // of the block's first row of input
  int rows;        // of input
  int begin, end;  // neurons
  int column;      // of `out`, the first

  __device__ __forceinline__ int neuron(const DownParams& p, int i) const { return i < end ? (p.neurons ? p.neurons[i] : i) : 0; }

  // Neurons first .. first + 3 of the input rows that a lane multiplies, zero from `end` on. One row may have any number of them.
  template <class Sums>
  __device__ __forceinline__ void load(const DownParams& p, int first, Quad<T> (&out)[Sums::kInputs]) const {
    const bool by_quads =
        reinterpret_cast<std::uintptr_t>(p.x) % sizeof(Quad<T>) == 0 && (p.num_neurons % kLaneNeurons == 0 || p.num_rows == 1);
#pragma unroll
    for (int i = 0; i < Sums::kInputs; ++i) {
      const int m = Sums::column(i);
      const T* from = x + size_t(m) * p.num_neurons + first;
      out[i] = {};
      if (m >= rows) continue;
      if (by_quads && first + kLaneNeurons <= end) {
        out[i] = *reinterpret_cast<const Quad<T>*>(from);
      } else {
#pragma unroll
        for (int j = 0; j < kLaneNeurons; ++j)
          if (first + j < end) out[i].put(j, from[j]);
      }
    }
  }
};

// Adds what this warp has of the part. Neurons are looked up a step before their weights are loaded.
template <class T, class W, bool Aligned, int Columns>
__device__ __forceinline__ void add_neurons(const DownParams& p, const Part<T>& part, NoScratch*, Sums<T, W, Columns>& sums) {
  constexpr bool kAhead = sizeof(T) == 2 && Aligned;
  constexpr int kStride = kWarps * kStep;
  const int begin = part.begin + int(threadIdx.x) / kWarp * kStep, own = lane_part() * kLaneNeurons,
            column = part.column + lane_row() * Vec<T>::size;
  int next[kLaneNeurons];
  const auto look_up = [&](int first) {
#pragma unroll
    for (int i = 0; i < kLaneNeurons; ++i) next[i] = part.neuron(p, first + own + i);
  };
  Vec<T> loaded[kLaneNeurons], weights[kLaneNeurons];
  const auto load = [&](int first) {
#pragma unroll
    for (int i = 0; i < kLaneNeurons; ++i)
      loaded[i] = WeightRow<T, W, Aligned>(p.down, next[i]).load(column, first + own + i < part.end ? p.down.cols : 0);
    look_up(first + kStride);
  };
  const auto take = [&] {
#pragma unroll
    for (int i = 0; i < kLaneNeurons; ++i) weights[i] = loaded[i];
  };
  look_up(begin);
  if (kAhead) load(begin);
  wait_for_kernel_before();
  in_steps<kAhead>(begin, part.end, kStride, load, take, [&](int first) {
    Quad<T> inputs[Sums<T, W, Columns>::kInputs];
    part.template load<Sums<T, W, Columns>>(p, first + own, inputs);
    sums.add(weights, inputs);
  });
}

// The same in eight bits. A lane loads a group of each of two neurons, and multiplies four columns of four neurons in each group.
template <class T, class W, bool Aligned, int Columns, bool kUpper>
__device__ __forceinline__ void add_neurons(const DownParams& p, const Part<T>& part,
                                            typename StepOf<T, Q8<kUpper>, Columns>::Scratch* codes,
                                            Sums<T, Q8<kUpper>, Columns>& sums) {
  constexpr bool kAhead = kUpper || Columns == 8;
  constexpr int kStride = kWarps * kStep, kTogether = StepOf<T, Q8<kUpper>, Columns>::kTogether;
  const int begin = part.begin + int(threadIdx.x) / kWarp * kStep;
  int next[kTogether][2];
  const auto look_up = [&](int first) {
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) next[i][half] = part.neuron(p, first + i * kStride + lane_row() + half * 8);
  };
  Q8Group<kUpper> loaded[kTogether][2];
  const auto load = [&](int first) {
    int neurons[kTogether][2];
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) neurons[i][half] = next[i][half];
    look_up(first + kTogether * kStride);
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        WeightRow<T, W, Aligned>(p.down, neurons[i][half])
            .load(loaded[i][half], part.column / q8::kGroup + lane_part(), p.down.cols,
                  first + i * kStride + lane_row() + half * 8 < part.end);
  };
  const auto take = [&] {
    __syncwarp();  // all lanes have used the codes before
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) codes[i].put(lane_row() + half * 8, lane_part(), loaded[i][half]);
    __syncwarp();
  };
  look_up(begin);
  if (kAhead) load(begin);
  wait_for_kernel_before();
  in_steps<kAhead>(begin, part.end, kTogether * kStride, load, take, [&](int first) {
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      Quad<T> inputs[Sums<T, W, Columns>::kInputs];
      part.template load<Sums<T, W, Columns>>(p, first + i * kStride + lane_part() * kLaneNeurons, inputs);
      sums.add(codes[i], inputs);
    }
  });
  __syncwarp();  // the sums are put where the codes were
}

// The same where 32 neurons have their scales together. A step has neurons of one of these groups, in slots of which every fourth
// begins where four coefficients may be loaded at once.
template <class T, class W, bool Aligned, int Columns, bool kHeld>
__device__ __forceinline__ void add_neurons(const DownParams& p, const Part<T>& part, AcrossCodes* codes,
                                            Sums<T, Across<kHeld>, Columns>& sums) {
  constexpr bool kAhead = Columns == 8;
  constexpr int kInputs = Sums<T, Across<kHeld>, Columns>::kInputs;
  const bool supers = p.down.format == Format::q4_k_across;
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  // The warps' stretches cut no group, or in a list no four.
  const int unit = p.neurons ? kLaneNeurons : q4::kGroup, length = ceil_div(ceil_div(part.end - part.begin, kWarps), unit) * unit;
  const int begin = part.begin + warp * length;
  const Part<T> own{part.x, part.rows, begin, begin + length < part.end ? begin + length : part.end, part.column};
  const int groups = q4::groups(p.down.cols), first_group = part.column / q4::kGroup;

  // A step: its slots begin at place `first` of the list; those of the bits set are its neurons.
  struct Step {
    int first;
    unsigned slots;
  } loaded, step;
  Vec<uint32_t> nibbles[4];
  AcrossScales scales;
  // Of the slot with this lane's number, for the step that is to be loaded next: the row, or -1, and of which neuron it is. The
  // neuron is looked up after the products of the step before, so that nothing waits for the list in between.
  int row, neuron;
  const auto look_up = [&](int place) {
    const int i = place / kLaneNeurons * kLaneNeurons + lane;
    row = i < own.end ? (p.neurons ? p.neurons[i] : i) : -1;
  };
  const auto look_up_neuron = [&] { neuron = kHeld && row >= 0 ? p.down.neuron_of[row] : row; };
  // Returns where the next step begins.
  const auto load = [&](int place) {
    const int skipped = place % kLaneNeurons, group = __shfl_sync(kAllLanes, neuron / q4::kGroup, skipped);
    const unsigned same = __ballot_sync(kAllLanes, row >= 0 && neuron / q4::kGroup == group) >> skipped;
    const int count = same == ~0u ? kSlots : __ffs(int(~same)) - 1;
    loaded = {place - skipped, (count == kSlots ? ~0u : (1u << count) - 1) << skipped};
    const unsigned there = first_group + lane_part() < groups ? loaded.slots >> lane_row() : 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int slot = lane_row() + 8 * i;
      nibbles[i] =
          WeightRow<T, W, Aligned>(p.down, __shfl_sync(kAllLanes, row, slot)).load(first_group + lane_part(), there >> 8 * i & 1);
    }
    scales.load(p.down, group, part.column + lane * 4, count > 0 && first_group + lane / 8 < groups);
    look_up(place + count);
    return place + count;
  };
  const auto take = [&] {
    __syncwarp();  // all lanes have used what was there before
#pragma unroll
    for (int i = 0; i < 4; ++i) codes->put(lane_row(), i, lane_part(), nibbles[i]);
    codes->put_scales(lane, supers, scales);
    step = loaded;
    __syncwarp();
  };
  look_up(begin);
  look_up_neuron();
  int next = begin;
  if (kAhead) {
    next = load(begin);
    look_up_neuron();
  }
  wait_for_kernel_before();
#pragma unroll 1
  for (int place = begin; place < own.end;) {
    if (!kAhead) next = load(place);
    take();
    place = next;
    if (kAhead) next = load(place);
    Quad<T> x[2][kInputs];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int slot = half * 16 + lane_part() * kLaneNeurons;
      own.template load<Sums<T, Across<kHeld>, Columns>>(p, step.first + slot, x[half]);
      const unsigned there = step.slots >> slot;
#pragma unroll
      for (int i = 0; i < kInputs; ++i)
#pragma unroll
        for (int w = 0; w < 2; ++w)
          x[half][i].words[w] &= (there >> 2 * w & 1 ? 0xffffu : 0u) | (there >> (2 * w + 1) & 1 ? 0xffff0000u : 0u);
    }
    sums.add(*codes, x, step.slots >> 16 != 0);
    look_up_neuron();
  }
  __syncwarp();  // the sums are put where the codes were
}

// grid: [stretches of columns, rows of input / 16, parts of the neurons]
template <class T, class W, bool Aligned, int Columns>
__global__ void __launch_bounds__(kWarps* kWarp, (sizeof(T) == 4            ? 1
                                                  : Columns <= 8 && Aligned ? kResident<T, W>
                                                                            : 2))
    down_kernel(const DownParams p, const Workspace workspace, int first_row) {
  auto& shared = shared_memory<Shared<T, W, Columns>>();
  constexpr int stretch = kStretch<T, W>;
  if ((p.neurons || p.num_neurons_at) && !p.settled) wait_for_kernel_before();
  const int neurons = p.num_neurons_at ? *p.num_neurons_at : p.num_neurons, hidden = p.down.cols;
  const int row = first_row + int(blockIdx.y) * kTileRows, rows = p.num_rows - row < Columns ? p.num_rows - row : Columns;
  const int column = int(blockIdx.x) * stretch, parts = int(gridDim.z);
  const int part = ceil_div(ceil_div(neurons, kPartUnit<W>), parts) * kPartUnit<W>;
  const int begin = int(blockIdx.z) * part, end = begin + part < neurons ? begin + part : neurons;
  const T* x = static_cast<const T*>(p.x) + size_t(row) * p.num_neurons;

  Sums<T, W, Columns> sums;
  auto& warp = shared.warps[threadIdx.x / kWarp];
  add_neurons<T, W, Aligned, Columns>(p, {x, rows, begin, end, column}, warp.scratch, sums);
  sums.put(warp.sums);
  __syncthreads();

  const auto finish = [&](int m, int c, float sum) {
    const size_t at = size_t(row + m) * hidden + column + c;
    const float residual = p.residual ? to_float(static_cast<const T*>(p.residual)[at]) : 0.0f;
    static_cast<T*>(p.out)[at] = from_float<T>(scaled(sum, p.scale, 0.0f, residual));
  };
  const size_t plane = size_t(p.num_rows) * hidden;
  const auto partial = [&](int m, int c) { return workspace.floats + size_t(row + m) * hidden + column + c; };
  const int columns = hidden - column < stretch ? hidden - column : stretch;
  for (int i = int(threadIdx.x); i < Columns * stretch; i += kWarps * kWarp) {
    const int m = i / stretch, c = i % stretch;
    if (m >= rows || c >= columns) continue;
    float sum = shared.warps[0].sums[m][c];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += shared.warps[w].sums[m][c];
    if (parts == 1)
      finish(m, c, sum);
    else
      partial(m, c)[blockIdx.z * plane] = sum;
  }
  if (parts == 1 || !last_block(workspace.counters + blockIdx.y * gridDim.x + blockIdx.x, parts, &shared.last)) return;
  for (int i = int(threadIdx.x); i < rows * columns; i += kWarps * kWarp) {
    const int m = i / columns, c = i % columns;
    float sum = 0.0f;
    for (int z = 0; z < parts; ++z) sum += partial(m, c)[z * plane];
    finish(m, c, sum);
  }
}

// body(Type<W>()) for a format whose rows are added up with input of T. held: they say whose they are.
template <class T, class Body>
void with_sum(Format format, bool held, Body&& body) {
  if (is_plain(format)) return body(Type<Plain>());
  if constexpr (sizeof(T) == 4) {
    body(Type<Numbers>());
  } else {
    if (format == Format::q8) return body(Type<Q8<false>>());
    if (format == Format::q8_upper) return body(Type<Q8<true>>());
    with_flag(held, [&](auto flag) { body(Type<Across<flag.value>>()); });
  }
}

}  // namespace

void down(const DownParams& p, Workspace workspace, StreamHandle stream) {
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_sum<T>(p.down.format, p.down.neuron_of != nullptr, [&](auto format) {
      using W = typename decltype(format)::type;
      const int hidden = p.down.cols, stretch = kStretch<T, W>;
      const int stretches = ceil_div(hidden, stretch), parts = parts_of(stretches, kResident<T, W>, p.num_neurons);
      // Every group of 16 rows and every stretch has a counter of its own.
      const int groups = ceil_div(p.num_rows, kTileRows),
                together = kCounters / stretches < groups ? kCounters / stretches : groups;
      const auto start = [&](auto aligned, auto columns) {
        for (int first = 0; first < groups; first += together) {
          const dim3 grid(stretches, groups - first < together ? groups - first : together, parts);
          launch<down_kernel<T, W, aligned.value, columns.value>>(
              "down", grid, kWarps * kWarp, sizeof(Shared<T, W, columns.value>), stream, p, workspace, first * kTileRows);
        }
      };
      const auto for_speed = [&](auto aligned) {
        if constexpr (std::is_same_v<W, Q8<true>>)
          if (p.num_rows == 1) return start(aligned, std::integral_constant<int, 1>());
        with_columns(p.num_rows, [&](auto columns) { start(aligned, columns); });
      };
      if constexpr (std::is_same_v<W, Plain>)
        with_flag(weights_aligned<T>(p.down), for_speed);
      else if constexpr (sizeof(T) == 2)
        for_speed(std::true_type());
      else
        start(std::false_type(), std::integral_constant<int, 16>());
    });
  });
}

size_t down_workspace(int num_rows, int hidden, int num_neurons) {
  const int most = std::max(1, kResident<bf16_t, Plain> * kMostProcessors / ceil_div(hidden, kLargestStretch));
  return size_t(std::min(most, ceil_div(num_neurons, kPartNeurons))) * num_rows * hidden;
}

}  // namespace sirius::cuda
