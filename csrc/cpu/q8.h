// The products of matrices in eight bits, in two planes (csrc/q8.h): what all instruction sets have in common, and the bodies
// for a CPU that has none of them, which are the explanation of q8_simd.h as well. `dot` and what it needs are written for any
// format with groups along its rows; q4.h adds those of four bits.
//
// Products are of integers. The input is rounded to 8 bits in groups of 32 with a scale each, as the weights were, and a
// group's sum of integers is exact: only its conversion to float and the sum over the groups round. So the bits of a result
// depend on nothing but its own rows, and the bodies for 16, 8 and 1 lanes differ in fused multiplication at most.
//
// `sum` adds up rows with coefficients, and a row's scale differs from group to group. There the integers are the coefficients
// times the scales, rounded for 32 rows and a group of columns together: relative to the largest coefficient of the 32 rows
// times the largest scale that they have in the group.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "../q8.h"
#include "kernels.h"
#include "simd.h"

namespace sirius::cpu {
namespace {

namespace q8 {

using namespace sirius::q8;

constexpr int kRows = 32;     // of `sum`, rounded together
constexpr int kColumns = 16;  // input rows of `dot` that are packed together
constexpr float kTop = 127.0f;

// The starting value of a group's sum of integers, which takes off the codes' zero. total: of the input's integers, |total| <=
// 32 * 127. For q8_upper it is rounded, by half of a code times one of the input's integers at most.
template <bool kUpper>
int start_of(int total) {
  return kUpper ? -(241 * total) >> 1 : -kZero * total;
}

// Up to kColumns rows of input, and more of zeros up to a number that `dot` has a body for.
struct Packed {
  using Counts = std::integer_sequence<int, 1, 2, 3, 4, 5, 6, 7, 8, 12, kColumns>;

  int columns;
  float* scales;    // [groups][columns], times what the format's codes are too large by
  int32_t* starts;  // [groups][columns]; of formats with minima, the bits of float sums of the rounded input
  int8_t* values;   // [groups][columns][32]

  static constexpr size_t bytes_of_group = sizeof(float) + sizeof(int32_t) + kGroup;

  static constexpr int columns_of(int m) {
    return [m]<int... N>(std::integer_sequence<int, N...>) {
      int least = kColumns;
      ((least = N >= m ? std::min(least, N) : least), ...);
      return least;
    }(Counts());
  }

  // Of the input rows from j on, which is a multiple of kColumns. The whole packed form is such blocks, one after another.
  Packed(const void* packed, int j, int m, int k) : columns(columns_of(m - j)) {
    const size_t g = groups(k);
    char* p = static_cast<char*>(const_cast<void*>(packed)) + j * g * bytes_of_group;
    scales = reinterpret_cast<float*>(p);
    starts = reinterpret_cast<int32_t*>(p + g * columns * sizeof(float));
    values = reinterpret_cast<int8_t*>(p + g * columns * 2 * sizeof(float));
  }
};

inline size_t packed_size(int m, int k) {
  return size_t((m - 1) / kColumns * kColumns + Packed::columns_of((m - 1) % kColumns + 1)) * groups(k) * Packed::bytes_of_group;
}

// A scale that is NaN where one of the values is not finite, so that the fault is not rounded away.
inline float scale_of(float largest, float faults) { return largest / kTop + faults; }

inline float inverse_of(float largest) { return largest > 0.0f ? kTop / largest : 0.0f; }

// Rounded; a number also where v is none.
inline Vec integers(Vec v) { return round(min(max(v, Vec::set(-kTop)), Vec::set(kTop))); }

inline void store_bytes(Vec integers, int8_t* out) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(integers.v)));
#else
  alignas(64) float values[Vec::width];
  integers.store(values);
  for (int i = 0; i < Vec::width; ++i) out[i] = int8_t(values[i]);
#endif
}

// The first n of a group's values, the largest size among them, and 0, or NaN if one is not finite.
template <class T>
void load_group(const T* x, int n, float* values, float* largest, float* faults) {
  Vec top = Vec::set(0.0f), odd = top;
  for (int c = 0; c < std::min(n, kGroup); c += Vec::width) {
    const Vec v = load_upto(x + c, n - c);
    v.store(values + c);
    top = max(max(v, Vec::set(0.0f) - v), top);
    odd = fma(v, Vec::set(0.0f), odd);
  }
  *largest = reduce_max(top);
  *faults = reduce_add(odd);
}

