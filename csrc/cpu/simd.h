// A vector of floats as wide as the translation unit's instruction set, with loads and stores for the three element types.
// Included by the kernels_<isa>.cpp files only; everything lives in an anonymous namespace because each of them compiles its own.
#pragma once

#include <cmath>

#include "../types.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sirius::cpu {
namespace {

#if defined(__AVX512F__)

struct Vec {
  static constexpr int width = 16;
  __m512 v;

  static Vec set(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const f16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
  static Vec load(const bf16_t* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
  static Vec widen(__m256i x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
  static Vec load(const uint8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)))}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(f16_t* p) const { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
  void store(bf16_t* p) const { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }
};

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }  // a * 2^n
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }

#elif defined(__AVX2__)

struct Vec {
  static constexpr int width = 8;
  __m256 v;

  static Vec set(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const f16_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
  static Vec load(const bf16_t* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16))};
  }
  static Vec load(const uint8_t* p) { return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)))}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(f16_t* p) const { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
  void store(bf16_t* p) const {
    alignas(32) float x[width];
    store(x);
    for (int i = 0; i < width; ++i) p[i] = from_float<bf16_t>(x[i]);
  }
};

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
inline Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec scale_by_power(Vec a, Vec n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), exponent))};
}
inline float reduce_add(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float reduce_max(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

#else

struct Vec {
  static constexpr int width = 1;
  float v;

  static Vec set(float x) { return {x}; }
  template <class T>
  static Vec load(const T* p) {
    return {to_float(*p)};
  }
  static Vec load(const uint8_t* p) { return {float(*p)}; }
  template <class T>
  void store(T* p) const {
    *p = from_float<T>(v);
  }
};

inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) { return a.v < b.v ? yes : no; }
inline Vec round(Vec a) { return {std::nearbyint(a.v)}; }
inline Vec scale_by_power(Vec a, Vec n) { return {std::ldexp(a.v, int(n.v))}; }
inline float reduce_add(Vec a) { return a.v; }
inline float reduce_max(Vec a) { return a.v; }

#endif

// Weights are fetched into L2, from where they come in time: a core can have more lines on their way to L2 than to L1. On a Zen
// 4, products of packed weights with one row of input are 1.4 to 2.1 times as fast for it. Where there is AMX those in 16 bits go
// to L1, which is an eighth faster there.
#if defined(__AMX_TILE__)
constexpr bool kFetchIntoL2 = false;
#else
constexpr bool kFetchIntoL2 = true;
#endif

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, kFetchIntoL2 ? 2 : 3); }

#if defined(__AVX2__)
// The same, which the compiler may neither move nor drop: in a loop that is unrolled it gathers those of __builtin_prefetch, or
// drops them, and a call of a function that does nothing else is dropped as a whole (GCC 12).
template <bool kIntoL2 = kFetchIntoL2>
inline void prefetch_now(const void* p) {
  if constexpr (kIntoL2)
    __asm__ volatile("prefetcht1 %0" ::"m"(*static_cast<const char*>(p)));
  else
    __asm__ volatile("prefetcht0 %0" ::"m"(*static_cast<const char*>(p)));
}
#endif

// The first n < width elements; the others read as `fill` and are not written.
template <class T>
inline Vec load_part(const T* p, int n, float fill = 0.0f) {
  alignas(64) float x[Vec::width];
  for (int i = 0; i < Vec::width; ++i) x[i] = i < n ? to_float(p[i]) : fill;
  return Vec::load(x);
}

template <class T>
inline void store_part(Vec v, T* p, int n) {
  alignas(64) float x[Vec::width];
  v.store(x);
  for (int i = 0; i < n; ++i) p[i] = from_float<T>(x[i]);
}

template <class T>
inline Vec load_upto(const T* p, int n, float fill = 0.0f) {
  return n >= Vec::width ? Vec::load(p) : load_part(p, n, fill);
}

template <class T>
inline void store_upto(Vec v, T* p, int n) {
  if (n >= Vec::width)
    v.store(p);
  else
    store_part(v, p, n);
}

// e^x, relative error below 2 ulp for -87 <= x <= 88; beyond, the value at that end, which softmax and silu cannot tell from the
// truth. NaN stays NaN. Cody and Waite's reduction x = n ln 2 + r, then the degree-6 polynomial of Cephes' expf, |r| <= ln 2 / 2.
inline Vec exp(Vec x) {
  // `max` and `min` give their second operand when one is NaN.
  const Vec clamped = min(Vec::set(88.0f), max(Vec::set(-87.0f), x));
  const Vec n = round(clamped * Vec::set(1.44269504088896341f));
  Vec r = fma(n, Vec::set(-0.693359375f), clamped);
  r = fma(n, Vec::set(2.12194440e-4f), r);
  Vec p = Vec::set(1.9875691500e-4f);
  p = fma(p, r, Vec::set(1.3981999507e-3f));
  p = fma(p, r, Vec::set(8.3334519073e-3f));
  p = fma(p, r, Vec::set(4.1665795894e-2f));
  p = fma(p, r, Vec::set(1.6666665459e-1f));
  p = fma(p, r, Vec::set(5.0000001201e-1f));
  p = fma(p, r * r, r + Vec::set(1.0f));
  return scale_by_power(p, n);
}

// Relative error below 4 ulp. NaN stays NaN. Near zero, where 1 - 2 / (e^2x + 1) would cancel, the polynomial of Cephes' tanhf.
inline Vec tanh(Vec x) {
  const Vec zero = Vec::set(0.0f), one = Vec::set(1.0f), two = Vec::set(2.0f);
  const Vec size = max(x, zero - x);
  const Vec square = x * x;
  Vec p = Vec::set(-5.70498872745e-3f);
  p = fma(p, square, Vec::set(2.06390887954e-2f));
  p = fma(p, square, Vec::set(-5.37397155531e-2f));
  p = fma(p, square, Vec::set(1.33314422036e-1f));
  p = fma(p, square, Vec::set(-3.33332819422e-1f));
  const Vec small = fma(p * square, x, x);
  const Vec large = one - two / (exp(size + size) + one);
  return where_less(size, Vec::set(0.625f), small, where_less(x, zero, zero - large, large));
}

inline Vec silu(Vec x) { return x / (Vec::set(1.0f) + exp(Vec::set(0.0f) - x)); }

// x / 2 * (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), as x / (1 + e^-2u), in which nothing cancels.
inline Vec gelu_tanh(Vec x) {
  const Vec minus_2u = x * fma(x * x, Vec::set(-0.0713548162726f), Vec::set(-1.59576912161f));
  return x / (Vec::set(1.0f) + exp(minus_2u));
}

// cap * tanh(x / cap)
inline Vec softcapped(Vec x, float cap) { return Vec::set(cap) * tanh(x / Vec::set(cap)); }

}  // namespace
}  // namespace sirius::cpu
