// The products of q8.h on vectors of 16 or 8 lanes.
//
// In `dot` a lane is a row of weights: as many rows as there are lanes are read side by side, 16 bytes of each at a time, and
// turned so that a lane holds four weights of its row. The input is the same for all lanes, so that it comes from memory by
// itself, and a group of 32 costs eight products of four and one conversion for any row of input. In `sum` a lane is a column,
// and the four weights are those of four rows: such vectors are a tile of AMX.
#pragma once

#include "q8.h"
#include "tiles.h"

namespace sirius::cpu {
namespace {

namespace q8 {

constexpr int kLanes = Vec::width;
constexpr int kSpan = kLanes / 4;  // rows of 16 bytes in a vector

#if defined(__AVX512F__)

using Ints = __m512i;

inline Ints set(int x) { return _mm512_set1_epi32(x); }
inline Ints load(const int32_t* from) { return _mm512_load_si512(from); }
inline void store(Ints x, int32_t* to) { _mm512_store_si512(to, x); }
inline Vec floats(Ints x) { return {_mm512_cvtepi32_ps(x)}; }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints times(Ints a, int b) { return _mm512_mullo_epi32(a, set(b)); }
inline Ints halved(Ints a) { return _mm512_srai_epi32(a, 1); }

// 16 bytes at each of kSpan places.
template <class At>
Ints gather(const At& at) {
  Ints x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)at(0)));
  x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i*)at(1)), 1);
  x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i*)at(2)), 2);
  return _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i*)at(3)), 3);
}
inline Ints load_spans(const void* p, int n) { return _mm512_maskz_loadu_epi32((1u << 4 * n) - 1, p); }
// Of kSpan groups of 32 bytes the first 16 of each, and the others.
inline void load_halves(const int8_t* from, Ints* first, Ints* second) {
  const Ints a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + 64);
  *first = _mm512_shuffle_i32x4(a, b, 0x88);
  *second = _mm512_shuffle_i32x4(a, b, 0xdd);
}
inline Ints unpack_low32(Ints a, Ints b) { return _mm512_unpacklo_epi32(a, b); }
inline Ints unpack_high32(Ints a, Ints b) { return _mm512_unpackhi_epi32(a, b); }
inline Ints unpack_low64(Ints a, Ints b) { return _mm512_unpacklo_epi64(a, b); }
inline Ints unpack_high64(Ints a, Ints b) { return _mm512_unpackhi_epi64(a, b); }
inline Ints unpack_low8(Ints a, Ints b) { return _mm512_unpacklo_epi8(a, b); }
inline Ints unpack_high8(Ints a, Ints b) { return _mm512_unpackhi_epi8(a, b); }
inline Ints unpack_low16(Ints a, Ints b) { return _mm512_unpacklo_epi16(a, b); }
inline Ints unpack_high16(Ints a, Ints b) { return _mm512_unpackhi_epi16(a, b); }

// kSpan integers, each in all lanes of its 16 bytes.
inline Ints spans(const int32_t* from) {
  const Ints order = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return _mm512_permutexvar_epi32(order, _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)from)));
}

// The lower and the higher halves of a vector of dwords as float16.
inline void halves(Ints x, Vec* low, Vec* high) {
  low->v = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x));
  high->v = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16)));
}

// Bytes a0 b0 c0 d0, a1 b1 ... of four vectors of integers from -127 to 127.
inline Ints bytes(Vec a, Vec b, Vec c, Vec d) {
  const Ints low = _mm512_packs_epi32(_mm512_cvtps_epi32(a.v), _mm512_cvtps_epi32(b.v));
  const Ints high = _mm512_packs_epi32(_mm512_cvtps_epi32(c.v), _mm512_cvtps_epi32(d.v));
  const Ints order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  return _mm512_shuffle_epi8(_mm512_packs_epi16(low, high), order);
}

// Codes of four weights a lane, and sums of their products with integers from -128 to 127.
struct Codes {
  Ints value;
};

template <bool kUpper>
void split(Ints upper, Ints lower, Codes* first, Codes* second) {
  const Ints mask = _mm512_set1_epi8(char(0xf0));
  const Ints shifted = _mm512_slli_epi16(upper, 4);
  if constexpr (kUpper) {
    first->value = _mm512_and_si512(shifted, mask);
    second->value = _mm512_and_si512(upper, mask);
  } else {  // where the mask is set the first, elsewhere the second
    first->value = _mm512_ternarylogic_epi32(mask, shifted, lower, 0xca);
    second->value = _mm512_ternarylogic_epi32(mask, upper, _mm512_srli_epi16(lower, 4), 0xca);
  }
}

template <bool kUpper>
struct Sum {
  Ints value;

  Sum() = default;
  explicit Sum(Ints start) : value(start) {}
  void add(const Codes& codes, Ints x) { value = _mm512_dpbusd_epi32(value, codes.value, x); }
  // The same four for all lanes, from memory: GCC 12 does not make one instruction of it.
  void add_four(const Codes& codes, const int8_t* x) {
    struct Four {
      int8_t bytes[4];
    };
    Ints sum = value;  // not `value` itself: GCC 12 would keep every sum of an array of them in memory
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes.value), "m"(*reinterpret_cast<const Four*>(x)));
    value = sum;
  }
  Ints total() const { return value; }
};

// The sums of each lane's four signed bytes.
inline Ints sum_bytes(Ints sum, Ints x) { return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), x); }

