// RMSNorm of a row, for the kernel of its own and for those that normalise their input.
#pragma once

#include "common.cuh"

namespace sirius::cuda {

// 1 / sqrt(mean(row^2) + eps), computed by one warp: always in the same order, so with the same bits wherever it is needed.
template <bool Aligned, class T>
__device__ float inverse_rms(const T* row, int n, float eps) {
  float squares = 0.0f;
#pragma unroll 4
  for (int c = int(threadIdx.x) % kWarp * Vec<T>::size; c < n; c += kWarp * Vec<T>::size) {
    const Vec<T> part = load_part<Aligned>(row, c, n);
#pragma unroll
    for (int i = 0; i < Vec<T>::size; ++i) squares += part[i] * part[i];
  }
  return 1.0f / sqrtf(warp_sum(squares) / float(n) + eps);
}

}  // namespace sirius::cuda
