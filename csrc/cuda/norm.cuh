// RMSNorm of a row, for the kernel of its own and for those that normalise their input.
#pragma once

#include "common.cuh"

namespace sirius::cuda {

constexpr int kNormWarps = 8;  // of a block that normalises

// Shared memory for the sums of the squares of some rows, of each warp.
template <int Rows>
using Squares = float[Rows][kNormWarps];

// What this thread has of a row, summed up over its warp. A row is shared out to the threads of a block by its length alone.
template <bool Aligned, class T>
__device__ __forceinline__ float warp_squares(const T* row, int n) {
  float squares = 0.0f;
#pragma unroll 2
  for (int c = int(threadIdx.x) * Vec<T>::size; c < n; c += kNormWarps * kWarp * Vec<T>::size) {
    const Vec<T> part = load_part<Aligned>(row, c, n);
#pragma unroll
    for (int i = 0; i < Vec<T>::size; ++i) squares += part[i] * part[i];
  }
  return warp_sum(squares);
}

// A block's threads ask for weights of so many bytes, which no kernel writes: before they wait for the kernel before.
__device__ __forceinline__ void prefetch_norm(const void* weights, int bytes) {
  constexpr int kLine = 128;
  if (weights)
#pragma unroll 1
    for (int at = int(threadIdx.x) * kLine; at < bytes; at += kNormWarps * kWarp * kLine)
      prefetch(static_cast<const char*>(weights) + at);
}

// The same from the sums of the warps.
__device__ __forceinline__ float inverse_rms(const float (&warps)[kNormWarps], int n, float eps) {
  float sum = warps[0];
#pragma unroll
  for (int w = 1; w < kNormWarps; ++w) sum += warps[w];
  return inverse_rms(sum, n, eps);
}

}  // namespace sirius::cuda