// Of kSpan vectors of 16 bytes each: place q of out[g] is place g of in[q].
inline void cross(const Ints* in, Ints* out) {
  const Ints a = _mm512_shuffle_i32x4(in[0], in[1], 0x88), b = _mm512_shuffle_i32x4(in[0], in[1], 0xdd);
  const Ints c = _mm512_shuffle_i32x4(in[2], in[3], 0x88), d = _mm512_shuffle_i32x4(in[2], in[3], 0xdd);
  out[0] = _mm512_shuffle_i32x4(a, c, 0x88);
  out[1] = _mm512_shuffle_i32x4(b, d, 0x88);
  out[2] = _mm512_shuffle_i32x4(a, c, 0xdd);
  out[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

#else

using Ints = __m256i;

inline Ints set(int x) { return _mm256_set1_epi32(x); }
inline Ints load(const int32_t* from) { return _mm256_load_si256((const __m256i*)from); }
inline void store(Ints x, int32_t* to) { _mm256_store_si256((__m256i*)to, x); }
inline Vec floats(Ints x) { return {_mm256_cvtepi32_ps(x)}; }
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints times(Ints a, int b) { return _mm256_mullo_epi32(a, set(b)); }
inline Ints halved(Ints a) { return _mm256_srai_epi32(a, 1); }

template <class At>
Ints gather(const At& at) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)at(0))),
                                 _mm_loadu_si128((const __m128i*)at(1)), 1);
}
inline Ints load_spans(const void* p, int n) {
  return n == kSpan ? _mm256_loadu_si256((const __m256i*)p) : _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i*)p));
}
inline void load_halves(const int8_t* from, Ints* first, Ints* second) {
  const Ints a = _mm256_loadu_si256((const __m256i*)from), b = _mm256_loadu_si256((const __m256i*)(from + 32));
  *first = _mm256_permute2x128_si256(a, b, 0x20);
  *second = _mm256_permute2x128_si256(a, b, 0x31);
}
inline Ints unpack_low32(Ints a, Ints b) { return _mm256_unpacklo_epi32(a, b); }
inline Ints unpack_high32(Ints a, Ints b) { return _mm256_unpackhi_epi32(a, b); }
inline Ints unpack_low64(Ints a, Ints b) { return _mm256_unpacklo_epi64(a, b); }
inline Ints unpack_high64(Ints a, Ints b) { return _mm256_unpackhi_epi64(a, b); }
inline Ints unpack_low8(Ints a, Ints b) { return _mm256_unpacklo_epi8(a, b); }
inline Ints unpack_high8(Ints a, Ints b) { return _mm256_unpackhi_epi8(a, b); }
inline Ints unpack_low16(Ints a, Ints b) { return _mm256_unpacklo_epi16(a, b); }
inline Ints unpack_high16(Ints a, Ints b) { return _mm256_unpackhi_epi16(a, b); }

inline Ints spans(const int32_t* from) {
  return _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(_mm_loadl_epi64((const __m128i*)from)),
                                     _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
}

inline Vec half_of(Ints x) {  // of dwords below 2^16
  return {_mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)))};
}
inline void halves(Ints x, Vec* low, Vec* high) {
  *low = half_of(_mm256_and_si256(x, set(0xffff)));
  *high = half_of(_mm256_srli_epi32(x, 16));
}

inline Ints bytes(Vec a, Vec b, Vec c, Vec d) {
  const Ints low = _mm256_packs_epi32(_mm256_cvtps_epi32(a.v), _mm256_cvtps_epi32(b.v));
  const Ints high = _mm256_packs_epi32(_mm256_cvtps_epi32(c.v), _mm256_cvtps_epi32(d.v));
  const Ints order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  return _mm256_shuffle_epi8(_mm256_packs_epi16(low, high), order);
}

#if defined(__AVXVNNI__)

struct Codes {
  Ints value;
};

template <bool kUpper>
void split(Ints upper, Ints lower, Codes* first, Codes* second) {
  const Ints mask = _mm256_set1_epi8(15);
  first->value = _mm256_slli_epi16(_mm256_and_si256(upper, mask), 4);
  second->value = _mm256_andnot_si256(mask, upper);
  if constexpr (!kUpper) {
    first->value = _mm256_or_si256(first->value, _mm256_and_si256(lower, mask));
    second->value = _mm256_or_si256(second->value, _mm256_and_si256(_mm256_srli_epi16(lower, 4), mask));
  }
}

template <bool kUpper>
struct Sum {
  Ints value;

  Sum() = default;
  explicit Sum(Ints start) : value(start) {}
  void add(const Codes& codes, Ints x) { value = _mm256_dpbusd_avx_epi32(value, codes.value, x); }
  void add_four(const Codes& codes, const int8_t* x) {
    int four;
    std::memcpy(&four, x, 4);
    add(codes, set(four));
  }
  Ints total() const { return value; }
};

inline Ints sum_bytes(Ints sum, Ints x) { return _mm256_dpbusd_avx_epi32(sum, _mm256_set1_epi8(1), x); }

#else

// Without VNNI: products of unsigned and signed bytes are added up in 16 bits, so the nibbles stay apart. Eight products of two
// nibbles, at most 8 * 2 * 15 * 127, just fit.
struct Codes {
  Ints upper, lower;
};

