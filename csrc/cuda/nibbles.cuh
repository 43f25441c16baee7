// Rows of nibbles with a scale and a minimum for each group of 32, on the way to tensor cores: q4 and q4_k (csrc/q4.h), and
// q8_upper (csrc/q8.h), which is the same with a minimum that its scale says. All three begin with headers of 16 bytes, after
// which come the nibbles; what a header says is looked up as it is read, so that one body serves all.
//
//   weight = scale * code + minimum
//
// A nibble becomes a number by its bits alone: beside the exponent of 16 they make 16 + code. What that is too much goes off the
// minimum, which is multiplied with the sum of the group's inputs: tensor cores add that up, as a product with ones.
//
// As in q8.cuh a lane reads whole groups, and what tensor cores add up must be of one group: so nibbles go through shared memory,
// as they are.
#pragma once

#include "../q4.h"
#include "mma.cuh"

namespace sirius::cuda {

struct alignas(8) Affine {
  float scale, minimum;
};

constexpr float kNibbleStart = 16.0f;  // the number of a nibble of zero

// Two weights as numbers of T, `16 + code`. word: their nibbles in bits `bit` to `bit` + 3 and 16 above.
template <class T>
__device__ __forceinline__ uint32_t nibble_numbers(uint32_t word, int bit) {
  constexpr bool kBf16 = std::is_same_v<T, bf16_t>;
  constexpr int to = kBf16 ? 3 : 6;  // a unit is the eighth, or the sixty-fourth, of what counts one beside 16
  constexpr uint32_t mask = 0x000f000fu << to, sixteen = kBf16 ? 0x41804180u : 0x4c004c00u;
  return masked_or<mask, sixteen>(bit < to ? word << (to - bit) : word >> (bit - to));
}

// Groups that a header is for: 2 to the power of this.
__device__ __forceinline__ int header_power(Format format) { return format == Format::q4 ? 2 : 3; }
static_assert(q4::header_groups(false) == 1 << 2 && q4::header_groups(true) == 1 << 3);

// Bytes of a row's headers, and of those before the one of a group.
__device__ __forceinline__ int header_bytes(Format format, int cols) {
  const int power = header_power(format);
  return (q4::groups(cols) + (1 << power) - 1) >> power << 4;
}
__device__ __forceinline__ int header_at(Format format, int group) { return group >> header_power(format) << 4; }

// One weight of such a row, for bodies that are not for speed.
inline SIRIUS_OUT_OF_LINE __device__ float nibble_weight(Format format, const void* row, int column, int cols) {
  const int group = column / q4::kGroup, place = column % q4::kGroup;
  const char* const at = static_cast<const char*>(row);
  const uint8_t byte = at[header_bytes(format, cols) + group * q4::kGroupBytes + place % q4::kGroupBytes];
  const float code = float(byte >> place / q4::kGroupBytes * 4 & 15);
  const f16_t* const halves = reinterpret_cast<const f16_t*>(row);
  if (format == Format::q8_upper) return to_float(halves[group]) * (16.0f * code - q8::kUpperZero);
  if (format == Format::q4) return to_float(halves[2 * group]) * code + to_float(halves[2 * group + 1]);
  const auto* const header = reinterpret_cast<const uint32_t*>(at + header_at(format, group));
  const int own = group % q4::kSuper;
  const uint32_t tops = header[1] >> 24 | header[2] >> 24 << 8 | header[3] >> 24 << 16;
  const uint32_t fields = (own < 6 ? header[1 + own / 2] : tops) >> own % 2 * 12;
  const auto* const supers = reinterpret_cast<const f16_t*>(header);
  return to_float(supers[0]) * float(fields & 63) * code - to_float(supers[1]) * float(fields >> 6 & 63);
}

// One weight of a row whose scales are common to 32 rows: q4_across and q4_k_across.
inline SIRIUS_OUT_OF_LINE __device__ float across_weight(Format format, const void* row, const void* shared, int group,
                                                         int column, int cols) {
  const bool supers = format == Format::q4_k_across;
  const int place = column % q4::kGroup;
  const uint8_t byte = static_cast<const uint8_t*>(row)[column / q4::kGroup * q4::kGroupBytes + place % q4::kGroupBytes];
  const char* const at = static_cast<const char*>(shared) + q4::shared_at(group, cols, supers);
  const f16_t* const pair =
      reinterpret_cast<const f16_t*>(supers ? static_cast<const char*>(shared) + q4::super_at(group, cols) : at) + 2 * column;
  const uint8_t* const fields = reinterpret_cast<const uint8_t*>(at) + 2 * column;
  const float code = float(byte >> place / q4::kGroupBytes * 4 & 15);
  if (!supers) return to_float(pair[0]) * code + to_float(pair[1]);
  return to_float(pair[0]) * float(fields[0]) * code - to_float(pair[1]) * float(fields[1]);
}

// --------------------------------------------------------------------------------------------------- groups along the rows

constexpr int kNibbleStep = 8;  // groups of a row that a warp reads at a time, two a lane: those of one header, or q4's two

// Two groups of one row, 2 t and 2 t + 1 of a step's eight for a lane 4 g + t, and what their header says of them, as it lies in
// memory: of q4 scale and minimum of one and of the other, of q8_upper the two scales, of q4_k what eight groups have in common,
// and fields.
struct NibbleGroups {
  Vec<uint32_t> nibbles[2];
  uint32_t header[2];

