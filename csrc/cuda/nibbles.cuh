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
  return masked_or(bit < to ? word << (to - bit) : word >> (bit - to), mask, sixteen);
}

// The eight weights of a word of nibbles as they lie in memory, byte b with those of b and 16 + b: these four, and then those
// 16 further on. A number of bf16 has its code in one byte, so that a word's four are made together, and only then go apart; for
// f16 the bytes have been `turned`, neighbours 16 bits apart.
template <class T>
__device__ __forceinline__ uint32_t turned(uint32_t word) {
  return std::is_same_v<T, bf16_t> ? word : __byte_perm(word, 0, 0x3120);
}
template <class T>
__device__ __forceinline__ Vec<T> eight_numbers(uint32_t word) {
  if constexpr (std::is_same_v<T, bf16_t>) {
    constexpr uint32_t sixteen = 0x41414141u;  // the upper byte of such a number
    const uint32_t first = masked_or(word << 3, 0x78787878u, 0x80808080u),
                   second = masked_or(word >> 1, 0x78787878u, 0x80808080u);
    return {__byte_perm(first, sixteen, 0x4140), __byte_perm(first, sixteen, 0x4342), __byte_perm(second, sixteen, 0x4140),
            __byte_perm(second, sixteen, 0x4342)};
  } else {
    return {nibble_numbers<T>(word, 0), nibble_numbers<T>(word, 8), nibble_numbers<T>(word, 4), nibble_numbers<T>(word, 12)};
  }
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

// Where a lane 4 g + t finds, in any row, groups 2 t and 2 t + 1 of a step's eight, and two words of their header. Of q4 these
// are scale and minimum of one and of the other; of q8_upper one of them is the two scales; of q4_k parts 0 and 3 have the first
// two words, parts 1 and 2 the others.
struct NibblePlaces {
  uint32_t nibbles;       // bytes from a row to the lane's first group
  uint32_t end;           // and to the end of the row
  uint32_t header;        // to the lane's words
  uint32_t header_bytes;  // for each group

  __device__ __forceinline__ NibblePlaces(Format format, int cols)
      : nibbles(added_up(uint32_t(cuda::header_bytes(format, cols) + 2 * lane_part() * q4::kGroupBytes))),
        end(added_up(uint32_t(cuda::header_bytes(format, cols) + q4::groups(cols) * q4::kGroupBytes))),
        header(added_up(8u * (format == Format::q4     ? lane_part()
                              : format == Format::q4_k ? (lane_part() + 1) / 2 % 2
                                                       : lane_part() / 2))),
        header_bytes(16u >> header_power(format)) {}
};

// The two groups of one row, as they lie in memory.
struct NibbleGroups {
  Vec<uint32_t> nibbles[2];
  Packed<uint32_t, 2> header;

  // step: its first group. What is not there is not read: its header is zero, and its nibbles do not matter. With `Ahead` they
  // are what was loaded before, which the registers hold until then; without these would be kept for that alone.
  template <bool Ahead>
  __device__ __forceinline__ void load(const NibblePlaces& places, const char* row, int step) {
    const uint32_t first = places.nibbles + uint32_t(step) * q4::kGroupBytes;
    const auto* const from = reinterpret_cast<const uint32_t*>(row + first);
    nibbles[0] = load_streaming<0, !Ahead>(from, first < places.end);
    nibbles[1] = load_streaming<q4::kGroupBytes, !Ahead>(from, first + q4::kGroupBytes < places.end);
    header = load_two_words(row + (places.header + uint32_t(step) * places.header_bytes), first < places.end);
  }
};

// Scales and minima of a lane's groups, from headers: [2 t, 2 t + 1][of row g, of row g + 8]. By all lanes of a warp.
struct NibbleAffine {
  Affine of[2][2];

  __device__ __forceinline__ NibbleAffine(Format format, const Packed<uint32_t, 2> (&headers)[2]) {
    if (format == Format::q8_upper)
      halves_alone(headers);
    else
      halves_times_fields(format == Format::q4_k, headers);
  }

 private:
  // A half for each group; two parts have the same two words.
  __device__ __forceinline__ void halves_alone(const Packed<uint32_t, 2> (&headers)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t word = lane_part() % 2 ? headers[half].words[1] : headers[half].words[0];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float scale = half_of<f16_t>(word, i);
        of[i][half] = {16.0f * scale, -(q8::kUpperZero + 16.0f * kNibbleStart) * scale};
      }
    }
  }

  // Scale and minimum are two halves times two numbers of six bits: where there are no such numbers, times one.
  __device__ __forceinline__ void halves_times_fields(bool supers, const Packed<uint32_t, 2> (&headers)[2]) {
    uint32_t fields[2], words[2][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      fields[half] = 0x041041u;
#pragma unroll
      for (int i = 0; i < 2; ++i) words[half][i] = headers[half].words[i];
    }
    if (supers) {
      // Fields of the last two groups are in the top bytes of the words of the others: of part 3's own, and of part 1's two.
      uint32_t tops =
          __byte_perm(__byte_perm(words[0][0], words[0][1], 0x0073), __byte_perm(words[1][0], words[1][1], 0x0073), 0x5410);
      tops = __shfl_sync(kAllLanes, tops, 1, 4);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t last = __byte_perm(words[half][1], tops, half == 0 ? 0x0543 : 0x0763);
        fields[half] = lane_part() == 3 ? last : lane_part() == 1 ? words[half][0] : words[half][1];
        words[half][0] = words[half][1] = __shfl_sync(kAllLanes, words[half][0], 0, 4);
      }
    }
    const float sign = supers ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float scale = half_of<f16_t>(words[half][i], 0) * float(fields[half] >> 12 * i & 63),
                    minimum = half_of<f16_t>(words[half][i], 1) * float(fields[half] >> (12 * i + 6) & 63);
        of[i][half] = {scale, fmaf(minimum, sign, -kNibbleStart * scale)};
      }
  }
};

