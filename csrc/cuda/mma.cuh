// Sixteen rows of weights times up to sixteen rows of input, by one warp. 16-bit types multiply on tensor cores: sixteen rows of
// input then cost little more than one, and a column's bits do not depend on the columns beside it. float32 has no such
// instruction that keeps its precision and uses FMA.
//
// Lane 4 g + t (g < 8, t < 4) holds elements of weight rows g and g + 8. Which elements of the row its 16 bytes are does not
// matter, as long as weights and input agree: a sum over k may be taken in any fixed order. So both sides load 16 bytes at a
// time, and nothing is shuffled.
#pragma once

#include "common.cuh"

namespace sirius::cuda {

constexpr int kTileRows = 16;

__device__ __forceinline__ int lane_row() { return int(threadIdx.x) % kWarp / 4; }   // g
__device__ __forceinline__ int lane_part() { return int(threadIdx.x) % kWarp % 4; }  // t

// Two 16-bit elements, the first in the lower half.
struct Operands {
  uint32_t a[4];  // rows g, g + 8, g, g + 8 at k = 2 t, 2 t, 2 t + 8, 2 t + 8
  uint32_t b[2];  // column g at k = 2 t, 2 t + 8
};

// c += a b for a [16, 16] and b [16, 8]. c: (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const Operands& o) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, bf16_t>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(o.a[0]), "r"(o.a[1]), "r"(o.a[2]), "r"(o.a[3]), "r"(o.b[0]), "r"(o.b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(o.a[0]), "r"(o.a[1]), "r"(o.a[2]), "r"(o.a[3]), "r"(o.b[0]), "r"(o.b[1]));
  }
#elif !defined(__CUDACC__)
  struct Mine {
    Operands in;
    float* sums;
  } mine{o, c};
  const auto complete = [](void* const* lanes, unsigned) {
    float a[16][16], b[8][16];  // [row][k], [column][k]
    for (int lane = 0; lane < kWarp; ++lane) {
      const Operands& in = static_cast<Mine*>(lanes[lane])->in;
      for (int i = 0; i < 8; ++i) {
        const int k = lane % 4 * 2 + i % 2 + i / 4 * 8, half = i % 2;
        a[lane / 4 + i / 2 % 2 * 8][k] = half_of<T>(in.a[i / 2], half);
        if (i / 2 % 2 == 0) b[lane / 4][k] = half_of<T>(in.b[i / 4], half);
      }
    }
    for (int lane = 0; lane < kWarp; ++lane)
      for (int i = 0; i < 4; ++i) {
        float& sum = static_cast<Mine*>(lanes[lane])->sums[i];
        for (int k = 0; k < 16; ++k) sum += a[lane / 4 + i / 2 * 8][k] * b[lane % 4 * 2 + i % 2][k];
      }
  };
  simt::warp_collective(kAllLanes, &mine, complete, {"mma", __FILE__, __LINE__});
#endif
}

// Two elements each of an 8x8 matrix of 16-bit elements, those of row g in columns 2 t and 2 t + 1: of its transpose.
__device__ __forceinline__ uint32_t transposed(uint32_t word) {
#if defined(__CUDA_ARCH__)
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(word));
#elif !defined(__CUDACC__)
  const auto complete = [](void* const* lanes, unsigned) {
    uint32_t out[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) {
      out[lane] = 0;
      for (int i = 0; i < 2; ++i) {
        const int row = lane % 4 * 2 + i, column = lane / 4;
        out[lane] |= (*static_cast<uint32_t*>(lanes[row * 4 + column / 2]) >> column % 2 * 16 & 0xffff) << i * 16;
      }
    }
    for (int lane = 0; lane < kWarp; ++lane) *static_cast<uint32_t*>(lanes[lane]) = out[lane];
  };
  simt::warp_collective(kAllLanes, &word, complete, {"transposed", __FILE__, __LINE__});
#endif
  return word;
}

// Four 8x8 matrices of 16-bit elements in shared memory, whose rows are 16 bytes one after the other: two that follow each other,
// and two that are `Next` rows further on. A lane gets word t of row g of each.
template <int Next>
__device__ __forceinline__ Vec<uint32_t> matrix_words(const uint32_t* first) {
  Vec<uint32_t> out;
#if defined(__CUDA_ARCH__)
  const int lane = int(threadIdx.x) % kWarp;
  const uint32_t row = uint32_t(__cvta_generic_to_shared(first + (lane / 16 * Next + lane % 16) * 4));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.words[0]), "=r"(out.words[1]), "=r"(out.words[2]), "=r"(out.words[3])
               : "r"(row)
               : "memory");
#else
  for (int i = 0; i < 4; ++i) out.words[i] = first[(i / 2 * Next + i % 2 * 8 + lane_row()) * 4 + lane_part()];
#endif
  return out;
}

// Of two words the lower halves, or the upper ones.
__device__ __forceinline__ uint32_t lower_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ uint32_t upper_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

template <class T>
constexpr uint32_t kOnes = std::is_same_v<T, bf16_t> ? 0x3f803f80u : 0x3c003c00u;

