// Rows of weights in eight bits (csrc/q8.h), on the way to tensor cores.
//
// A lane reads 16 bytes of a plane: one group of one row. Tensor cores add up what four lanes hold, and that must be of one
// group, since each has a scale of its own. So a warp's codes go through shared memory: sixteen rows by four groups at a time,
// written group by group and read so that four lanes share each group.
#pragma once

#include "../q8.h"
#include "mma.cuh"

namespace sirius::cuda {

constexpr int kStepGroups = 4;  // groups of a row that a warp reads at a time, one a lane

// Bytes from a row of q8 to its lower nibbles.
__device__ __forceinline__ int64_t lower_distance(const Matrix& matrix, int row) {
  return static_cast<const char*>(matrix.lower_row(row)) - static_cast<const char*>(matrix.row(row));
}

// One weight of q8, for bodies that are not for speed.
inline SIRIUS_OUT_OF_LINE __device__ float q8_weight(const void* row, int64_t lower, int column, int cols) {
  const int group = column / q8::kGroup, place = column % q8::kGroup, shift = place / q8::kGroupBytes * 4;
  const uint8_t* const bytes = static_cast<const uint8_t*>(row) + group * q8::kGroupBytes + place % q8::kGroupBytes;
  const int code = (bytes[q8::scale_bytes(cols)] >> shift & 15) * 16 + (bytes[lower] >> shift & 15);
  return to_float(static_cast<const f16_t*>(row)[group]) * float(code - q8::kZero);
}

// One group of one row, as it lies in memory.
template <bool kUpper>
struct Q8Group {
  Vec<uint32_t> upper, lower;  // of q8_upper the lower plane is not read
  f16_t scale;

  // What is not there is not read: its scale is 0.
  __device__ __forceinline__ void load(const void* row, int64_t lower_at, int group, int cols, bool there) {
    const char* const at = static_cast<const char*>(row);
    upper = load_streaming(reinterpret_cast<const uint32_t*>(at + q8::scale_bytes(cols) + group * q8::kGroupBytes), there);
    if constexpr (!kUpper)
      lower = load_streaming(reinterpret_cast<const uint32_t*>(at + lower_at + group * q8::kGroupBytes), there);
    scale = {};
    if (there) scale = reinterpret_cast<const f16_t*>(at)[group];
  }
};

// a * b + c for two numbers in a register each.
template <class T>
__device__ __forceinline__ uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out = 0;
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, bf16_t>)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
#else
  for (int i = 0; i < 2; ++i)
    out |= uint32_t(from_float<T>(half_of<T>(a, i) * half_of<T>(b, i) + half_of<T>(c, i)).bits) << 16 * i;
#endif
  return out;
}

// Two codes of q8_upper as the numbers that they stand for, without their scale, in bf16: `16 * code - 120.5`. number: the code
// and something, which `less` takes off, and eight.
__device__ __forceinline__ uint32_t upper_numbers(uint32_t number, uint32_t less) {
  return fma_pair<bf16_t>(fma_pair<bf16_t>(number, 0x3f803f80u, less), 0x41804180u, 0x40f040f0u);  // (code - 8) * 16 + 7.5
}

// Two codes as the numbers that they stand for, without their scale: `code - 128`, or of q8_upper `16 * code - 120.5`, exact in
// T. codes: in bytes 0 and 2; what the others hold does not matter.
template <class T, bool kUpper>
__device__ __forceinline__ uint32_t q8_numbers(uint32_t codes) {
  // A code in the lower bits of a mantissa is added to the number of which these bits count ones.
  if constexpr (std::is_same_v<T, bf16_t>) {
    constexpr uint32_t one = 0x3f803f80u;
    if constexpr (kUpper) {
      return upper_numbers(masked_or(codes, 0x000f000fu, 0x43004300u), 0xc308c308u);  // 128 + code - 136
    } else {
      // Seven bits fit beside 128. Of the eighth it depends whether 128 or 256 is taken off.
      return fma_pair<T>(masked_or(codes, 0x007f007fu, 0x43004300u), one,
                         of_three<(kFirst & kSecond) ^ kThird>(codes, 0x00800080u, 0xc380c380u));
    }
  } else {
    static_assert(!kUpper, "of q8_upper no one asks for numbers of fp16");
    // In one operation the mask would take a register, which is one too many.
    return fma_pair<T>((codes & 0x00ff00ffu) | 0x64006400u, 0x3c003c00u, 0xe480e480u);  // 1024 + code - 1152
  }
}

// The codes of sixteen rows by four groups, a byte each, in a warp's shared memory.
//
// Sixteen codes lie together, places apart so that no two of the lanes that read or write at a time share a bank: not those of
// rows 2 i and 2 i + 1 that write a half of each group, nor those of four rows that read a group, 8 bytes each, nor those that
// read 4 bytes each of a group of rows i, i + 4, i + 8 and i + 12. From group to group and from half to half it is equally far,
// so that a lane needs few addresses.
struct alignas(16) Q8Codes {
  static constexpr int kHalf = 20, kGroup = 42;

  uint32_t words[(kStepGroups - 1) * kGroup + 2 * kHalf][4];
  float scales[kStepGroups][kTileRows + 8];  // rows apart: 32 lanes write to 32 banks

  // Of the first or second sixteen codes of a group.
  __device__ static __forceinline__ int place(int row, int group, int half) {
    return row + row / 4 + group * kGroup + half * kHalf;
  }

  template <bool kUpper>
  __device__ __forceinline__ void put(int row, int group, const Q8Group<kUpper>& from) {
    constexpr uint32_t low = 0x0f0f0f0fu, high = 0xf0f0f0f0u;
    constexpr uint32_t chosen = (kFirst & kThird) | (kSecond & ~kThird);  // the third word says of which
    Vec<uint32_t> halves[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t upper = from.upper.words[i], lower = from.lower.words[i];
      halves[0].words[i] = kUpper ? upper & low : of_three<chosen>(upper << 4, lower, high);
      halves[1].words[i] = kUpper ? upper >> 4 & low : of_three<chosen>(upper, lower >> 4, high);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) store(words[place(row, group, half)], halves[half]);
    scales[group][row] = to_float(from.scale);
  }

  // Of q8, weights 8 part .. 8 part + 7 of a group, without their scale.
  template <class T>
  __device__ __forceinline__ Vec<T> eight(int row, int group, int part) const {
    const auto two = *reinterpret_cast<const Pair*>(words[place(row, group, part / 2)] + part % 2 * 2);
    Vec<T> out;
#pragma unroll
    for (int i = 0; i < 4; ++i) out.words[i] = q8_numbers<T, false>(__byte_perm(two.w[i / 2], 0, i % 2 ? 0x0302 : 0x0100));
    return out;
  }

  // Weights 4 part .. 4 part + 3 of a group, as codes.
  __device__ __forceinline__ uint32_t four(int row, int group, int part) const {
    return words[place(row, group, part / 4)][part % 4];
  }

 private:
  struct alignas(8) Pair {
    uint32_t w[2];
  };
};

}  // namespace sirius::cuda
