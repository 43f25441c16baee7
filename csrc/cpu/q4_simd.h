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
class GroupSum : ColumnSums<GroupSum<T, kSupers>, true> {
  using Base = ColumnSums<GroupSum, true>;
  friend Base;
  using Base::m_;
  using Base::quads_;

 public:
  // rows: count + kAhead. Of what is read next the last row may stand there more than once.
  GroupSum(const RowPointers& all, int first, int count, const RowForm& form) : Base((count + 3) / 4), next_count_(1) {
    const void* const* rows = all.rows + first;
    for (int r = 0; r < kRows; ++r) {
      rows_[r] = static_cast<const uint8_t*>(rows[std::min(r, count - 1)]);
      next_[r] = static_cast<const uint8_t*>(rows[count + r]);
    }
    while (next_count_ < kRows && next_[next_count_] != next_[next_count_ - 1]) ++next_count_;
    staggered_ = stagger(next_, next_count_, 1);
    next_part_ = (next_count_ + quads_ - 1) / quads_;
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
    if (first && begin == 0 && staggered_) fetch_before(next_, next_count_);
    for (int group = begin / kGroup; group < last; group += kSpan) {
      if (first) fetch_scales(group);
      const int n = std::min(kSpan, last - group);
      Base::read(rows_, 0, nullptr, group * kGroupBytes, n, 0, first);
      read_scales(group, n);
      Base::add_groups(group, n, 0, end, acc, lda);
    }
  }

 private:
  static constexpr int kVectors = 2 * kHalf;  // of a group's columns

  void fetch(int quad, int nibbles) const {
    const int end = std::min((quad + 1) * next_part_, next_count_);
    for (int r = quad * next_part_; r < end; ++r) fetch_packed(next_[r] + nibbles);
  }

  // The same for all columns.
  int four(int j, int quad, int) const {
    int value;
    std::memcpy(&value, x_[j].values + 4 * quad, 4);
    return value;
  }
  Ints fours(int j, int quad, int lane) const { return set(four(j, quad, lane)); }
  static int start(int, int) { return 0; }
  static constexpr bool may_use_tiles = true;
  const int8_t* inputs() const { return x_[0].values; }
  static constexpr int input_stride = sizeof(Coefficients);

  struct Join {
    const Vec scale, total;
    const Vec *scales, *minima;

    Join(const GroupSum& block, int j, int at, int)
        : scale(Vec::set(block.x_[j].scale)),
          total(Vec::set(block.x_[j].total)),
          scales(block.scales_[at]),
          minima(block.minima_[at]) {}
    Vec operator()(Vec sum, int v, Vec before) const { return fma(minima[v], total, fma(sum * scale, scales[v], before)); }
  };

  // Of the group that most often comes next.
  void fetch_scales(int group) const {
    constexpr int bytes = kGroup * (kSupers ? 2 : 4);
    for (int at = 0; at < kSpan * bytes; at += 64) fetch_packed(next_shared_ + group * bytes + at);
  }

  // Scales and minima of the columns of n groups.
  void read_scales(int group, int n) {
    for (int i = 0; i < n; ++i)
      for (int v = 0; v < kVectors; ++v) {
        const int64_t column = (group + i) * kGroup + v * kLanes;
        if constexpr (kSupers) {
          Vec d, e;
          halves(load_ints(super_ + 4 * column), &d, &e);
          const Ints pairs = load_pairs(shared_ + 2 * column);
          scales_[i][v] = d * floats(both(pairs, set(255)));
          minima_[i][v] = Vec::set(0.0f) - e * floats(shifted(pairs, 8));
        } else {
          halves(load_ints(shared_ + 4 * column), &scales_[i][v], &minima_[i][v]);
        }
      }
  }

  const uint8_t *rows_[kRows], *next_[kRows];  // the latter where they are fetched
  bool staggered_;
  const uint8_t *shared_, *next_shared_, *super_;
  int next_count_, next_part_;  // rows that come next, and how many of them for each quad of these
  Coefficients x_[kColumns];
  Vec scales_[kSpan][kVectors], minima_[kSpan][kVectors];
};

template <class T, bool kSupers>
void sum(const RowPointers& all, int n, const void* coefficients, ptrdiff_t ldc, int m, const RowForm& form, int begin, int end,
         float* acc, ptrdiff_t lda) {
  for (int r = 0; r < n; r += kRows) {
    const int count = std::min(kRows, n - r);
    GroupSum<T, kSupers> block(all, r, count, form);
    for (int j = 0; j < m; j += kColumns) {
      const int inputs = std::min(kColumns, m - j);
      const GroupTiles tiles(inputs);
      block.coefficients(static_cast<const T*>(coefficients) + j * ldc + r, ldc, inputs, count);
      block.add(begin, end, j == 0, acc + j * lda, lda);
    }
  }
}

}  // namespace q4

}  // namespace
}  // namespace sirius::cpu