// sums += 16 bytes each of weight rows g and g + 8 times the same elements of column g.
template <class T>
__device__ __forceinline__ void multiply_rows(float (&sums)[4], const Vec<T>& a, const Vec<T>& b, const Vec<T>& x) {
  mma<T>(sums, {{a.words[0], b.words[0], a.words[1], b.words[1]}, {x.words[0], x.words[1]}});
  mma<T>(sums, {{a.words[2], b.words[2], a.words[3], b.words[3]}, {x.words[2], x.words[3]}});
}

// The sums of a warp's tile: 16 rows of weights by Columns (1, 8 or 16) rows of input. One row is the first of eight.
template <class T, int Columns>
class Tile {
 public:
  static constexpr int kInputs = (Columns + 7) / 8;  // vectors of input that a lane needs at a time
  __device__ static __forceinline__ int column(int input) { return input * 8 + lane_row(); }

  // 16 bytes of weight rows g and g + 8, and the same elements of the input rows column(0), column(1).
  __device__ __forceinline__ void add(const Vec<T>& first, const Vec<T>& second, const Vec<T> (&x)[kInputs]) {
#pragma unroll
    for (int i = 0; i < kInputs; ++i) multiply_rows<T>(sums_[i], first, second, x[i]);
  }

  // What the input rows of a vector each add up to: their product with ones.
  class Totals {
   public:
    __device__ __forceinline__ explicit Totals(const Vec<T> (&x)[kInputs]) {
      const Vec<T> ones = all_ones();
#pragma unroll
      for (int i = 0; i < kInputs; ++i) multiply_rows<T>(sums_[i], ones, ones, x[i]);
    }

    // Of column 2 t, or 2 t + 1.
    __device__ __forceinline__ float operator[](int i) const { return sums_[0][i]; }

   private:
    friend Tile;
    float sums_[kInputs][4] = {};  // as those of a tile, whose rows are all alike
  };

  // Sums that were added up apart.
  __device__ __forceinline__ void add(const Tile& others) {
#pragma unroll
    for (int i = 0; i < kInputs; ++i)
#pragma unroll
      for (int j = 0; j < 4; j += kEvery) sums_[i][j] += others.sums_[i][j];
  }

  // A number for each row times what the input rows add up to.
  __device__ __forceinline__ void add_totals(const Totals& totals, float first, float second) {
#pragma unroll
    for (int i = 0; i < kInputs; ++i)
#pragma unroll
      for (int j = 0; j < 4; j += kEvery) sums_[i][j] = fmaf(totals.sums_[i][j % 2], j < 2 ? first : second, sums_[i][j]);
  }

  // The same of numbers whose sum is to be multiplied with a scale of its row.
  __device__ __forceinline__ void add_scaled(const Vec<T>& first, const Vec<T>& second, float first_scale, float second_scale,
                                             const Vec<T> (&x)[kInputs]) {
#pragma unroll
    for (int i = 0; i < kInputs; ++i) {
      float sums[4] = {};
      multiply_rows<T>(sums, first, second, x[i]);
#pragma unroll
      for (int j = 0; j < 4; j += kEvery) sums_[i][j] = fmaf(sums[j], j < 2 ? first_scale : second_scale, sums_[i][j]);
    }
  }

  __device__ __forceinline__ void put(float (&out)[kTileRows][Columns]) const {
#pragma unroll
    for (int i = 0; i < kInputs; ++i)
#pragma unroll
      for (int j = 0; j < 4; j += kEvery)
        if (Columns > 1 || lane_part() == 0) out[lane_row() + j / 2 * 8][i * 8 + lane_part() * 2 + j % 2] = sums_[i][j];
  }

 private:
  static constexpr int kEvery = Columns > 1 ? 1 : 2;  // sums of the second of a lane's two columns, if there is one

  __device__ static __forceinline__ Vec<T> all_ones() { return {kOnes<T>, kOnes<T>, kOnes<T>, kOnes<T>}; }

  float sums_[kInputs][4] = {};
};

template <int Columns>
class Tile<float, Columns> {
 public:
  static constexpr int kInputs = Columns;
  __device__ static __forceinline__ int column(int input) { return input; }

  __device__ __forceinline__ void add(const Vec<float>& first, const Vec<float>& second, const Vec<float> (&x)[kInputs]) {
#pragma unroll
    for (int i = 0; i < Columns; ++i)
#pragma unroll
      for (int j = 0; j < Vec<float>::size; ++j) {
        sums_[0][i] += first[j] * x[i][j];
        sums_[1][i] += second[j] * x[i][j];
      }
  }

  __device__ __forceinline__ void put(float (&out)[kTileRows][Columns]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < Columns; ++i) {
        float sum = sums_[half][i];
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        if (lane_part() == 0) out[lane_row() + half * 8][i] = sum;
      }
  }

 private:
  float sums_[2][Columns] = {};
};

// body(columns): sixteen are needed for more than eight rows of input.
template <class Body>
void with_columns(int num_rows, Body&& body) {
  if (num_rows <= 8) return body(std::integral_constant<int, 8>());
  return body(std::integral_constant<int, 16>());
}

}  // namespace sirius::cuda