template <bool kUpper>
void split(Ints upper, Ints lower, Codes* first, Codes* second) {
  const Ints mask = _mm256_set1_epi8(15);
  first->upper = _mm256_and_si256(upper, mask);
  second->upper = _mm256_and_si256(_mm256_srli_epi16(upper, 4), mask);
  if constexpr (!kUpper) {
    first->lower = _mm256_and_si256(lower, mask);
    second->lower = _mm256_and_si256(_mm256_srli_epi16(lower, 4), mask);
  }
}

template <bool kUpper>
struct Sum {
  Ints start, upper, lower;

  Sum() = default;
  explicit Sum(Ints start) : start(start), upper(_mm256_setzero_si256()), lower(upper) {}
  void add(const Codes& codes, Ints x) {
    upper = _mm256_add_epi16(upper, _mm256_maddubs_epi16(codes.upper, x));
    if constexpr (!kUpper) lower = _mm256_add_epi16(lower, _mm256_maddubs_epi16(codes.lower, x));
  }
  void add_four(const Codes& codes, const int8_t* x) {
    int four;
    std::memcpy(&four, x, 4);
    add(codes, set(four));
  }
  Ints total() const {
    Ints sum = _mm256_add_epi32(start, _mm256_madd_epi16(upper, _mm256_set1_epi16(16)));
    if constexpr (!kUpper) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(lower, _mm256_set1_epi16(1)));
    return sum;
  }
};

inline Ints sum_bytes(Ints sum, Ints x) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), x), _mm256_set1_epi16(1)));
}

#endif

inline void cross(const Ints* in, Ints* out) {
  out[0] = _mm256_permute2x128_si256(in[0], in[1], 0x20);
  out[1] = _mm256_permute2x128_si256(in[0], in[1], 0x31);
}

#endif

// Packed weights go to L2 everywhere.
inline void fetch_packed(const void* p) { prefetch_now<true>(p); }

// A line that is missing in L2 of an Intel core brings along the other line of its 128 bytes. Where rows are so long that all are
// at the same half of such a pair, they would ask for two lines each in one step and for none in the next. Then `run` rows are
// fetched where they are, the next `run` a line ahead, and so on. at: n places in rows that are read side by side. Returns
// whether some are ahead now: their first lines must be fetched as well.
inline bool stagger(const uint8_t** at, int n, int run) {
  uintptr_t differ = 0;
  for (int r = 1; r < n; ++r) differ |= uintptr_t(at[r]) ^ uintptr_t(at[0]);
  if (differ & 64) return false;
  for (int r = 0; r < n; ++r) at[r] += r / run % 2 * 64;
  return true;
}

// The lines before every other one of n places: with a run of one, those that `stagger` has gone past.
inline void fetch_before(const uint8_t* const* at, int n) {
  for (int r = 1; r < n; r += 2) fetch_packed(at[r] - 64);
}

// As `start_of` a number.
template <bool kUpper>
Ints start_of(Ints total) {
  return kUpper ? halved(times(total, -241)) : times(total, -kZero);
}

// Four vectors whose lanes are rows: lane r of turned[i] is dword i of the 16 bytes at at(r).
template <class At>
void turn(const At& at, Ints* turned) {
  Ints x[4];
  for (int i = 0; i < 4; ++i) x[i] = gather([&](int span) { return at(4 * span + i); });
  const Ints a = unpack_low32(x[0], x[1]), b = unpack_high32(x[0], x[1]);
  const Ints c = unpack_low32(x[2], x[3]), d = unpack_high32(x[2], x[3]);
  turned[0] = unpack_low64(a, c);
  turned[1] = unpack_high64(a, c);
  turned[2] = unpack_low64(b, d);
  turned[3] = unpack_high64(b, d);
}

// While a tile of rows is multiplied, the next one is fetched, place by place: memory is so slow that anything nearer comes
// late (measured: 256 bytes ahead in the same rows is a fifth slower with sixteen rows of input). Long rows are cut into blocks
// of so many groups, in which the tiles of a call take turns, so that what is under way fits the first cache.
constexpr int kBlock = 48;

// Where a tile's rows go on: `groups` of them from `group` on.
struct Block {
  const uint8_t* const* rows;  // kLanes
  const uint8_t* const* lowers;
  const uint8_t* const* fetched[2];  // where nibbles are fetched, upper and lower ones
  bool staggered;                    // those of every other four rows a line ahead
  int group, groups;

  Block from(int tile, int group, int groups) const {
    const int r = tile * kLanes;
    return {rows + r, lowers + r, {fetched[0] + r, fetched[1] + r}, staggered, group, groups};
  }
};

// Scales of eight groups in as many rows as there are lanes.
template <class Form>
struct Header;

template <bool kUpper>
struct Header<Planes<kUpper>> {
  Vec scales[8];

  // at(r): where row r has them.
  template <class At>
  void read(const At& at) {
    Ints turned[4];
    turn(at, turned);
    for (int i = 0; i < 4; ++i) halves(turned[i], scales + 2 * i, scales + 2 * i + 1);
  }
};

