// The inner loops for any vector width: included once by each kernels_<isa>.cpp, compiled with that file's instruction set.
#pragma once

#include <algorithm>
#include <limits>

#include "kernels.h"
#include "simd.h"
#if defined(__AVX2__)
#include "q4_simd.h"
#else
#include "q4.h"
#endif

namespace sirius::cpu {
namespace {

// Rows are read side by side, each this far ahead of the sum; at a row's end the prefetch goes on in the row that follows it in
// its lane. Without that a third of each row of 3 KB arrives late (measured: 16 rows at 512 bytes ahead outrun one linear
// stream). Into L2 twice as far: one thread then reads a quarter more.
constexpr int kPrefetchBytes = kFetchIntoL2 ? 1024 : 512;
// Elements of a line, which is asked for once: what is on its way to L2 is not found in L1, and asking again costs as much.
template <class T>
constexpr int kLine = 64 / int(sizeof(T));
constexpr int kGroup = 8;                                 // rows in flight
constexpr int kAccumulators = Vec::width == 16 ? 16 : 8;  // half of the vector registers
constexpr int kMaxColumns = 4;                            // input rows that share one load of a weight
constexpr int rows_per_tile(int m) { return kAccumulators / m < kGroup ? kAccumulators / m : kGroup; }

// How `dot` multiplies: the input is kept in fp32, or in bf16 where the CPU has vdpbf16ps.
template <class T>
struct Product {
  using Input = float;
  using Operand = Vec;
  static constexpr int step = Vec::width;
  static Vec weight(const T* p) { return Vec::load(p); }
  static Vec weight_part(const T* p, int n) { return load_part(p, n); }
  static Vec input(const float* p) { return Vec::load(p); }
  static Vec madd(Vec a, Vec b, Vec acc) { return fma(a, b, acc); }
  static float convert(T x) { return to_float(x); }
};

#if defined(__AVX512BF16__)
template <>
struct Product<bf16_t> {
  using Input = bf16_t;
  using Operand = __m512bh;
  static constexpr int step = 32;
  static Operand weight(const bf16_t* p) { return (Operand)_mm512_loadu_si512(p); }
  static Operand weight_part(const bf16_t* p, int n) { return (Operand)_mm512_maskz_loadu_epi16((1u << n) - 1, p); }
  static Operand input(const bf16_t* p) { return weight(p); }
  static Vec madd(Operand a, Operand b, Vec acc) { return {_mm512_dpbf16_ps(acc.v, a, b)}; }
  static bf16_t convert(bf16_t x) { return x; }
};
#endif

template <class T>
int padded(int k) {
  constexpr int step = Product<T>::step;
  return (k + step - 1) / step * step;
}

template <class T>
size_t packed_size(int m, int k) {
  return size_t(m) * padded<T>(k) * sizeof(typename Product<T>::Input);
}

template <class T>
void pack(const void* x, ptrdiff_t ldx, int m, int k, void* packed) {
  using Input = typename Product<T>::Input;
  const int width = padded<T>(k);
  for (int j = 0; j < m; ++j) {
    const T* from = static_cast<const T*>(x) + j * ldx;
    Input* to = static_cast<Input*>(packed) + ptrdiff_t(j) * width;
    for (int c = 0; c < k; ++c) to[c] = Product<T>::convert(from[c]);
    for (int c = k; c < width; ++c) to[c] = Input{};
  }
}

// R weight rows by M input rows, one accumulator each.
template <class T, int R, int M, bool kPrefetch>
void dot_tile(const T* const* rows, const typename Product<T>::Input* x, int width, int k, float* out, ptrdiff_t ldo) {
  using P = Product<T>;
  // Of fewer rows further, so that as much is under way, but no further than to the same place in the next ones.
  const int ahead = std::min(kPrefetchBytes / int(sizeof(T)) * (kFetchIntoL2 ? kGroup / R : 1), k);
  Vec acc[R][M];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < M; ++j) acc[r][j] = Vec::set(0.0f);
  const auto step = [&](int c, auto load) {
    typename P::Operand in[M];
    for (int j = 0; j < M; ++j) in[j] = P::input(x + ptrdiff_t(j) * width + c);
    for (int r = 0; r < R; ++r) {
      const typename P::Operand w = load(rows[r] + c);
      for (int j = 0; j < M; ++j) acc[r][j] = P::madd(w, in[j], acc[r][j]);
    }
  };
  int c = 0;
  for (; c + P::step <= k; c += P::step) {
    if (kPrefetch && (P::step % kLine<T> == 0 || c % kLine<T> == 0)) {
      const int target = c + ahead;
      const int next = target < k ? 0 : kGroup;
      const int column = target < k ? target : target - k;
      for (int r = 0; r < R; ++r) prefetch(rows[r + next] + column);
    }
    step(c, [](const T* p) { return P::weight(p); });
  }
  if (c < k) step(c, [&](const T* p) { return P::weight_part(p, k - c); });
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < M; ++j) out[j * ldo + r] = reduce_add(acc[r][j]);
}