  // step: its first group. What is not there is not read, and is zero.
  __device__ __forceinline__ void load(Format format, const void* row, int step, int cols) {
    const int group = step + 2 * lane_part(), left = q4::groups(cols) - group;
    const char* const at = static_cast<const char*>(row);
    const auto* const from = reinterpret_cast<const uint32_t*>(at + (header_bytes(format, cols) + group * q4::kGroupBytes));
    nibbles[0] = load_streaming(from, left > 0);
    nibbles[1] = load_streaming<q4::kGroupBytes>(from, left > 1);
    const int first = format == Format::q4 ? lane_part() % 2 * 8 : format == Format::q4_k ? 0 : lane_part() * 4;
    const int second = format == Format::q4 ? first + 4 : format == Format::q4_k ? (lane_part() + 1) % 4 * 4 : first;
    header[0] = load_word(at + (header_at(format, group) + first), left > 0);
    header[1] = load_word(at + (header_at(format, group) + second), left > 0);
  }
};

// The nibbles of sixteen rows by eight groups, in a warp's shared memory. Sixteen bytes lie together, places apart so that lanes
// share no bank: not those of rows 2 i and 2 i + 1 that write a group of every other, nor those of eight rows that read one.
struct alignas(16) NibbleCodes {
  static constexpr int kGroup = kTileRows + 1, kAffine = kTileRows + 2;

  uint32_t words[kNibbleStep * kGroup][4];
  Affine affine[kNibbleStep][kAffine];

  // By all lanes of a warp: what each has of rows lane_row() and lane_row() + 8.
  __device__ __forceinline__ void put(Format format, const NibbleGroups (&from)[2]) {
    const bool supers = format == Format::q4_k, pairs = format == Format::q4;
    // Scale and minimum are two halves times two numbers of six bits, and a factor: where there are no such numbers, times these.
    uint32_t fields[2];
    fields[0] = fields[1] = pairs ? 0x041041u : 0x050050u;  // 1 and 1, or 16 and 1
    if (supers) {
      // Those of the last two groups are in the top bytes of the words of the others.
      const uint32_t tops = __byte_perm(from[0].header[1], from[1].header[1], 0x7733);
      const int lane = lane_row() * 4;
      const uint32_t first = __shfl_sync(kAllLanes, tops, lane), second = __shfl_sync(kAllLanes, tops, lane + 1),
                     third = __shfl_sync(kAllLanes, tops, lane + 2), two = __byte_perm(first, second, 0x6240);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        fields[half] = lane_part() < 3 ? from[half].header[1] : __byte_perm(two, third, half == 0 ? 0x4410 : 0x6632);
    }
    const float factor = supers ? -1.0f : pairs ? 1.0f : -q8::kUpperZero;
    const unsigned halves[2] = {supers || pairs ? 0x3210u : 0x1010u, supers ? 0x3210u : pairs ? 0x7654u : 0x3232u};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const NibbleGroups& own = from[half];
      const int row = lane_row() + half * 8;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int group = 2 * lane_part() + i;
        Vec<uint32_t> turned;  // neighbours 16 bits apart, where a word of T has them
#pragma unroll
        for (int w = 0; w < 4; ++w) turned.words[w] = __byte_perm(own.nibbles[i].words[w], 0, 0x3120);
        store(words[group * kGroup + row], turned);
        const uint32_t both = __byte_perm(own.header[0], own.header[1], halves[i]);
        const float scale = half_of<f16_t>(both, 0) * float(fields[half] >> 12 * i & 63),
                    minimum = half_of<f16_t>(both, 1) * float(fields[half] >> (12 * i + 6) & 63);
        affine[group][row] = {scale, fmaf(minimum, factor, -kNibbleStart * scale)};
      }
    }
  }

  // Weights 4 part .. 4 part + 3 of a group, and those 16 further on.
  template <class T>
  __device__ __forceinline__ Vec<T> eight(int row, int group, int part) const {
    const uint32_t word = words[group * kGroup + row][part];
    return {nibble_numbers<T>(word, 0), nibble_numbers<T>(word, 8), nibble_numbers<T>(word, 4), nibble_numbers<T>(word, 12)};
  }
};