// What is read in a step after this block, which has such a step: to ask here made the whole loop 4 % slower. A line holds four
// groups: in each step a quarter of the rows.
template <class Form>
void fetch_step(const Block& next, int step, int upper_at) {
  if (step < 4)  // the rows' scales
    for (int r = step; r < kLanes; r += 4)
      for (int line = Form::header_at(next.group) / 64 * 64; line < std::min(Form::header_at(next.group + next.groups), upper_at);
           line += 64)
        fetch_packed(next.rows[r] + line);
  const int at = next.group * kGroupBytes + step / 4 * 64;
  for (int plane = 0; plane <= Form::has_lower; ++plane) {
    const uint8_t* const* from = next.fetched[plane];
    if (next.staggered && next.group == 0 && step < 4)
      for (int r = step + 4; r < kLanes; r += 8) fetch_packed(from[r] - 64);
    for (int r = step % 4; r < kLanes; r += 4) fetch_packed(from[r] + at);
  }
}

// The codes of a group of all rows: four weights of each in every vector.
template <class Form>
void read_codes(const Block& now, int group, int upper_at, Codes* codes) {
  Ints uppers[4], lowers[4] = {};
  turn([&](int r) { return now.rows[r] + upper_at + group * kGroupBytes; }, uppers);
  if constexpr (Form::has_lower) turn([&](int r) { return now.lowers[r] + group * kGroupBytes; }, lowers);
  for (int i = 0; i < 4; ++i) split<!Form::has_lower>(uppers[i], lowers[i], codes + i, codes + 4 + i);
}

// acc and a group's sum of integers for one row of input. at: that row's place in the group's; place: the group's in the header.
template <class Form>
Vec add_scaled(Ints total, const Packed& x, int at, const Header<Form>& header, int place, Vec acc) {
  acc = fma(floats(total) * Vec::set(x.scales[at]), header.scales[place], acc);
  if constexpr (Form::has_minimum) acc = fma(header.minima[place], Vec::set(float_of(x.starts[at])), acc);
  return acc;
}

template <class Form>
Ints start_at(const Packed& x, int at) {
  return set(Form::has_minimum ? 0 : x.starts[at]);
}

// So many rows of input take turns: the products of one wait for one another, since they are added up. (GCC 12 spills where there
// are 16 registers.)
#if defined(__AVX512F__)
constexpr int kTurns = 4;
#else
constexpr int kTurns = 1;
#endif

// A block of kLanes rows of weights by M of input, added to sums. Meanwhile the block that comes after it is fetched. Flat,
// because GCC 12 otherwise calls what is the same for every M, and moves vectors through memory.
template <class Form, int M>
__attribute__((flatten)) void dot_block(const Block& now, const Block& next, const Packed& x, const RowForm& form, Vec* sums,
                                        bool fetch) {
  const int upper_at = Form::header_bytes(form.cols);
  Vec acc[M];
#pragma GCC unroll 16  // or GCC 12 stores them all in every step
  for (int j = 0; j < M; ++j) acc[j] = sums[j];
  Header<Form> header;
  for (int step = 0; step < now.groups; ++step) {
    const int g = now.group + step;
    if (step % 8 == 0) header.read([&](int r) { return now.rows[r] + Form::header_at(g); });
    if (fetch && step < next.groups) fetch_step<Form>(next, step, upper_at);
    Codes codes[8];
    read_codes<Form>(now, g, upper_at, codes);
    const auto add_rows = [&]<int... R>(int first, std::integer_sequence<int, R...>) {
      const int at = g * M + first;
      Sum<!Form::has_lower> totals[] = {Sum<!Form::has_lower>(start_at<Form>(x, at + R))...};
      const int8_t* values = x.values + at * kGroup;
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) (totals[R].add_four(codes[i], values + R * kGroup + 4 * i), ...);
      ((acc[first + R] = add_scaled(totals[R].total(), x, at + R, header, step % 8, acc[first + R])), ...);
    };
#pragma GCC unroll 16
    for (int j = 0; j + kTurns <= M; j += kTurns) add_rows(j, std::make_integer_sequence<int, kTurns>());
    if constexpr (M % kTurns != 0) add_rows(M / kTurns * kTurns, std::make_integer_sequence<int, M % kTurns>());
  }
#pragma GCC unroll 16
  for (int j = 0; j < M; ++j) sums[j] = acc[j];
}

// The sums of the pairs of dwords, and of quadwords, that lie side by side in 16 bytes of two vectors.
inline Ints add_pairs32(Ints a, Ints b) { return add(unpack_low32(a, b), unpack_high32(a, b)); }
inline Ints add_pairs64(Ints a, Ints b) { return add(unpack_low64(a, b), unpack_high64(a, b)); }

// Sums of integers of n groups, at most kSpan, of all rows by one of input: lane r of totals[g] is row r's in the g-th of them.
// Here codes stay where they are, 16 bytes of every group of one row in a vector, and what is turned is their sums: three
// quarters of the time with one row of input, and as long or longer with two. before(i) is called before each of kSpan parts of
// the work.
template <class Form, class Before>
void total_groups(const Block& now, int group, int n, int upper_at, const int8_t* values, const Before& before, Ints* totals) {
  Ints x[2], fours[kSpan];  // of four rows each
  load_halves(values, x, x + 1);
  const int at = group * kGroupBytes;
#pragma GCC unroll 4
  for (int i = 0; i < kSpan; ++i) {
    before(i);
    Ints sums[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const Ints upper = load_spans(now.rows[4 * i + r] + upper_at + at, n);
      Codes first, second;
      if constexpr (Form::has_lower)
        split<false>(upper, load_spans(now.lowers[4 * i + r] + at, n), &first, &second);
      else
        split<true>(upper, upper, &first, &second);
      Sum<!Form::has_lower> sum(set(0));
      sum.add(first, x[0]);
      sum.add(second, x[1]);
      sums[r] = sum.total();
    }
    fours[i] = add_pairs64(add_pairs32(sums[0], sums[1]), add_pairs32(sums[2], sums[3]));
  }
  cross(fours, totals);
}