template <class T, int M>
void dot_group(const T* const* rows, int n, const typename Product<T>::Input* x, int width, int k, float* out, ptrdiff_t ldo,
               bool first) {
  constexpr int R = rows_per_tile(M);
  int r = 0;
  for (; r + R <= n; r += R) {
    if (first)
      dot_tile<T, R, M, true>(rows + r, x, width, k, out + r, ldo);
    else
      dot_tile<T, R, M, false>(rows + r, x, width, k, out + r, ldo);
  }
  for (; r < n; ++r) dot_tile<T, 1, M, false>(rows + r, x, width, k, out + r, ldo);
}

template <class T>
void dot(const RowPointers& all, int n, const void* packed, int m, const RowForm& form, float* out, ptrdiff_t ldo) {
  const int k = form.cols;
  using Input = typename Product<T>::Input;
  const T* const* rows = reinterpret_cast<const T* const*>(all.rows);
  const int width = padded<T>(k);
  for (int r = 0; r < n; r += kGroup) {
    const int group = n - r < kGroup ? n - r : kGroup;
    for (int j = 0; j < m; j += kMaxColumns) {
      const Input* x = static_cast<const Input*>(packed) + ptrdiff_t(j) * width;
      float* o = out + j * ldo + r;
      switch (m - j) {
        case 1: dot_group<T, 1>(rows + r, group, x, width, k, o, ldo, j == 0); break;
        case 2: dot_group<T, 2>(rows + r, group, x, width, k, o, ldo, j == 0); break;
        case 3: dot_group<T, 3>(rows + r, group, x, width, k, o, ldo, j == 0); break;
        default: dot_group<T, 4>(rows + r, group, x, width, k, o, ldo, j == 0);
      }
    }
  }
}

// How rows are added up: two vectors of columns by a coefficient. With vdpbf16ps by two, of two rows at a time.
template <class T>
struct Summand {
  using Weight = Vec;
  using Coefficient = float;
  static constexpr int rows = 1;
  static void weights(const T* const* rows, int, int c, int columns, Weight (&to)[2]) {
    for (int v = 0; v < 2; ++v) to[v] = load_upto(rows[0] + c + v * Vec::width, columns - v * Vec::width);
  }
  static Coefficient coefficient(const T* from, int) { return to_float(*from); }
  static Vec madd(Weight weight, Coefficient by, Vec acc) { return fma(weight, Vec::set(by), acc); }
};

#if defined(__AVX512BF16__)
// Where `_mm512_permutex2var_epi16` finds, of two rows' 32 columns, the first 16 or the last, in pairs.
constexpr auto pairs_from(int column) {
  struct alignas(64) {
    uint16_t index[32];
  } out{};
  for (int c = 0; c < 16; ++c) out.index[2 * c] = uint16_t(column + c), out.index[2 * c + 1] = uint16_t(32 + column + c);
  return out;
}
constexpr auto kFirstPairs = pairs_from(0), kLastPairs = pairs_from(16);

