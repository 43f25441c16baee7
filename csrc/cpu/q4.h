// The products of matrices in four bits (csrc/q4.h): what all instruction sets have in common, and the bodies for a CPU that has
// none of them, which are the explanation of q4_simd.h as well. Input is rounded as in q8.h, where `dot` is.
//
// Bodies for vectors get codes sixteen times too large, because that is how upper nibbles come (q8.h); so do those here. A
// minimum counts once for each of a group's 32 weights: it is multiplied with the sum of the input.
//
// `sum` adds up rows of one group. A scale is then common to all rows of a column, so that the integers are the coefficients
// alone, rounded for these rows together, and scale and minimum come after the sum.
#pragma once

#include "../q4.h"
#include "q8.h"

namespace sirius::cpu {
namespace {

namespace q4 {

using namespace sirius::q4;
using q8::kRows;
using q8::Packed;

static_assert(kRows == kGroup, "a call of `sum` has rows of one group");

constexpr float kUnit = 1.0f / 16.0f;  // a weight is scale * (kUnit * code) + minimum where codes are sixteen times too large

inline f16_t half_at(const uint8_t* p) {
  f16_t value;
  std::memcpy(&value, p, 2);
  return value;
}

// Scale and minimum of a group.
struct Pair {
  float scale, minimum;

  Pair(const uint8_t* p) : scale(to_float(half_at(p))), minimum(to_float(half_at(p + 2))) {}
  Pair(const uint8_t* super, uint32_t s, uint32_t m)
      : scale(to_float(half_at(super)) * float(s)), minimum(-(to_float(half_at(super + 2)) * float(m))) {}
};

inline Pair pair_of_q4(const uint8_t* row, int group) { return row + 4 * group; }

inline Pair pair_of_q4_k(const uint8_t* row, int group) {
  const uint8_t* header = row + group / kSuper * 16;
  uint32_t dwords[4];
  std::memcpy(dwords, header, 16);
  const uint32_t tops = dwords[1] >> 24 | dwords[2] >> 24 << 8 | dwords[3] >> 24 << 16;
  const int place = group % kSuper;
  const uint32_t fields = (place < 6 ? dwords[1 + place / 2] : tops) >> place % 2 * 12;
  return {header, fields & 63, fields >> 6 & 63};
}

// One row of a matrix whose groups lie along the rows.
template <bool kSupers>
struct Row {
  const uint8_t *row, *nibbles;

  Row(const Place& place, const RowForm& form)
      : row(static_cast<const uint8_t*>(place.row)), nibbles(row + header_bytes(form.cols, kSupers)) {}
  Pair pair(int group) const { return kSupers ? pair_of_q4_k(row, group) : pair_of_q4(row, group); }
  float scale(int group) const { return pair(group).scale; }
  float minimum(int group) const { return pair(group).minimum; }
  // Sixteen times the code.
  int code(int c) const {
    return (nibbles[c / kGroup * kGroupBytes + c % kGroupBytes] >> c % kGroup / kGroupBytes * 4 & 15) << 4;
  }
};

// What `dot` knows of the format (see q8::Planes).
template <bool kSupers>
struct Groups {
  using Row = q4::Row<kSupers>;
  static constexpr bool has_lower = false;
  static constexpr bool has_minimum = true;
  static constexpr float unit = kUnit;

  static int32_t start(int total, float scale) { return int32_t(bits_of(float(total) * scale)); }