// `dot_block` by one row of input.
template <class Form>
__attribute__((flatten)) void dot_block_by_one(const Block& now, const Block& next, const Packed& x, const RowForm& form,
                                               Vec* sum, bool fetch) {
  const int upper_at = Form::header_bytes(form.cols);
  Vec acc = *sum;
  Header<Form> header;
  for (int step = 0; step < now.groups; step += kSpan) {
    const int g = now.group + step, n = std::min(kSpan, now.groups - step);
    if (step % 8 == 0) header.read([&](int r) { return now.rows[r] + Form::header_at(g); });
    const auto before = [&](int i) {
      if (fetch && step + i < next.groups) fetch_step<Form>(next, step + i, upper_at);
    };
    Ints totals[kSpan];
    if (n == kSpan) {
      total_groups<Form>(now, g, kSpan, upper_at, x.values + g * kGroup, before, totals);
    } else {
      alignas(64) int8_t values[kSpan * kGroup] = {};
      std::copy_n(x.values + g * kGroup, n * kGroup, values);
      total_groups<Form>(now, g, n, upper_at, values, before, totals);
    }
    for (int i = 0; i < n; ++i)
      acc = add_scaled<Form>(add(totals[i], start_at<Form>(x, g + i)), x, g + i, header, (step + i) % 8, acc);
  }
  *sum = acc;
}

// Up to kTiles * kLanes rows by M of input; what is read next stands after them.
constexpr int kTiles = 64 / kLanes;

template <class Form, int M>
void dot_rows(const Block& rows, int n, const Packed& x, const RowForm& form, bool fetch, float* out, ptrdiff_t ldo, int wanted) {
  const int num_groups = groups(form.cols), tiles = (n + kLanes - 1) / kLanes;
  Vec sums[kTiles][M];
  for (int t = 0; t < tiles; ++t)
    for (int j = 0; j < M; ++j) sums[t][j] = Vec::set(0.0f);
  const auto block = [&](int t, int group) { return rows.from(t, group, std::min(kBlock, num_groups - group)); };
  for (int group = 0; group < num_groups; group += kBlock)
    for (int t = 0; t < tiles; ++t) {
      const bool last = group + kBlock >= num_groups;
      const Block next = t + 1 < tiles ? block(t + 1, group) : last ? block(tiles, 0) : block(0, group + kBlock);
      if constexpr (M == 1)
        dot_block_by_one<Form>(block(t, group), next, x, form, sums[t], fetch);
      else
        dot_block<Form, M>(block(t, group), next, x, form, sums[t], fetch);
    }
  for (int t = 0; t < tiles; ++t)
    for (int j = 0; j < wanted; ++j) store_upto(sums[t][j], out + j * ldo + t * kLanes, n - t * kLanes);
}

template <class Form>
void dot(const RowPointers& all, int n, const void* packed, int m, const RowForm& form, float* out, ptrdiff_t ldo) {
  const int k = form.cols;
  for (int i = 0; i < n; i += kTiles * kLanes) {
    const int count = std::min(kTiles * kLanes, n - i), whole = (count + kLanes - 1) / kLanes * kLanes;
    constexpr int kMost = (kTiles + 1) * kLanes;
    const uint8_t *rows[kMost], *lowers[kMost], *fetched[2][kMost];
    for (int r = 0; r < whole + kLanes; ++r) {
      // Rows that fill up a tile are the last one again, and what follows is what the caller reads next.
      const int at = r < whole ? std::min(r, count - 1) : count + r - whole;
      rows[r] = static_cast<const uint8_t*>(all.rows[i + at]);
      fetched[0][r] = rows[r] + Form::header_bytes(k);
      if constexpr (Form::has_lower) fetched[1][r] = lowers[r] = static_cast<const uint8_t*>(all.lowers[i + at]);
    }
    bool staggered = stagger(fetched[0], whole + kLanes, 4);
    if constexpr (Form::has_lower) staggered = stagger(fetched[1], whole + kLanes, 4) || staggered;
    const Block block{rows, lowers, {fetched[0], fetched[1]}, staggered, 0, 0};
    for (int j = 0; j < m; j += kColumns) {
      const Packed x(packed, j, m, k);
      const int wanted = std::min(m - j, kColumns);
      float* to = out + j * ldo + i;
      const auto multiply = [&]<int... M>(std::integer_sequence<int, M...>) {
        ((x.columns == M ? dot_rows<Form, M>(block, count, x, form, j == 0, to, ldo, wanted) : void()), ...);
      };
      multiply(Packed::Counts());
    }
  }
}

constexpr int kHalf = 16 / kLanes;  // vectors of columns in half of a group
// Rows of input whose sums fit the registers: a code and a coefficient are loaded once for all of them.
#if defined(__AVX512F__)
constexpr int kTogether = 8;
constexpr int kFew = 2;  // and those whose sums do so for all of a vector's groups
#elif defined(__AVXVNNI__)
constexpr int kTogether = 2;
constexpr int kFew = 1;
#else
constexpr int kTogether = 1;
constexpr int kFew = 1;
#endif