template <>
struct Summand<bf16_t> {
  using Weight = __m512bh;
  using Coefficient = uint32_t;
  static constexpr int rows = 2;
  // A row that is not there counts as zero, and so does its coefficient: zero times an infinity would not be.
  static void weights(const bf16_t* const* rows, int n, int c, int columns, Weight (&to)[2]) {
    const __mmask32 there = columns < 32 ? (1u << columns) - 1 : ~0u;
    const __m512i even = _mm512_maskz_loadu_epi16(there, rows[0] + c);
    const __m512i odd = n > 1 ? _mm512_maskz_loadu_epi16(there, rows[1] + c) : _mm512_setzero_si512();
    to[0] = (Weight)_mm512_permutex2var_epi16(even, _mm512_load_si512(kFirstPairs.index), odd);
    to[1] = (Weight)_mm512_permutex2var_epi16(even, _mm512_load_si512(kLastPairs.index), odd);
  }
  static Coefficient coefficient(const bf16_t* from, int n) { return from[0].bits | (n > 1 ? uint32_t(from[1].bits) << 16 : 0u); }
  static Vec madd(Weight weight, Coefficient by, Vec acc) {
    return {_mm512_dpbf16_ps(acc.v, weight, (__m512bh)_mm512_set1_epi32(int(by)))};
  }
};
#endif

// Rows are added up side by side: what they are added to goes through the caches so much less often. 32 of them for kMany rows of
// input and more, 16 for fewer, whose sums are small. Weights are laid side by side once, since lines of many rows may share a
// set of the L1 cache.
constexpr int kMany = 8, kTogether = 32, kStripe = 2 * Vec::width, kInputs = 8;

// `count` products into each of J rows of accumulators, of which `columns` are there. by: [count][kInputs].
template <class T, int J>
void add_stripe(const typename Summand<T>::Weight (*weights)[2], const typename Summand<T>::Coefficient* by, int count,
                int columns, float* acc, ptrdiff_t lda) {
  Vec sums[J][2];
  for (int j = 0; j < J; ++j)
    for (int v = 0; v < 2; ++v) sums[j][v] = load_upto(acc + j * lda + v * Vec::width, columns - v * Vec::width);
  for (int i = 0; i < count; ++i)
    for (int j = 0; j < J; ++j)
      for (int v = 0; v < 2; ++v) sums[j][v] = Summand<T>::madd(weights[i][v], by[i * kInputs + j], sums[j][v]);
  for (int j = 0; j < J; ++j)
    for (int v = 0; v < 2; ++v) store_upto(sums[j][v], acc + j * lda + v * Vec::width, columns - v * Vec::width);
}

// n <= kTogether rows, which begin at a multiple of Summand's.
template <class T>
void sum_stripes(const T* const* rows, int n, const T* coefficients, ptrdiff_t ldc, int m, int begin, int end, float* acc,
                 ptrdiff_t lda) {
  using S = Summand<T>;
  constexpr int most = kTogether / S::rows, blocks = 2;
  const int count = (n + S::rows - 1) / S::rows;
  const int width = end - begin, ahead = std::min(kPrefetchBytes / int(sizeof(T)), width);
  for (int m0 = 0; m0 < m; m0 += blocks * kInputs) {
    const int inputs = m - m0 < blocks * kInputs ? m - m0 : blocks * kInputs;
    typename S::Coefficient by[blocks][most * kInputs];
    alignas(64) typename S::Weight weights[most][2];
    for (int j = 0; j < inputs; ++j)
      for (int i = 0, r = 0; i < count; ++i, r += S::rows)
        by[j / kInputs][i * kInputs + j % kInputs] = S::coefficient(coefficients + (m0 + j) * ldc + r, n - r);
    for (int c = begin; c < end; c += kStripe) {
      const int columns = end - c, target = c + ahead;
      const int next = target < end ? 0 : n;
      const int column = target < end ? target : target - width;
      for (int i = 0, r = 0; i < count; ++i, r += S::rows) {
        // A stripe may be shorter than a line, or longer.
        if (kStripe % kLine<T> == 0 || (c - begin) % kLine<T> == 0)
          for (int row = r; row < r + S::rows && row < n; ++row)
            for (int line = 0; line < kStripe; line += kLine<T>) prefetch(rows[row + next] + column + line);
        S::weights(rows + r, n - r, c, columns, weights[i]);
      }
      for (int b = 0; b * kInputs < inputs; ++b) {
        float* to = acc + (m0 + b * kInputs) * lda + c;
        switch (inputs - b * kInputs) {
          case 1: add_stripe<T, 1>(weights, by[b], count, columns, to, lda); break;
          case 2: add_stripe<T, 2>(weights, by[b], count, columns, to, lda); break;
          case 3: add_stripe<T, 3>(weights, by[b], count, columns, to, lda); break;
          case 4: add_stripe<T, 4>(weights, by[b], count, columns, to, lda); break;
          case 5: add_stripe<T, 5>(weights, by[b], count, columns, to, lda); break;
          case 6: add_stripe<T, 6>(weights, by[b], count, columns, to, lda); break;
          case 7: add_stripe<T, 7>(weights, by[b], count, columns, to, lda); break;
          default: add_stripe<T, 8>(weights, by[b], count, columns, to, lda);
        }
      }
    }
  }
}

