// What an instruction set provides: the inner loops, one table per (instruction set, element type). The ops above them divide the
// work, choose rows and never mention an instruction.
//
// Weights are handed over as an array of row pointers, so that dense, gathered and concatenated matrices are the same thing. Past
// the rows to be computed the array goes on with `kAhead` pointers that are only prefetched: the rows which the caller reads
// next.
//
// Batch invariance: every result depends on its own weight row and its own input row alone, summed in an order that depends on
// the length of the sum alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../types.h"

namespace sirius::cpu {

constexpr int kAhead = 32;  // as many rows as a kernel reads side by side at most

struct Kernels {
  // Rearranges x, T [m, k] with rows ldx apart, for `dot`. The packed form takes packed_size bytes and is 64-byte aligned.
  size_t (*packed_size)(int m, int k);
  void (*pack)(const void* x, ptrdiff_t ldx, int m, int k, void* packed);

  // out[j * ldo + i] = rows[i] . x[j], float; rows: T [k] each, n + kAhead pointers.
  void (*dot)(const void* const* rows, int n, const void* packed, int m, int k, float* out, ptrdiff_t ldo);

  // acc[j * lda + c] += sum_i coef[j * ldc + i] * rows[i][c] for begin <= c < end; coef: T; rows: n + kAhead pointers.
  // The order of the sum restarts at each call: callers must cut a long list at fixed places (multiples of 32).
  void (*sum)(const void* const* rows, int n, const void* coef, ptrdiff_t ldc, int m, int begin, int end, float* acc,
              ptrdiff_t lda);

  // out[i] = acc[i] + bias[i] + residual[i], rounded to T once; bias and residual may be null.
  void (*store)(const float* acc, const void* bias, const void* residual, int n, void* out);

  // out[i] = silu(gate[i]) * up[i]
  void (*silu_mul)(const float* gate, const float* up, int n, void* out);

  // sum_i x[i]^2
  float (*square_sum)(const void* x, int n);

  // out[i] = keep * out[i] + add * x[i]^2
  void (*blend_squares)(const void* x, int n, float keep, float add, float* out);

  // One row. With a residual: residual += x, and the rounded sum is normalised.
  void (*rms_norm)(const void* x, void* residual, const void* weight, float eps, int n, void* out);

  // out = x rotated; x, out: T [head_dim], may be the same; cos, sin: [head_dim / 2].
  void (*rope)(const void* x, const float* cos, const float* sin, int head_dim, void* out);

  // max = max_i scores[i] * scale; p[i] = exp(scores[i] * scale - max), rounded to T; sum = sum of p before rounding.
  void (*softmax)(const float* scores, int n, float scale, void* p, float* max, float* sum);

  // One pass over a row of logits: the first largest value, its index, and sum_i exp((logits[i] - max) * inverse_temperature).
  // Where one of them is NaN or plus infinity, or all are minus infinity, the index is -1 and the sum NaN. In `raw` logits, which
  // nothing has processed, minus infinity is no more allowed than the others. `sum` may be null.
  void (*logit_stats)(const float* logits, int n, float inverse_temperature, bool raw, float* max, int32_t* argmax, float* sum);
};

const Kernels& kernels_scalar(Dtype dtype);
const Kernels& kernels_avx2(Dtype dtype);
const Kernels& kernels_avx512(Dtype dtype);
const Kernels& kernels_amx(Dtype dtype);

}  // namespace sirius::cpu