template <class T, class Form>
void pack(const void* x, ptrdiff_t ldx, int m, int k, void* packed) {
  for (int first = 0; first < m; first += kColumns) {
    const Packed to(packed, first, m, k);
    for (int j = 0; j < to.columns; ++j)
      for (int g = 0; g < groups(k); ++g) {
        alignas(64) float values[kGroup] = {};
        float top = 0.0f, faults = 0.0f;
        if (first + j < m)
          load_group(static_cast<const T*>(x) + (first + j) * ldx + g * kGroup, k - g * kGroup, values, &top, &faults);
        const Vec inverse = Vec::set(inverse_of(top));
        Vec total = Vec::set(0.0f);
        for (int c = 0; c < kGroup; c += Vec::width) {
          const Vec rounded = integers(Vec::load(values + c) * inverse);
          store_bytes(rounded, to.values + (g * to.columns + j) * kGroup + c);
          total = total + rounded;
        }
        const float scale = scale_of(top, faults);
        to.scales[g * to.columns + j] = scale * Form::unit;
        to.starts[g * to.columns + j] = Form::start(int(reduce_add(total)), scale);
      }
  }
}

// One row of a matrix.
template <bool kUpper>
struct Row {
  const uint8_t *scales, *upper, *lower;

  Row(const Place& place, const RowForm& form)
      : scales(static_cast<const uint8_t*>(place.row)),
        upper(scales + scale_bytes(form.cols)),
        lower(static_cast<const uint8_t*>(place.lower)) {}
  float scale(int group) const {
    f16_t value;
    std::memcpy(&value, scales + 2 * group, 2);
    return to_float(value);
  }
  // Without its lower nibble, for q8_upper.
  int code(int c) const {
    const int at = c / kGroup * kGroupBytes + c % kGroupBytes, shift = c % kGroup / kGroupBytes * 4;
    return (upper[at] >> shift & 15) << 4 | (kUpper ? 0 : lower[at] >> shift & 15);
  }
};

// A format whose groups lie along its rows: what the bodies of `dot` know of it.
template <bool kUpper>
struct Planes {
  using Row = q8::Row<kUpper>;
  static constexpr bool has_lower = !kUpper;
  static constexpr bool has_minimum = false;  // or a code that stands for zero
  static constexpr float unit = 1.0f;         // a weight is scale * (unit * code), and so on

  static int32_t start(int total, float) { return start_of<kUpper>(total); }

  // Where a row's nibbles begin, and where the scales of its groups from the given one on, a multiple of 8.
  static int header_bytes(int cols) { return scale_bytes(cols); }
  static int header_at(int group) { return 2 * group; }
};

// The codes of a group, in order: 16 * upper + lower, of which one is zero where there are no such nibbles.
template <bool kHasUpper, bool kHasLower>
inline void codes_of(const uint8_t* upper, const uint8_t* lower, uint8_t* codes) {
#if defined(__AVX2__)  // GCC 12 makes no vectors of the loop
  const __m128i u = kHasUpper ? _mm_loadu_si128((const __m128i*)upper) : _mm_setzero_si128();
  const __m128i l = kHasLower ? _mm_loadu_si128((const __m128i*)lower) : _mm_setzero_si128(), low = _mm_set1_epi8(15);
  _mm_store_si128((__m128i*)codes, _mm_or_si128(_mm_slli_epi16(_mm_and_si128(u, low), 4), _mm_and_si128(l, low)));
  _mm_store_si128((__m128i*)(codes + kGroupBytes),
                  _mm_or_si128(_mm_andnot_si128(low, u), _mm_and_si128(_mm_srli_epi16(l, 4), low)));
#else
  for (int c = 0; c < kGroup; ++c) {
    const int b = c % kGroupBytes, shift = c / kGroupBytes * 4;
    codes[c] = uint8_t((kHasUpper ? upper[b] >> shift & 15 : 0) << 4 | (kHasLower ? lower[b] >> shift & 15 : 0));
  }
#endif
}

// The first `columns` weights of a group by its codes: weight(v, c) of those from c on.
template <class Weight, class Out>
inline void read_group(const uint8_t* codes, int columns, const Weight& weight, Out* out) {
  if (columns < kGroup) {
    for (int c = 0; c < columns; c += Vec::width) store_upto(weight(Vec::load(codes + c), c), out + c, columns - c);
    return;
  }
#pragma GCC unroll 4
  for (int c = 0; c < kGroup; c += Vec::width) weight(Vec::load(codes + c), c).store(out + c);
}

template <bool kUpper, class Out>
void read_row(const Place& place, const RowForm& form, int begin, int end, Out* out) {
  const Row<kUpper> row(place, form);
  const Vec zero = Vec::set(kUpper ? kUpperZero : float(kZero));
  for (int c = begin; c < end; c += kGroup) {
    const int at = c / kGroup * kGroupBytes;
    alignas(64) uint8_t codes[kGroup];
    codes_of<true, !kUpper>(row.upper + at, row.lower + at, codes);
    const Vec scale = Vec::set(row.scale(c / kGroup));
    read_group(codes, end - c, [&](Vec code, int) { return scale * (code - zero); }, out + c - begin);
  }
}