template <class T>
void sum(const RowPointers& all, int n, const void* coefficients, ptrdiff_t ldc, int m, const RowForm&, int begin, int end,
         float* acc, ptrdiff_t lda) {
  const T* const* rows = reinterpret_cast<const T* const*>(all.rows);
  const T* coef = static_cast<const T*>(coefficients);
  const int together = m < kMany ? kTogether / 2 : kTogether;
  for (int r = 0; r < n; r += together)
    sum_stripes<T>(rows + r, std::min(n - r, together), coef + r, ldc, m, begin, end, acc, lda);
}

template <class T>
void read_row(const Place& from, const RowForm& form, float* out) {
  const int n = form.cols;
  const T* row = static_cast<const T*>(from.row);
  for (int c = 0; c < n; c += Vec::width) store_upto(load_upto(row + c, n - c), out + c, n - c);
}

template <class T>
void write_row(const void* x, const RowForm& form, const Place& to) {
  std::memcpy(const_cast<void*>(to.row), x, form.cols * sizeof(T));
}

template <class T, class Out>
void store(const float* acc, const void* bias, float scale, float softcap, const void* residual, int n, void* out) {
  for (int c = 0; c < n; c += Vec::width) {
    Vec v = load_upto(acc + c, n - c);
    if (bias) v = v + load_upto(static_cast<const T*>(bias) + c, n - c);
    v = v * Vec::set(scale);
    if (softcap != 0.0f) v = softcapped(v, softcap);
    if (residual) v = v + load_upto(static_cast<const T*>(residual) + c, n - c);
    store_upto(v, static_cast<Out*>(out) + c, n - c);
  }
}

template <class T, class Act>
void activate_by(const Act& act, const float* gate, const float* up, int n, void* out) {
  for (int c = 0; c < n; c += Vec::width) {
    Vec v = act(load_upto(gate + c, n - c));
    if (up) v = v * load_upto(up + c, n - c);
    store_upto(v, static_cast<T*>(out) + c, n - c);
  }
}

template <class T>
void activate(Activation activation, const float* gate, const float* up, int n, void* out) {
  switch (activation) {
    case Activation::silu: return activate_by<T>([](Vec x) { return silu(x); }, gate, up, n, out);
    case Activation::gelu_tanh: return activate_by<T>([](Vec x) { return gelu_tanh(x); }, gate, up, n, out);
  }
}

template <class T>
float square_sum(const void* x, int n) {
  const T* in = static_cast<const T*>(x);
  Vec squares = Vec::set(0.0f);
  for (int c = 0; c < n; c += Vec::width) {
    const Vec v = load_upto(in + c, n - c);
    squares = fma(v, v, squares);
  }
  return reduce_add(squares);
}

template <class T>
void blend_squares(const void* x, int n, float keep, float add, float* out) {
  const T* in = static_cast<const T*>(x);
  for (int c = 0; c < n; c += Vec::width) {
    const Vec v = load_upto(in + c, n - c);
    store_upto(fma(v * Vec::set(add), v, load_upto(out + c, n - c) * Vec::set(keep)), out + c, n - c);
  }
}

// A row x, T [n], as numbers, and if there is a norm normalised.
template <class T>
class Normalised {
 public:
  Normalised(const void* x, const Norm& norm, int n) : x_(static_cast<const T*>(x)), weight_(static_cast<const T*>(norm.weight)) {
    if (!weight_) return;
    inverse_ = Vec::set(1.0f / std::sqrt(square_sum<T>(x, n) / float(n) + norm.eps));
    offset_ = norm.offset;
  }