// Rows that are added up in integers, in groups of columns: what the formats have in common. A Block has the coefficients and
// what the sums are to be multiplied with:
//
//   fetch(quad, nibbles)          prefetches what the rows that come next have in the place that is read, a part of it for each
//                                 quad: all at once would leave the core waiting with nothing to multiply (a sixth of the time)
//   four(j, quad, lane)           for input row j, coefficients of rows 4 * quad and on, a byte each
//   fours(j, quad, lane)          those of kSpan groups from `lane` on, each in all lanes of its 16 bytes
//   start(j, lane)                where the sum begins
//   may_use_tiles                 where the coefficients are the same in every group; then
//   inputs(), input_stride        has those of all rows for row 0, and how many bytes further on those for row 1 are
//   Join(block, j, at, lane)      and with it operator()(sum, v, before): what vector v of a group's columns becomes
//
// at: the group's number among those that `read` was called for; lane: as `add_groups` was told.
template <class Block, bool kUpper>
class ColumnSums {
 protected:
  explicit ColumnSums(int quads) : quads_(quads) {}

  // The codes of all rows in n groups: of each group vectors of columns in order, four rows to a lane. header: bytes of a
  // row before its nibbles; nibbles: where those of the first group are behind it, and in the lower ones. Few rows of input are
  // multiplied at once; lane: as `add_groups`.
  void read(const uint8_t* const* rows, int header, const uint8_t* const* lowers, int nibbles, int n, int lane, bool fetch) {
    if (m_ == 1) return multiply_unordered<1>(rows, header, lowers, nibbles, n, lane, fetch);
    if (m_ <= kFew) return multiply_unordered<kFew>(rows, header, lowers, nibbles, n, lane, fetch);
    for (int quad = 0; quad < quads_; ++quad) {
      if (fetch) static_cast<const Block&>(*this).fetch(quad, nibbles);
      Ints uppers[kSpan][kHalf], lower_nibbles[kSpan][kHalf] = {};
      interleave(rows + 4 * quad, header + nibbles, n, uppers);
      if constexpr (!kUpper) interleave(lowers + 4 * quad, nibbles, n, lower_nibbles);
      for (int g = 0; g < kSpan; ++g)
        for (int v = 0; v < kHalf; ++v)
          split<kUpper>(uppers[g][v], lower_nibbles[g][v], &codes_[g][quad][v], &codes_[g][quad][kHalf + v]);
    }
  }

  // All rows of input by the n groups that were read, from `group` on; the lane of the first.
  void add_groups(int group, int n, int lane, int end, float* acc, ptrdiff_t lda) {
#if defined(__AMX_INT8__)
    if constexpr (Block::may_use_tiles)
      if (by_tiles()) multiply(n);
#endif
    for (int i = 0; i < n; ++i) {
      const int column = (group + i) * kGroup, columns = end - column;
      if (columns >= kGroup)
        add_group(i, lane + i, acc + column, lda);
      else
        add_part(i, lane + i, columns, acc + column, lda);
    }
  }

  int m_ = 0;  // rows of input
  const int quads_;

 private:
  // n groups' 16 bytes of four rows: the four rows' in a lane, in vector v bytes 4 * v and on of every group.
  static void unpack(const uint8_t* const* rows, int64_t at, int n, Ints fours[4]) {
    Ints x[4];
    for (int r = 0; r < 4; ++r) x[r] = load_spans(rows[r] + at, n);
    const Ints a = unpack_low8(x[0], x[1]), b = unpack_high8(x[0], x[1]);
    const Ints c = unpack_low8(x[2], x[3]), d = unpack_high8(x[2], x[3]);
    fours[0] = unpack_low16(a, c);
    fours[1] = unpack_high16(a, c);
    fours[2] = unpack_low16(b, d);
    fours[3] = unpack_high16(b, d);
  }

  // The same in order: of each group vectors of its bytes in order, the four rows' in a lane.
  static void interleave(const uint8_t* const* rows, int64_t at, int n, Ints out[kSpan][kHalf]) {
    Ints fours[4];
    unpack(rows, at, n, fours);
    for (int v = 0; v < kHalf; ++v) {
      Ints groups[kSpan];
      cross(fours + v * kSpan, groups);
      for (int g = 0; g < kSpan; ++g) out[g][v] = groups[g];
    }
  }

  void add_group(int at, int lane, float* to, ptrdiff_t lda) const {
#if defined(__AMX_INT8__)
    if (by_tiles()) return add_totals(at, lane, to, lda);
#endif
    if (m_ <= kFew) return add_totals(at, lane, to, lda);
    int j = 0;
    for (; j + kTogether <= m_; j += kTogether) add_rows<kTogether>(j, at, lane, to + j * lda, lda);
    if constexpr (kTogether > 4)
      for (; j + 4 <= m_; j += 4) add_rows<4>(j, at, lane, to + j * lda, lda);
    for (; j < m_; ++j) add_rows<1>(j, at, lane, to + j * lda, lda);
  }

  // The same for the last group, which has fewer columns.
  void add_part(int at, int lane, int columns, float* to, ptrdiff_t lda) const {
    alignas(64) float whole[kColumns][kGroup] = {};
    for (int j = 0; j < m_; ++j) std::copy_n(to + j * lda, columns, whole[j]);
    add_group(at, lane, whole[0], kGroup);
    for (int j = 0; j < m_; ++j) std::copy_n(whole[j], columns, to + j * lda);
  }