// ------------------------------------------------------------------------------------------------ scales of 32 rows together

// Scales and minima of four columns of 32 rows, as they lie in memory.
struct AcrossScales {
  Vec<uint32_t> pairs;         // of each column two halves
  Packed<uint32_t, 2> fields;  // of each two bytes

  // column: a multiple of four.
  __device__ __forceinline__ void load(const Matrix& matrix, int group, int column, bool there) {
    const bool supers = matrix.format == Format::q4_k_across;
    const char* const shared = static_cast<const char*>(matrix.shared);
    const char* const at = shared + q4::shared_at(group, matrix.cols, supers);
    // d and e are those of eight groups, of which the same warp reads the next ones soon.
    pairs = load_weights<false, 0>(
        reinterpret_cast<const uint32_t*>(supers ? shared + q4::super_at(group, matrix.cols) : at) + column, there);
    fields = {};
    if (supers && there) fields = *reinterpret_cast<const Packed<uint32_t, 2>*>(at + 2 * column);
  }

  __device__ __forceinline__ Affine column(bool supers, int i) const {
    const float d = half_of<f16_t>(pairs.words[i], 0), e = half_of<f16_t>(pairs.words[i], 1);
    if (!supers) return {d, e};
    const uint32_t both = fields.words[i / 2] >> i % 2 * 16;
    return {d * float(both & 255), -(e * float(both >> 8 & 255))};
  }
};

// The nibbles of 32 rows by four groups of columns, as 16-bit pairs want them, and the scales of these columns.
//
// A lane of those that multiply, 4 g + t, has of rows 4 t .. 4 t + 3, and of rows 16 further on, words g and g + 8: of group g /
// 4 columns 4 (g % 4) .. 4 (g % 4) + 3 and those 16 further on, and the same of the group after the next. Rows are places apart
// so that lanes share no bank.
struct alignas(16) AcrossCodes {
  static constexpr int kRow = 4 * 4, kFour = 4 * kRow + 8;  // words of a row, and from one four to the next

  uint32_t words[2][4 * kFour];
  Affine affine[2][4][8][2];  // of column 32 (2 i + g / 4) + 16 k + 4 (g % 4) + b at [i][b][g][k]

  // Group `group` of the stretch, of row `row` + 8 `eight`, row < 8.
  __device__ __forceinline__ void put(int row, int eight, int group, const Vec<uint32_t>& nibbles) {
    store(words[eight / 2] + row / 4 * kFour + row % 4 * kRow + 4 * group + eight % 2 * 2 * kFour, nibbles);
  }

  // Word `word` of row 4 `part` + i, or of that 16 further on.
  __device__ __forceinline__ uint32_t word(int half, int part, int i, int word) const {
    return words[half][part * kFour + word + i * kRow];
  }

  // Columns 4 `four` .. 4 `four` + 3 of the stretch.
  __device__ __forceinline__ void put_scales(int four, bool supers, const AcrossScales& from) {
    const int group = four / 8, half = four % 8 / 4, g = group % 2 * 4 + four % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Affine column = from.column(supers, i);
      affine[group / 2][i][g][half] = {column.scale, column.minimum - kNibbleStart * column.scale};
    }
  }
};

}  // namespace sirius::cuda