  // Elements from c on, of which n are there.
  Vec load(int c, int n) const {
    const Vec x = load_upto(x_ + c, n);
    if (!weight_) return x;
    const Vec weight = load_upto(weight_ + c, n);
    return x * inverse_ * (offset_ != 0.0f ? weight + Vec::set(offset_) : weight);
  }

 private:
  const T* const x_;
  const T* const weight_;
  Vec inverse_ = Vec::set(1.0f);
  float offset_ = 0.0f;
};

template <class T>
void rms_norm(const void* x, const Norm& norm, const void* residual, int n, void* out) {
  const Normalised<T> row(x, norm, n);
  for (int c = 0; c < n; c += Vec::width) {
    Vec v = row.load(c, n - c);
    if (residual) v = v + load_upto(static_cast<const T*>(residual) + c, n - c);
    store_upto(v, static_cast<T*>(out) + c, n - c);
  }
}

template <class T>
void rope(const void* x, const Norm& norm, const float* cos, const float* sin, int head_dim, int rotary_dim, void* out) {
  const Normalised<T> row(x, norm, head_dim);
  const int half = rotary_dim / 2;
  T* to = static_cast<T*>(out);
  for (int c = 0; c < half; c += Vec::width) {
    const int n = half - c;
    const Vec a = row.load(c, n), b = row.load(half + c, n);
    const Vec cosine = load_upto(cos + c, n), sine = load_upto(sin + c, n);
    store_upto(a * cosine - b * sine, to + c, n);
    store_upto(b * cosine + a * sine, to + half + c, n);
  }
  for (int c = rotary_dim; c < head_dim; c += Vec::width) store_upto(row.load(c, head_dim - c), to + c, head_dim - c);
}

template <class T>
void softmax(float* scores, int n, float scale, float softcap, void* p, float* max_out, float* sum_out) {
  constexpr float lowest = -std::numeric_limits<float>::infinity();
  if (softcap != 0.0f) {
    for (int c = 0; c < n; c += Vec::width)
      store_upto(softcapped(load_upto(scores + c, n - c) * Vec::set(scale), softcap), scores + c, n - c);
    scale = 1.0f;
  }
  Vec top = Vec::set(lowest);
  for (int c = 0; c < n; c += Vec::width) top = max(load_upto(scores + c, n - c, lowest), top);
  const float peak = reduce_max(top) * scale;
  Vec total = Vec::set(0.0f);
  for (int c = 0; c < n; c += Vec::width) {
    const Vec e = exp(fma(load_upto(scores + c, n - c), Vec::set(scale), Vec::set(-peak)));
    store_upto(e, static_cast<T*>(p) + c, n - c);
    total = total + (n - c >= Vec::width ? e : [&] {
              alignas(64) float kept[Vec::width];
              e.store(kept);
              return load_part(kept, n - c);
            }());
  }
  *max_out = peak;
  *sum_out = reduce_add(total);
}

