// The products of q4.h on vectors of 16 or 8 lanes; `dot` is q8_simd.h's. In `sum` a lane is a column, and its four weights are
// those of four rows.
#pragma once

#include "q4.h"
#include "q8_simd.h"

namespace sirius::cpu {
namespace {

namespace q8 {

#if defined(__AVX512F__)
inline Ints shifted(Ints x, int bits) { return _mm512_srli_epi32(x, bits); }
inline Ints both(Ints a, Ints b) { return _mm512_and_si512(a, b); }
inline Ints either(Ints a, Ints b) { return _mm512_or_si512(a, b); }
// As many pairs of bytes as there are lanes, a dword each.
inline Ints load_pairs(const uint8_t* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
inline Ints load_ints(const uint8_t* p) { return _mm512_loadu_si512(p); }
#else
inline Ints shifted(Ints x, int bits) { return _mm256_srli_epi32(x, bits); }
inline Ints both(Ints a, Ints b) { return _mm256_and_si256(a, b); }
inline Ints either(Ints a, Ints b) { return _mm256_or_si256(a, b); }
inline Ints load_pairs(const uint8_t* p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline Ints load_ints(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
#endif

template <>
struct Header<q4::Groups<false>> {
  Vec scales[8], minima[8];

  template <class At>
  void read(const At& at) {
    for (int four = 0; four < 2; ++four) {
      Ints turned[4];
      turn([&](int r) { return at(r) + 16 * four; }, turned);
      for (int i = 0; i < 4; ++i) halves(turned[i], scales + 4 * four + i, minima + 4 * four + i);
    }
  }
};

template <>
struct Header<q4::Groups<true>> {
  Vec scales[8], minima[8];

  template <class At>
  void read(const At& at) {
    Ints turned[4];
    turn(at, turned);
    Vec d, e;
    halves(turned[0], &d, &e);
    e = Vec::set(0.0f) - e;
    const Ints tops = either(either(shifted(turned[1], 24), both(shifted(turned[2], 16), set(0xff00))),
                             both(shifted(turned[3], 8), set(0xff0000)));
    const Ints fields[4] = {turned[1], turned[2], turned[3], tops};
    for (int i = 0; i < 8; ++i) {
      const int first = i % 2 * 12;
      scales[i] = d * floats(both(shifted(fields[i / 2], first), set(63)));
      minima[i] = e * floats(both(shifted(fields[i / 2], first + 6), set(63)));
    }
  }
};

}  // namespace q8

namespace q4 {

using namespace q8;

// Rows of one group, at most kRows of them, with coefficients of up to kColumns rows of input.
template <class T, bool kSupers>
class GroupSum {
 public:
  // rows: count + kAhead. Of what is read next the last row may stand there more than once.
  GroupSum(const void* const* rows, int count, const RowForm& form) : quads_((count + 3) / 4), next_count_(1) {
    for (int r = 0; r < 4 * quads_; ++r) rows_[r] = static_cast<const uint8_t*>(rows[std::min(r, count - 1)]);
    for (int r = 0; r < kRows; ++r) next_[r] = static_cast<const uint8_t*>(rows[count + r]);
    while (next_count_ < kRows && next_[next_count_] != next_[next_count_ - 1]) ++next_count_;
    const auto* shared = static_cast<const uint8_t*>(form.shared);
    shared_ = shared + shared_at(form.group, form.cols, kSupers);
    next_shared_ = shared + shared_at(form.group + 1, form.cols, kSupers);
    super_ = shared + super_at(form.group, form.cols);
  }

  void coefficients(const T* coefficients, ptrdiff_t ldc, int m, int count) {
    m_ = m;
    for (int j = 0; j < m; ++j) {
      x_[j].round(coefficients + j * ldc, count);
      x_[j].scale *= kUnit;
    }
  }

  void add(int begin, int end, bool first, float* acc, ptrdiff_t lda) {
    const int last = groups(end);
    for (int g = begin / kGroup; g < last; g += kSpan) {
      if (first) prefetch(g);
      const int n = std::min(kSpan, last - g);
      read(g, n);
      int j = 0;
      for (; j + 2 <= m_; j += 2) add_part<2>(j, g, n, end, acc, lda);
      if (j < m_) add_part<1>(j, g, n, end, acc, lda);
    }
  }

 private:
  static constexpr int kVectors = kSpan * kGroup / kLanes;  // of a part's columns

  // What the rows that come next have in this place, and the scales of the group that comes next most often.
  void prefetch(int group) const {
    for (int r = 0; r < next_count_; ++r) prefetch_now(next_[r] + group * kGroupBytes);
    constexpr int bytes = kSpan * kGroup * (kSupers ? 2 : 4);
    for (int at = 0; at < bytes; at += 64) prefetch_now(next_shared_ + group * (bytes / kSpan) + at);
  }

  // The codes of all rows in n groups of columns, four rows to a lane, and the columns' scales and minima.
  void read(int group, int n) {
    for (int quad = 0; quad < quads_; ++quad) {
      Ints nibbles[4];
      interleave(rows_ + 4 * quad, group * kGroupBytes, n, nibbles);
      for (int i = 0; i < 4; ++i) split<true>(nibbles[i], nibbles[i], &codes_[quad][i], &codes_[quad][4 + i]);
    }
    for (int v = 0; v < n * kGroup / kLanes; ++v) {
      const int64_t column = group * kGroup + v * kLanes;
      if constexpr (kSupers) {
        Vec d, e;
        halves(load_ints(super_ + 4 * column), &d, &e);
        const Ints pairs = load_pairs(shared_ + 2 * column);
        scales_[v] = d * floats(both(pairs, set(255)));
        minima_[v] = Vec::set(0.0f) - e * floats(shifted(pairs, 8));
      } else {
        halves(load_ints(shared_ + 4 * column), scales_ + v, minima_ + v);
      }
    }
  }

  // For J rows of input from j on: J share the codes once they are loaded.
  template <int J>
  void add_part(int j, int group, int n, int end, float* acc, ptrdiff_t lda) const {
    Sum<true> sums[J][8];
    for (int each = 0; each < J; ++each)
      for (int i = 0; i < 8; ++i) sums[each][i] = Sum<true>(set(0));
    for (int quad = 0; quad < quads_; ++quad)
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i)
#pragma GCC unroll 2
        for (int each = 0; each < J; ++each) sums[each][i].add_four(codes_[quad][i], x_[j + each].values + 4 * quad);
    const bool whole = n == kSpan && (group + kSpan) * kGroup <= end;
    for (int each = 0; each < J; ++each) {
      const Vec scale = Vec::set(x_[j + each].scale), total = Vec::set(x_[j + each].total);
      for (int half = 0; half < 2; ++half) {
        Ints totals[4], ordered[kSpan][16 / kLanes];
        for (int i = 0; i < 4; ++i) totals[i] = sums[each][4 * half + i].total();
        order(totals, ordered);
#pragma GCC unroll 4
        for (int g = 0; g < kSpan; ++g)
#pragma GCC unroll 2
          for (int v = 0; v < 16 / kLanes; ++v) {
            const int column = kGroup * g + 16 * half + kLanes * v, left = end - group * kGroup - column;
            if (!whole && left <= 0) continue;
            float* to = acc + (j + each) * lda + group * kGroup + column;
            const Vec before = whole ? Vec::load(to) : load_upto(to, left);
            Vec after = fma(floats(ordered[g][v]) * scale, scales_[column / kLanes], before);
            after = fma(minima_[column / kLanes], total, after);
            if (whole)
              after.store(to);
            else
              store_upto(after, to, left);
          }
      }
    }
  }

  const uint8_t *rows_[kRows], *next_[kRows];
  const uint8_t *shared_, *next_shared_, *super_;
  const int quads_;
  int next_count_, m_ = 0;
  Coefficients x_[kColumns];
  Codes codes_[kRows / 4][8];
  Vec scales_[kVectors], minima_[kVectors];
};

template <class T, bool kSupers>
void sum(const void* const* rows, int n, const void* coefficients, ptrdiff_t ldc, int m, const RowForm& form, int begin, int end,
         float* acc, ptrdiff_t lda) {
  for (int r = 0; r < n; r += kRows) {
    const int count = std::min(kRows, n - r);
    GroupSum<T, kSupers> block(rows + r, count, form);
    for (int j = 0; j < m; j += kColumns) {
      block.coefficients(static_cast<const T*>(coefficients) + j * ldc + r, ldc, std::min(kColumns, m - j), count);
      block.add(begin, end, j == 0, acc + j * lda, lda);
    }
  }
}

}  // namespace q4

}  // namespace
}  // namespace sirius::cpu
