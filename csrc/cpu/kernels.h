// What an instruction set provides: the inner loops. There are two kinds of tables: one per (instruction set, element type) for
// what has to do with activations alone, and one per (instruction set, format of a matrix, element type) for what reads weights.
// The ops above them divide the work, choose rows and mention neither an instruction nor a format.
//
// Weights are handed over as an array of row pointers, so that dense, gathered and concatenated matrices are the same thing. Past
// the rows to be computed the array goes on with `kAhead` pointers that are only prefetched: the rows which the caller reads
// next. Of q8 another array has the rows' lower nibbles.
//
// Batch invariance: every result depends on its own weight row and its own input row alone, summed in an order that depends on
// the length of the sum alone.
#pragma once

#include "../params.h"

namespace sirius::cpu {

constexpr int kAhead = 32;  // as many rows as a kernel reads side by side at most

struct RowPointers {
  const void *const *rows, *const *lowers;  // see Place
};

// The rows of a matrix of one format, with input of element type T. What a format cannot do is null: rows that share scales are
// only added up and unpacked, other rows of four bits are not added up, neither is written, and plain rows are not unpacked.
struct MatrixKernels {
  // Rearranges x, T [m, k] with rows ldx apart, for `dot`. The packed form takes packed_size bytes and is 64-byte aligned.
  size_t (*packed_size)(int m, int k);
  void (*pack)(const void* x, ptrdiff_t ldx, int m, int k, void* packed);

  // out[j * ldo + i] = rows[i] . x[j], float; rows: [form.cols] each, n + kAhead pointers.
  void (*dot)(const RowPointers& rows, int n, const void* packed, int m, const RowForm& form, float* out, ptrdiff_t ldo);

  // acc[j * lda + c] += sum_i coef[j * ldc + i] * rows[i][c] for begin <= c < end; coef: T; rows: [form.cols], n + kAhead
  // pointers. The order of the sum restarts at each call: callers must cut a long list at fixed places (multiples of 32). `begin`
  // is one, too. All rows of a call are of one group where `together` rows have their scales together (1: none do).
  void (*sum)(const RowPointers& rows, int n, const void* coef, ptrdiff_t ldc, int m, const RowForm& form, int begin, int end,
              float* acc, ptrdiff_t lda);

  // out[c] = row[c] for all of a row.
  void (*read)(const Place& row, const RowForm& form, float* out);

  // row[c] = x[c], rounded; x: T [form.cols].
  void (*write)(const void* x, const RowForm& form, const Place& row);

  // out[i * ldo + c - begin] = rows[i][c], rounded, for begin <= c < end, where begin is a multiple of 32; out: T; rows: n
  // pointers, all of one group where `together` rows have their scales together.
  void (*unpack)(const RowPointers& rows, int n, const RowForm& form, int begin, int end, void* out, ptrdiff_t ldo);

  int together = 1;
};

struct Kernels {
  // out[i] = softcap(scale * (acc[i] + bias[i])) + residual[i], rounded once, to T or (store_f32) not at all; bias and residual,
  // T, may be null. softcap is LinearParams'.
  void (*store)(const float* acc, const void* bias, float scale, float softcap, const void* residual, int n, void* out);
  void (*store_f32)(const float* acc, const void* bias, float scale, float softcap, const void* residual, int n, void* out);

  // out[i] = act(gate[i]) * up[i]; without `up`, act(gate[i])
  void (*activate)(Activation act, const float* gate, const float* up, int n, void* out);

  // sum_i x[i]^2
  float (*square_sum)(const void* x, int n);

  // out[i] = keep * out[i] + add * x[i]^2
  void (*blend_squares)(const void* x, int n, float keep, float add, float* out);

  // out = x normalised + residual, rounded once; residual may be null. x, residual and out may be the same.
  void (*rms_norm)(const void* x, const Norm& norm, const void* residual, int n, void* out);

  // One head of a query or key: out = x, normalised if the norm has a weight, its first rotary_dim elements rotated.
  // x, out: T [head_dim], may be the same; cos, sin: [rotary_dim / 2].
  void (*rope)(const void* x, const Norm& norm, const float* cos, const float* sin, int head_dim, int rotary_dim, void* out);

  // Scores of a query, capped as LinearParams caps, become weights: with s[i] = softcap(scores[i] * scale), max = max_i s[i];
  // p[i] = exp(s[i] - max), rounded to T; sum = sum of p before rounding. `scores` may change.
  void (*softmax)(float* scores, int n, float scale, float softcap, void* p, float* max, float* sum);

  // One pass over a row of logits: the first largest value, its index, and sum_i exp((logits[i] - max) * inverse_temperature).
  // Where one of them is NaN or plus infinity, or all are minus infinity, the index is -1 and the sum NaN. In `raw` logits, which
  // nothing has processed, minus infinity is no more allowed than the others. `sum` may be null.
  void (*logit_stats)(const float* logits, int n, float inverse_temperature, bool raw, float* max, int32_t* argmax, float* sum);
};

// A plain format goes with the element type of its name alone.
const Kernels& kernels_scalar(Dtype dtype);
const Kernels& kernels_avx2(Dtype dtype);
const Kernels& kernels_avx512(Dtype dtype);

const MatrixKernels& matrix_kernels_scalar(Format format, Dtype dtype);
const MatrixKernels& matrix_kernels_avx2(Format format, Dtype dtype);
const MatrixKernels& matrix_kernels_avxvnni(Format format, Dtype dtype);
const MatrixKernels& matrix_kernels_avx512(Format format, Dtype dtype);
const MatrixKernels& matrix_kernels_amx(Format format, Dtype dtype);
const MatrixKernels& matrix_kernels_amx_soft(Format format, Dtype dtype);

}  // namespace sirius::cpu