inline void logit_stats(const float* logits, int n, float inverse_temperature, bool raw, float* max_out, int32_t* argmax,
                        float* sum_out) {
  constexpr float lowest = -std::numeric_limits<float>::infinity();
  // Zero times a number is zero, and times what is none it is NaN. Minus infinity becomes a number first where it is allowed.
  const Vec least = Vec::set(raw ? lowest : std::numeric_limits<float>::lowest()), zero = Vec::set(0.0f);
  Vec faults = zero;
  constexpr int block = 1024;  // 4 KB: read once from memory, then twice from L1
  float peak = lowest, sum = 0.0f;
  int index = 0;
  for (int begin = 0; begin < n; begin += block) {
    const int length = n - begin < block ? n - begin : block;
    const float* x = logits + begin;
    Vec top = Vec::set(lowest);
    for (int c = 0; c + Vec::width <= length; c += Vec::width) {
      const Vec v = Vec::load(x + c);
      top = max(v, top);
      faults = fma(max(least, v), zero, faults);  // `max` gives its second operand when one is NaN
    }
    if (const int rest = length % Vec::width) {
      top = max(load_part(x + length - rest, rest, lowest), top);
      faults = fma(max(least, load_part(x + length - rest, rest)), zero, faults);
    }
    const float here = reduce_max(top);
    if (here > peak) {
      sum *= peak == lowest ? 0.0f : std::exp((peak - here) * inverse_temperature);
      peak = here;
      int c = 0;
      while (x[c] != here) ++c;
      index = begin + c;
    }
    if (!sum_out || peak == lowest) continue;  // nothing to add up, or not yet
    Vec total = Vec::set(0.0f);
    for (int c = 0; c + Vec::width <= length; c += Vec::width)
      total = total + exp((Vec::load(x + c) - Vec::set(peak)) * Vec::set(inverse_temperature));
    sum += reduce_add(total);
    for (int c = length / Vec::width * Vec::width; c < length; ++c) sum += std::exp((x[c] - peak) * inverse_temperature);
  }
  const bool found = reduce_add(faults) == 0.0f && peak > lowest;
  *max_out = peak;
  *argmax = found ? index : -1;
  if (sum_out) *sum_out = found ? sum : std::numeric_limits<float>::quiet_NaN();
}

template <class T>
constexpr Kernels table = {store<T, T>, store<T, float>, activate<T>, square_sum<T>, blend_squares<T>,
                           rms_norm<T>, rope<T>,         softmax<T>,  logit_stats};

inline const Kernels& table_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32: return table<float>;
    case Dtype::f16: return table<f16_t>;
    default: return table<bf16_t>;
  }
}

template <class T>
constexpr MatrixKernels plain_table = {packed_size<T>, pack<T>, dot<T>, sum<T>, read_row<T>, write_row<T>, nullptr};

#if defined(__AVX2__)
template <class Form>
constexpr auto packed_dot = q8::dot<Form>;
template <class T, bool kUpper>
constexpr auto q8_sum = q8::sum<T, kUpper>;
template <class T, bool kSupers>
constexpr auto q4_sum = q4::sum<T, kSupers>;
#else
template <class Form>
constexpr auto packed_dot = q8::dot_plain<Form>;
template <class T, bool kUpper>
constexpr auto q8_sum = q8::sum_plain<T, kUpper>;
template <class T, bool kSupers>
constexpr auto q4_sum = q4::sum_plain<T, kSupers>;
#endif

template <class T, bool kUpper, class Form = q8::Planes<kUpper>>
constexpr MatrixKernels q8_table = {q8::packed_size,  q8::pack<T, Form>,    packed_dot<Form>,     q8_sum<T, kUpper>,
                                    q8::read<kUpper>, q8::write<T, kUpper>, q8::unpack<T, kUpper>};

template <class T, bool kSupers, class Form = q4::Groups<kSupers>>
constexpr MatrixKernels q4_table = {q8::packed_size,   q8::pack<T, Form>, packed_dot<Form>,      nullptr,
                                    q4::read<kSupers>, nullptr,           q4::unpack<T, kSupers>};

template <class T, bool kSupers>
constexpr MatrixKernels across_table = {
    nullptr, nullptr, nullptr, q4_sum<T, kSupers>, nullptr, nullptr, q4::unpack_across<T, kSupers>, q4::kGroup};

template <class T>
const MatrixKernels& packed_table_of(Format format) {
  switch (format) {
    case Format::q8: return q8_table<T, false>;
    case Format::q8_upper: return q8_table<T, true>;
    case Format::q4: return q4_table<T, false>;
    case Format::q4_k: return q4_table<T, true>;
    case Format::q4_across: return across_table<T, false>;
    default: return across_table<T, true>;
  }
}

inline const MatrixKernels& matrix_table_of(Format format, Dtype dtype) {
  switch (format) {
    case Format::f32: return plain_table<float>;
    case Format::f16: return plain_table<f16_t>;
    case Format::bf16: return plain_table<bf16_t>;
    default: break;
  }
  switch (dtype) {
    case Dtype::f32: return packed_table_of<float>(format);
    case Dtype::f16: return packed_table_of<f16_t>(format);
    default: return packed_table_of<bf16_t>(format);
  }
}

}  // namespace
}  // namespace sirius::cpu
