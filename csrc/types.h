// Element types. Storage is fp32, fp16 or bf16; every sum is fp32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

// Also for a GPU, when its compiler reads this.
#if defined(__CUDACC__)
#define SIRIUS_ANYWHERE __host__ __device__
#else
#define SIRIUS_ANYWHERE
#endif

namespace sirius {

// Of activations, caches and norms.
enum class Dtype : int { f32 = 0, f16 = 1, bf16 = 2 };

// Of weight matrices. Those with the names of a Dtype are plain arrays of it; the others are in q8.h and q4.h.
enum class Format : int { f32 = 0, f16 = 1, bf16 = 2, q8 = 3, q8_upper = 4, q4 = 5, q4_k = 6, q4_across = 7, q4_k_across = 8 };

struct bf16_t {
  uint16_t bits;
};

struct f16_t {
  uint16_t bits;
};

SIRIUS_ANYWHERE inline Format plain(Dtype dtype) { return Format(int(dtype)); }

SIRIUS_ANYWHERE inline bool is_plain(Format format) { return int(format) <= int(Format::bf16); }

SIRIUS_ANYWHERE inline size_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

SIRIUS_ANYWHERE inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

SIRIUS_ANYWHERE inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

SIRIUS_ANYWHERE inline float to_float(float value) { return value; }

SIRIUS_ANYWHERE inline float to_float(bf16_t value) { return float_of(uint32_t(value.bits) << 16); }

SIRIUS_ANYWHERE inline float to_float(f16_t value) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value.bits));
  return out;
#else
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // inf, NaN
  // 2^112 moves the 5-bit exponent's bias to fp32's; the multiplication also normalises subnormals.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
#endif
}

// Round to nearest, ties to even.
template <class T>
SIRIUS_ANYWHERE T from_float(float value);

template <>
SIRIUS_ANYWHERE inline float from_float<float>(float value) {
  return value;
}

template <>
SIRIUS_ANYWHERE inline bf16_t from_float<bf16_t>(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(value));
  return {out};
#else
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t(bits >> 16 | 0x40u)};  // NaN stays NaN
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}

template <>
SIRIUS_ANYWHERE inline f16_t from_float<f16_t>(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(value));
  return {out};
#else
  const uint32_t bits = bits_of(value);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {                                    // subnormal: let the adder round at 2^-24
    return {uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)))};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13))};
#endif
}

}  // namespace sirius