template <bool kUpper>
void read(const Place& place, const RowForm& form, float* out) {
  read_row<kUpper>(place, form, 0, form.cols, out);
}

template <class T, bool kUpper>
void unpack(const RowPointers& all, int n, const RowForm& form, int begin, int end, void* out, ptrdiff_t ldo) {
  for (int i = 0; i < n; ++i) read_row<kUpper>({all.rows[i], all.lowers[i]}, form, begin, end, static_cast<T*>(out) + i * ldo);
}

template <class T, bool kUpper>
void write(const void* x, const RowForm& form, const Place& place) {
  const int n = form.cols;
  uint8_t* const scales = static_cast<uint8_t*>(const_cast<void*>(place.row));
  uint8_t *upper = scales + scale_bytes(n), *lower = static_cast<uint8_t*>(const_cast<void*>(place.lower));
  std::memset(scales, 0, scale_bytes(n));
  for (int g = 0; g < groups(n); ++g) {
    alignas(64) float values[kGroup] = {};
    float largest, faults;
    load_group(static_cast<const T*>(x) + g * kGroup, n - g * kGroup, values, &largest, &faults);
    const f16_t rounded = from_float<f16_t>(scale_of(largest, faults));
    std::memcpy(scales + 2 * g, &rounded, 2);
    const float scale = to_float(rounded);
    int8_t codes[kGroup];
    for (int c = 0; c < kGroup; c += Vec::width)
      store_bytes(integers(Vec::load(values + c) * Vec::set(scale > 0.0f ? 1.0f / scale : 0.0f)), codes + c);
    for (int c = 0; c < kGroupBytes; ++c) {
      const uint8_t first = uint8_t(codes[c] + kZero), second = uint8_t(codes[kGroupBytes + c] + kZero);
      const int at = g * kGroupBytes + c;
      upper[at] = uint8_t(first >> 4 | (second & 0xf0));
      if (!kUpper) lower[at] = uint8_t((first & 15) | second << 4);
    }
  }
}

template <class Form>
void dot_plain(const RowPointers& all, int n, const void* packed, int m, const RowForm& form, float* out, ptrdiff_t ldo) {
  const int k = form.cols;
  for (int i = 0; i < n; ++i) {
    const typename Form::Row row({all.rows[i], all.lowers[i]}, form);
    for (int j = 0; j < m; ++j) {
      const Packed x(packed, j / kColumns * kColumns, m, k);
      float sum = 0.0f;
      for (int g = 0; g < groups(k); ++g) {
        const int at = g * x.columns + j % kColumns;
        int total = Form::has_minimum ? 0 : x.starts[at];
        for (int c = 0; c < kGroup; ++c) total += row.code(g * kGroup + c) * x.values[at * kGroup + c];
        sum = std::fma(float(total) * x.scales[at], row.scale(g), sum);
        if constexpr (Form::has_minimum) sum = std::fma(row.minimum(g), float_of(x.starts[at]), sum);
      }
      out[j * ldo + i] = sum;
    }
  }
}

template <class T, bool kUpper>
void sum_plain(const RowPointers& all, int n, const void* coefficients, ptrdiff_t ldc, int m, const RowForm& form, int begin,
               int end, float* acc, ptrdiff_t lda) {
  const auto row_at = [&](int r) { return Row<kUpper>({all.rows[r], all.lowers[r]}, form); };
  for (int first = 0; first < n; first += kRows) {
    const int count = std::min(kRows, n - first);
    for (int j = 0; j < m; ++j) {
      const T* coef = static_cast<const T*>(coefficients) + j * ldc + first;
      float top = 0.0f, faults = 0.0f;
      for (int r = 0; r < count; ++r) {
        top = std::max(top, std::fabs(to_float(coef[r])));
        faults += to_float(coef[r]) * 0.0f;
      }
      for (int c = begin; c < end; ++c) {
        const int g = c / kGroup;
        float largest = 0.0f;
        for (int r = 0; r < count; ++r) largest = std::max(largest, row_at(first + r).scale(g));
        const float inverse = largest > 0.0f ? 1.0f / largest : 0.0f;
        int total = 0, sum = 0;
        for (int r = 0; r < count; ++r) {
          const Row<kUpper> row = row_at(first + r);
          const int value = int(integers(Vec::set(row.scale(g) * inverse * (to_float(coef[r]) * inverse_of(top)))).v);
          total += value;
          sum += value * row.code(c);
        }
        float& out = acc[j * lda + c];
        out = std::fma(float(sum + start_of<kUpper>(total)), scale_of(top, faults) * largest, out);
      }
    }
  }
}

}  // namespace q8

}  // namespace
}  // namespace sirius::cpu