  // J rows of input from j on.
  template <int J>
  void add_rows(int j, int at, int lane, float* to, ptrdiff_t lda) const {
    constexpr int kVectors = 2 * kHalf;
    const Block& block = static_cast<const Block&>(*this);
    Sum<kUpper> sums[J][kVectors];
#pragma GCC unroll 8
    for (int each = 0; each < J; ++each)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[each][v] = Sum<kUpper>(set(block.start(j + each, lane)));
    for (int quad = 0; quad < quads_; ++quad) {
      const Codes* codes = codes_[at][quad];
#pragma GCC unroll 8
      for (int each = 0; each < J; ++each) {
        const Ints x = set(block.four(j + each, quad, lane));
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[each][v].add(codes[v], x);
      }
    }
#pragma GCC unroll 8
    for (int each = 0; each < J; ++each) {
      const typename Block::Join join(block, j + each, at, lane);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* columns = to + each * lda + kLanes * v;
        join(floats(sums[each][v].total()), v, Vec::load(columns)).store(columns);
      }
    }
  }

#if defined(__AMX_INT8__)
  bool by_tiles() const { return Block::may_use_tiles && m_ >= kTileInputs; }

  // All rows of input by n groups, by tiles. Of quads that are not there the coefficients are zero.
  void multiply(int n) {
    const Block& block = static_cast<const Block&>(*this);
    memory_fence();
    for (int i = 0; i < n; ++i)
      for (int v = 0; v < 2 * kHalf; ++v)
        GroupTiles::multiply(block.inputs(), Block::input_stride, codes_[i][0] + v, sizeof(codes_[i][0]), totals_[i][v][0]);
    memory_fence();
  }
#endif

  // M rows of input by n groups, while these are read: the codes stay in registers, and only sums are put in order, not every
  // code.
  template <int M>
  void multiply_unordered(const uint8_t* const* rows, int header, const uint8_t* const* lowers, int nibbles, int n, int lane,
                          bool fetch) {
    const Block& block = static_cast<const Block&>(*this);
    Sum<kUpper> sums[M][2][4];
#pragma GCC unroll 16
    for (int i = 0; i < 8 * M; ++i) sums[i / 8][i / 4 % 2][i % 4] = Sum<kUpper>(set(0));
    for (int quad = 0; quad < quads_; ++quad) {
      Ints uppers[4], lower_nibbles[4] = {}, x[M];
      if (fetch) block.fetch(quad, nibbles);
      unpack(rows + 4 * quad, header + nibbles, n, uppers);
      if constexpr (!kUpper) unpack(lowers + 4 * quad, nibbles, n, lower_nibbles);
#pragma GCC unroll 2
      for (int j = 0; j < M; ++j) x[j] = block.fours(j, quad, lane);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        Codes first, second;
        split<kUpper>(uppers[v], lower_nibbles[v], &first, &second);
#pragma GCC unroll 2
        for (int j = 0; j < M; ++j) {
          sums[j][0][v].add(first, x[j]);
          sums[j][1][v].add(second, x[j]);
        }
      }
    }
#pragma GCC unroll 2
    for (int j = 0; j < M; ++j)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        Ints totals[4], groups[kSpan];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) totals[v] = sums[j][half][v].total();
        for (int v = 0; v < kHalf; ++v) {
          cross(totals + v * kSpan, groups);
          for (int g = 0; g < kSpan; ++g) store(groups[g], totals_[g][half * kHalf + v][j]);
        }
      }
  }

  void add_totals(int at, int lane, float* to, ptrdiff_t lda) const {
    const Block& block = static_cast<const Block&>(*this);
    for (int j = 0; j < m_; ++j) {
      const typename Block::Join join(block, j, at, lane);
      const Ints start = set(block.start(j, lane));
      for (int v = 0; v < 2 * kHalf; ++v) {
        float* columns = to + j * lda + kLanes * v;
        join(floats(add(start, load(totals_[at][v][j]))), v, Vec::load(columns)).store(columns);
      }
    }
  }

  alignas(64) int32_t totals_[kSpan][2 * kHalf][kColumns][kLanes];

  Codes codes_[kSpan][kRows / 4][2 * kHalf];
};

// Up to kRows rows of a matrix, with coefficients of up to kColumns rows of input.
template <class T, bool kUpper>
class SumBlock : ColumnSums<SumBlock<T, kUpper>, kUpper> {
  using Base = ColumnSums<SumBlock, kUpper>;
  friend Base;
  using Base::m_;

 public:
  // rows: count + kAhead.
  SumBlock(const RowPointers& all, int first, int count, const RowForm& form)
      : Base(kRows / 4), count_(count), upper_(scale_bytes(form.cols)) {
    for (int r = 0; r < kRows; ++r) {
      const int now = first + std::min(r, count - 1), next = first + count + r;
      rows_[r] = static_cast<const uint8_t*>(all.rows[now]);
      next_[r] = static_cast<const uint8_t*>(all.rows[next]);
      fetched_[r] = next_[r] + upper_;
      if (kUpper) continue;
      lowers_[r] = static_cast<const uint8_t*>(all.lowers[now]);
      fetched_lowers_[r] = static_cast<const uint8_t*>(all.lowers[next]);
    }
    staggered_ = stagger(fetched_, kRows, 1);
    if constexpr (!kUpper) staggered_ = stagger(fetched_lowers_, kRows, 1) || staggered_;
  }