  static int header_bytes(int cols) { return q4::header_bytes(cols, kSupers); }
  static int header_at(int group) { return 16 / header_groups(kSupers) * group; }
};

// The first `columns` weights of a group. scale * code is exact: fused or not, the sum is the same.
template <class Values, class Out>
void read_group(const uint8_t* nibbles, int columns, const Values& scales, const Values& minima, Out* out) {
  alignas(64) uint8_t codes[kGroup];
  q8::codes_of<false, true>(nullptr, nibbles, codes);
  q8::read_group(codes, columns, [&](Vec code, int c) { return fma(scales(c), code, minima(c)); }, out);
}

template <bool kSupers, class Out>
void read_row(const Place& place, const RowForm& form, int begin, int end, Out* out) {
  const Row<kSupers> row(place, form);
  for (int c = begin; c < end; c += kGroup) {
    const Pair pair = row.pair(c / kGroup);
    const auto same = [](float value) { return [v = Vec::set(value)](int) { return v; }; };
    read_group(row.nibbles + c / kGroup * kGroupBytes, end - c, same(pair.scale), same(pair.minimum), out + c - begin);
  }
}

template <bool kSupers>
void read(const Place& place, const RowForm& form, float* out) {
  read_row<kSupers>(place, form, 0, form.cols, out);
}

template <class T, bool kSupers>
void unpack(const RowPointers& all, int n, const RowForm& form, int begin, int end, void* out, ptrdiff_t ldo) {
  for (int i = 0; i < n; ++i) read_row<kSupers>({all.rows[i], nullptr}, form, begin, end, static_cast<T*>(out) + i * ldo);
}

// Coefficients of a group of rows for one row of input, as integers, which are to be multiplied with `scale`. Those of rows that
// fill the group up are zero.
struct Coefficients {
  alignas(64) int8_t values[kRows];
  float scale, total;  // total: scale times the sum of the integers

  template <class T>
  void round(const T* coefficients, int count) {
    alignas(64) float numbers[kRows] = {};
    float top, faults;
    q8::load_group(coefficients, count, numbers, &top, &faults);
    Vec sum = Vec::set(0.0f);
    for (int r = 0; r < kRows; r += Vec::width) {
      const Vec rounded = q8::integers(Vec::load(numbers + r) * Vec::set(q8::inverse_of(top)));
      q8::store_bytes(rounded, values + r);
      sum = sum + rounded;
    }
    scale = q8::scale_of(top, faults);
    total = scale * reduce_add(sum);
  }
};

template <bool kSupers>
Pair shared_pair(const RowForm& form, int c) {
  const auto* shared = static_cast<const uint8_t*>(form.shared);
  const int64_t at = shared_at(form.group, form.cols, kSupers);
  if constexpr (!kSupers) return shared + at + 4 * c;
  return {shared + super_at(form.group, form.cols) + 4 * c, shared[at + 2 * c], shared[at + 2 * c + 1]};
}

// Of rows that have their scales together: these are read once for all rows.
template <class T, bool kSupers>
void unpack_across(const RowPointers& all, int n, const RowForm& form, int begin, int end, void* out, ptrdiff_t ldo) {
  for (int c = begin; c < end; c += kGroup) {
    alignas(64) float scales[kGroup] = {}, minima[kGroup] = {};
    for (int at = 0; at < std::min(kGroup, end - c); ++at) {
      const Pair pair = shared_pair<kSupers>(form, c + at);
      scales[at] = pair.scale;
      minima[at] = pair.minimum;
    }
    const auto each = [](const float* values) { return [values](int at) { return Vec::load(values + at); }; };
    for (int i = 0; i < n; ++i)
      read_group(static_cast<const uint8_t*>(all.rows[i]) + c / kGroup * kGroupBytes, end - c, each(scales), each(minima),
                 static_cast<T*>(out) + i * ldo + c - begin);
  }
}

template <class T, bool kSupers>
void sum_plain(const RowPointers& all, int n, const void* coefficients, ptrdiff_t ldc, int m, const RowForm& form, int begin,
               int end, float* acc, ptrdiff_t lda) {
  for (int first = 0; first < n; first += kRows) {
    const int count = std::min(kRows, n - first);
    for (int j = 0; j < m; ++j) {
      Coefficients x;
      x.round(static_cast<const T*>(coefficients) + j * ldc + first, count);
      for (int c = begin; c < end; ++c) {
        const Pair pair = shared_pair<kSupers>(form, c);
        const int at = c / kGroup * kGroupBytes + c % kGroupBytes, shift = c % kGroup / kGroupBytes * 4;
        int sum = 0;
        for (int r = 0; r < count; ++r) sum += x.values[r] * (static_cast<const uint8_t*>(all.rows[first + r])[at] >> shift & 15);
        float& out = acc[j * lda + c];
        out = std::fma(float(16 * sum) * (kUnit * x.scale), pair.scale, out);
        out = std::fma(pair.minimum, x.total, out);
      }
    }
  }
}

}  // namespace q4

}  // namespace
}  // namespace sirius::cpu