// The nibbles of sixteen rows by eight groups, in a warp's shared memory, and their scales and minima if these are needed there.
// The 16 bytes of a row's group are a row of an 8x8 matrix of 16-bit elements: as `matrix_words` reads them, lane 4 g + t gets
// word t of row g. What it reads of scales and minima of rows g and g + 8 lies together. Groups are apart by what is odd times 16
// bytes, so that no eight lanes, of two rows by four parts, meet in a bank as they write to every other group; those that read
// have one of eight rows.
template <bool kScales>
struct NibbleCodes {
  struct alignas(16) Group {
    uint32_t words[kTileRows][4];
    Vec<float> affine[kScales ? kTileRows / 2 + 1 : 1];  // scale, minimum of row g, those of row g + 8; the last is not used
  };
  static constexpr int kGroup = sizeof(Group) / 16;
  static_assert(kGroup % 2 == 1);

  Group groups[kNibbleStep];

  // By all lanes of a warp: what each has of rows lane_row() and lane_row() + 8.
  template <class T>
  __device__ __forceinline__ void put(const NibbleGroups (&from)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Vec<uint32_t> nibbles;
#pragma unroll
        for (int w = 0; w < 4; ++w) nibbles.words[w] = turned<T>(from[half].nibbles[i].words[w]);
        store(groups[2 * lane_part() + i].words[lane_row() + half * 8], nibbles);
      }
  }

  __device__ __forceinline__ void put_affine(const NibbleAffine& from) {
    static_assert(kScales);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      groups[2 * lane_part() + i].affine[lane_row()] =
          Vec<float>::rounded({from.of[i][0].scale, from.of[i][0].minimum, from.of[i][1].scale, from.of[i][1].minimum});
  }

  // Of a group and the next one, a word each of rows g and g + 8: weights 4 t .. 4 t + 3, and those 16 further on.
  __device__ __forceinline__ Vec<uint32_t> two_groups(int group) const { return matrix_words<kGroup>(groups[group].words[0]); }
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

// The nibbles of sixteen rows by four groups of columns, as 16-bit pairs of rows want them.
//
// A lane of those that multiply, 4 g + t, has of rows 4 t .. 4 t + 3 words g and g + 8: of group g / 4 columns 4 (g % 4) ..
// 4 (g % 4) + 3 and those 16 further on, and the same of the group after the next. Rows are places apart so that lanes share no
// bank.
struct alignas(16) NibbleQuads {
  static constexpr int kRow = 4 * 4, kFour = 4 * kRow + 8;  // words of a row, and from one four to the next

  uint32_t words[4 * kFour];

  // Group `group` of the stretch, of row `row` + 8 `eight`, row < 8.
  __device__ __forceinline__ void put(int row, int eight, int group, const Vec<uint32_t>& nibbles) {
    store(words + row / 4 * kFour + row % 4 * kRow + 4 * group + eight * 2 * kFour, nibbles);
  }

  // Word `word` of row 4 `part` + i.
  __device__ __forceinline__ uint32_t word(int part, int i, int word) const { return words[part * kFour + word + i * kRow]; }
};

// A tile of what such words w[i], of rows 4 t + i, have in byte `byte`: its row g is the lower nibble, and row g + 8 the upper
// one, as numbers `16 + code` of T.
template <class T>
__device__ __forceinline__ void nibble_tile(const uint32_t (&w)[4], int byte, uint32_t (&a)[4]) {
  const unsigned bytes = byte < 2 ? 0x5410 : 0x7632;  // of two rows, side by side: this one and its neighbour
  const uint32_t two[2] = {__byte_perm(w[0], w[1], bytes), __byte_perm(w[2], w[3], bytes)};
#pragma unroll
  for (int k = 0; k < 4; ++k) a[k] = nibble_numbers<T>(two[k / 2], byte % 2 * 8 + k % 2 * 4);
}

// 32 rows of nibbles, and the scales of four groups of columns.
struct alignas(16) AcrossCodes {
  NibbleQuads quads[2];
  Affine affine[2][4][8][2];  // of column 32 (2 i + g / 4) + 16 k + 4 (g % 4) + b at [i][b][g][k]

  // As of quads, of whose second sixteen rows two eights are.
  __device__ __forceinline__ void put(int row, int eight, int group, const Vec<uint32_t>& nibbles) {
    quads[eight / 2].put(row, eight % 2, group, nibbles);
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