  void coefficients(const T* coef, ptrdiff_t ldc, int m) {
    m_ = m;
    for (int j = 0; j < m; ++j) {
      Vec largest = Vec::set(0.0f), faults = largest;
      for (int r = 0; r < kRows; r += kLanes) {
        const Vec v = r < count_ ? load_upto(coef + j * ldc + r, count_ - r) : Vec::set(0.0f);
        v.store(coefficients_[j] + r);
        largest = max(max(v, Vec::set(0.0f) - v), largest);
        faults = fma(v, Vec::set(0.0f), faults);
      }
      const float top = reduce_max(largest);
      scales_[j] = scale_of(top, reduce_add(faults));
      for (int r = 0; r < kRows; r += kLanes)
        (Vec::load(coefficients_[j] + r) * Vec::set(inverse_of(top))).store(coefficients_[j] + r);
    }
  }

  void add(int begin, int end, bool first, float* acc, ptrdiff_t lda) {
    const int last = groups(end);
    if (first && begin == 0) fetch_first();
    for (int g = begin / kGroup; g < last; g += kLanes) {
      round_coefficients(g);
      for (int part = 0; part < kLanes && g + part < last; part += kSpan) {
        const int group = g + part, n = std::min(kSpan, last - group);
        Base::read(rows_, upper_, lowers_, group * kGroupBytes, n, part, first);
        Base::add_groups(group, n, part, end, acc, lda);
      }
    }
  }

 private:
  // Of all rows that come next, what `fetch` does not fetch.
  void fetch_first() const {
    for (int at = 0; at < upper_; at += 64)
      for (int r = 0; r < kRows; ++r) fetch_packed(next_[r] + at);
    if (staggered_) fetch_before(fetched_, kRows);
    if constexpr (!kUpper)
      if (staggered_) fetch_before(fetched_lowers_, kRows);
  }

  void fetch(int quad, int nibbles) const {
#pragma GCC unroll 4
    for (int r = 4 * quad; r < 4 * quad + 4; ++r) {
      fetch_packed(fetched_[r] + nibbles);
      if constexpr (!kUpper) fetch_packed(fetched_lowers_[r] + nibbles);
    }
  }

  static constexpr bool may_use_tiles = false;
  int four(int j, int quad, int lane) const { return rounded_[j][quad][lane]; }
  Ints fours(int j, int quad, int lane) const { return spans(rounded_[j][quad] + lane); }
  int start(int j, int lane) const { return starts_[j][lane]; }

  struct Join {
    const Vec scale;

    Join(const SumBlock& block, int j, int, int lane) : scale(Vec::set(block.group_scales_[j][lane])) {}
    Vec operator()(Vec sum, int, Vec before) const { return fma(sum, scale, before); }
  };

  // The coefficients of kLanes groups from g on as integers, and what they are to be multiplied with.
  void round_coefficients(int g) {
    Vec scale[kRows], largest = Vec::set(0.0f);
    for (int r = 0; r < kRows; ++r) {
      scale[r] = Vec::load(reinterpret_cast<const f16_t*>(rows_[r] + 2 * g));
      largest = max(scale[r], largest);
    }
    const Vec inverse = where_less(Vec::set(0.0f), largest, Vec::set(1.0f) / largest, Vec::set(0.0f));
    for (int r = 0; r < kRows; ++r) scale[r] = scale[r] * inverse;
    for (int j = 0; j < m_; ++j) {
      Ints total = set(0);
      for (int quad = 0; quad < kRows / 4; ++quad) {
        const float* c = coefficients_[j] + 4 * quad;
        const Vec* s = scale + 4 * quad;
        const Ints four = bytes(s[0] * Vec::set(c[0]), s[1] * Vec::set(c[1]), s[2] * Vec::set(c[2]), s[3] * Vec::set(c[3]));
        store(four, rounded_[j][quad]);
        total = sum_bytes(total, four);
      }
      store(start_of<kUpper>(total), starts_[j]);
      (largest * Vec::set(scales_[j])).store(group_scales_[j]);
    }
  }

  const uint8_t *rows_[kRows], *next_[kRows], *fetched_[kRows];
  const uint8_t *lowers_[kUpper ? 1 : kRows], *fetched_lowers_[kUpper ? 1 : kRows];
  bool staggered_;
  const int count_, upper_;
  alignas(64) float coefficients_[kColumns][kRows];
  float scales_[kColumns];
  // By groups: the coefficients as integers, four rows in one, and so on.
  alignas(64) int32_t rounded_[kColumns][kRows / 4][kLanes], starts_[kColumns][kLanes];
  alignas(64) float group_scales_[kColumns][kLanes];
};

template <class T, bool kUpper>
void sum(const RowPointers& all, int n, const void* coefficients, ptrdiff_t ldc, int m, const RowForm& form, int begin, int end,
         float* acc, ptrdiff_t lda) {
  for (int r = 0; r < n; r += kRows) {
    SumBlock<T, kUpper> block(all, r, std::min(kRows, n - r), form);
    for (int j = 0; j < m; j += kColumns) {
      const int inputs = std::min(kColumns, m - j);
      block.coefficients(static_cast<const T*>(coefficients) + j * ldc + r, ldc, inputs);
      block.add(begin, end, j == 0, acc + j * lda, lda);
    }
  }
}

}  // namespace q8

}  // namespace
}  // namespace sirius::cpu
