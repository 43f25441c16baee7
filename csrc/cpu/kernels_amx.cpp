// bf16 products on AMX tiles: sixteen input rows cost what one costs. Those of packed weights are in q8_simd.h, fp16 and fp32 are
// the AVX-512 bodies.
//
// A weight tile is staged through a small buffer, which lets its sixteen rows come from anywhere. One input row uses the same
// tile instructions as sixteen, in the same order: that is what makes a row's bits independent of the rows beside it.
#include <cstring>

#include "kernels_simd.h"
#include "tiles.h"

namespace sirius::cpu {
namespace {

constexpr int kTileRows = 16;
constexpr int kDepth = 32;  // bf16 elements in a tile row of 64 bytes

int round_up(int x, int to) { return (x + to - 1) / to * to; }

size_t amx_packed_size(int m, int k) { return size_t(m) * round_up(k, kDepth) * sizeof(bf16_t); }

// Block by block of up to 16 input rows: [k / 2][rows of the block] pairs of neighbouring elements.
void amx_pack(const void* x, ptrdiff_t ldx, int m, int k, void* packed) {
  const int width = round_up(k, kDepth);
  for (int j0 = 0; j0 < m; j0 += kTileRows) {
    const int block = m - j0 < kTileRows ? m - j0 : kTileRows;
    bf16_t* to = static_cast<bf16_t*>(packed) + ptrdiff_t(j0) * width;
    for (int j = 0; j < block; ++j) {
      const bf16_t* from = static_cast<const bf16_t*>(x) + (j0 + j) * ldx;
      for (int p = 0; p < width / 2; ++p) {
        bf16_t pair[2] = {};
        if (2 * p < k) pair[0] = from[2 * p];
        if (2 * p + 1 < k) pair[1] = from[2 * p + 1];
        std::memcpy(to + 2 * (ptrdiff_t(p) * block + j), pair, 4);
      }
    }
  }
}

__mmask32 first(int n) { return n >= 32 ? ~__mmask32(0) : (__mmask32(1) << n) - 1; }

// One depth of a block of 16 weight rows as tile kTile. Rows that stand at equal distances, as a dense matrix's do, are read
// where they are; others, and a row's last part, are staged.
#define SIRIUS_LOAD_WEIGHTS(tile, block, c)                                                          \
  if ((block).stride != 0 && (c) + kDepth <= k) {                                                    \
    _tile_loadd(tile, (block).rows[0] + (c), (block).stride);                                        \
  } else {                                                                                           \
    alignas(64) bf16_t stage[kTileRows * kDepth];                                                    \
    const __mmask32 mask = first(k - (c));                                                           \
    for (int r = 0; r < kTileRows; ++r)                                                              \
      _mm512_store_si512(stage + r * kDepth, _mm512_maskz_loadu_epi16(mask, (block).rows[r] + (c))); \
    memory_fence();                                                                                  \
    _tile_loadd(tile, stage, 64);                                                                    \
  }

// Sixteen weight rows and those that are read after them.
struct WeightBlock {
  const bf16_t* rows[kTileRows];
  const bf16_t* next[kTileRows];
  int height;
  ptrdiff_t stride;  // bytes from row to row, or 0 where that differs

  // Rows from i on, of n; a missing one is stood in for by the first, and its results are dropped.
  WeightBlock(const void* const* pointers, int i, int n) : height(n - i < kTileRows ? n - i : kTileRows) {
    for (int r = 0; r < kTileRows; ++r) {
      rows[r] = static_cast<const bf16_t*>(pointers[r < height ? i + r : 0]);
      next[r] = static_cast<const bf16_t*>(pointers[r < height ? i + r + 2 * kTileRows : 0]);
    }
    stride = reinterpret_cast<const char*>(rows[1]) - reinterpret_cast<const char*>(rows[0]);
    for (int r = 1; r < kTileRows; ++r)
      if (reinterpret_cast<const char*>(rows[r]) - reinterpret_cast<const char*>(rows[r - 1]) != stride) stride = 0;
  }

  void prefetch_ahead(int c, int k) const {
    constexpr int ahead = kPrefetchBytes / int(sizeof(bf16_t));
    const int target = c + ahead;
    if (target < k)
      for (int r = 0; r < kTileRows; ++r) prefetch_now(rows[r] + target);
    else
      for (int r = 0; r < kTileRows; ++r) prefetch_now(next[r] + (target - k < k ? target - k : c));
  }

  // result: [16 weight rows, columns]
  void scatter(const float* result, int columns, float* out, ptrdiff_t ldo) const {
    for (int j = 0; j < columns; ++j)
      for (int r = 0; r < height; ++r) out[j * ldo + r] = result[r * columns + j];
  }
};

// Tiles: 0, 1 results of the first 16 weight rows for two blocks of inputs, 2, 3 of the next 16; 4, 5 weights; 6 a full block of
// inputs, 7 the last block. Two blocks of weights share each reading of the inputs.
void amx_dot(const RowPointers& all, int n, const void* packed, int m, const RowForm& form, float* out, ptrdiff_t ldo) {
  const int k = form.cols, width = round_up(k, kDepth);
  for (int m0 = 0; m0 < m; m0 += 2 * kTileRows) {
    const int inputs = m - m0 < 2 * kTileRows ? m - m0 : 2 * kTileRows;
    const bool two_inputs = inputs > kTileRows;
    const int last = two_inputs ? inputs - kTileRows : inputs;
    TileConfig config;
    config.set(0, kTileRows, 64);
    config.set(1, kTileRows, 4 * last);
    config.set(2, kTileRows, 64);
    config.set(3, kTileRows, 4 * last);
    for (int t = 4; t < 7; ++t) config.set(t, kTileRows, 64);
    config.set(7, kTileRows, 4 * last);
    const Tiles tiles(config);
    const bf16_t* x = static_cast<const bf16_t*>(packed) + ptrdiff_t(m0) * width;
    const bf16_t* last_x = x + (two_inputs ? ptrdiff_t(kTileRows) * width : 0);

    for (int i = 0; i < n; i += 2 * kTileRows) {
      const bool two_weights = i + kTileRows < n;
      const WeightBlock upper(all.rows, i, n), lower(all.rows, two_weights ? i + kTileRows : i, n);
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int c = 0; c < k; c += kDepth) {
        upper.prefetch_ahead(c, k);
        SIRIUS_LOAD_WEIGHTS(4, upper, c)
        _tile_loadd(7, last_x + ptrdiff_t(c) * last, 4 * last);
        _tile_dpbf16ps(1, 4, 7);
        if (two_weights) {
          lower.prefetch_ahead(c, k);
          SIRIUS_LOAD_WEIGHTS(5, lower, c)
          _tile_dpbf16ps(3, 5, 7);
        }
        if (two_inputs) {
          _tile_loadd(6, x + ptrdiff_t(c) * kTileRows, 64);
          _tile_dpbf16ps(0, 4, 6);
          if (two_weights) _tile_dpbf16ps(2, 5, 6);
        }
      }
      alignas(64) float result[4][kTileRows * kTileRows];
      _tile_stored(1, result[1], 4 * last);
      _tile_stored(3, result[3], 4 * last);
      if (two_inputs) {
        _tile_stored(0, result[0], 64);
        _tile_stored(2, result[2], 64);
      }
      memory_fence();
      float* to = out + m0 * ldo + i;
      float* to_last = to + (two_inputs ? kTileRows * ldo : 0);
      upper.scatter(result[1], last, to_last, ldo);
      if (two_weights) lower.scatter(result[3], last, to_last + kTileRows, ldo);
      if (two_inputs) {
        upper.scatter(result[0], kTileRows, to, ldo);
        if (two_weights) lower.scatter(result[2], kTileRows, to + kTileRows, ldo);
      }
    }
  }
}

#undef SIRIUS_LOAD_WEIGHTS

// Tiles: 0, 1 accumulators [rows, 16 columns], 2 coefficients [rows, 32], 3, 4 weights [16 pairs, 16 columns]. Sixty-four weight
// rows at a time would halve the traffic of accumulators, but in a matrix of 4096 columns their lines share one set of the L1
// cache: three times slower (measured).
void amx_sum(const RowPointers& all, int n, const void* coefficients, ptrdiff_t ldc, int m, const RowForm&, int begin, int end,
             float* acc, ptrdiff_t lda) {
  constexpr int ahead = kPrefetchBytes / int(sizeof(bf16_t));
  // Of rows 2i and 2i + 1 the low and high halves of 32 columns become two tiles of [16 pairs of rows, 16 columns].
  const __m512i low = _mm512_load_si512(kFirstPairs.index), high = _mm512_load_si512(kLastPairs.index);
  for (int m0 = 0; m0 < m; m0 += kTileRows) {
    const int block = m - m0 < kTileRows ? m - m0 : kTileRows;
    TileConfig config;
    for (int t = 0; t < 3; ++t) config.set(t, block, 64);
    config.set(3, kTileRows, 64);
    config.set(4, kTileRows, 64);
    const Tiles tiles(config);

    for (int i = 0; i < n; i += kDepth) {
      const int depth = n - i < kDepth ? n - i : kDepth;
      const bf16_t* const* rows = reinterpret_cast<const bf16_t* const*>(all.rows) + i;
      alignas(64) bf16_t coef[kTileRows * kDepth];
      for (int j = 0; j < block; ++j) {
        const bf16_t* from = static_cast<const bf16_t*>(coefficients) + (m0 + j) * ldc + i;
        _mm512_store_si512(coef + j * kDepth, _mm512_maskz_loadu_epi16(first(depth), from));
      }
      memory_fence();
      _tile_loadd(2, coef, 64);
      for (int c = begin; c < end; c += kDepth) {
        const int columns = end - c < kDepth ? end - c : kDepth;
        const __mmask32 mask = first(columns);
        const int target = c + ahead;
        const int next = target < end ? 0 : depth;
        const int column = target < end ? target : (target - (end - begin) < end ? target - (end - begin) : c);
        alignas(64) bf16_t stage[2][kTileRows * kDepth];
        for (int r = 0; r < kDepth; r += 2) {
          // A row past the end counts as zero: its coefficient is zero, but zero times an infinity would not be.
          __m512i even = _mm512_setzero_si512(), odd = even;
          if (r < depth) {
            prefetch_now(rows[next + r] + column);
            even = _mm512_maskz_loadu_epi16(mask, rows[r] + c);
          }
          if (r + 1 < depth) {
            prefetch_now(rows[next + r + 1] + column);
            odd = _mm512_maskz_loadu_epi16(mask, rows[r + 1] + c);
          }
          _mm512_store_si512(stage[0] + r / 2 * kDepth, _mm512_permutex2var_epi16(even, low, odd));
          _mm512_store_si512(stage[1] + r / 2 * kDepth, _mm512_permutex2var_epi16(even, high, odd));
        }
        float* to = acc + m0 * lda + c;
        alignas(64) float edge[kTileRows * kDepth];
        ptrdiff_t stride = lda;
        if (columns < kDepth) {
          for (int j = 0; j < block; ++j)
            for (int x = 0; x < kDepth; ++x) edge[j * kDepth + x] = x < columns ? to[j * lda + x] : 0.0f;
          to = edge;
          stride = kDepth;
        }
        memory_fence();
        _tile_loadd(3, stage[0], 64);
        _tile_loadd(4, stage[1], 64);
        _tile_loadd(0, to, 4 * stride);
        _tile_loadd(1, to + 16, 4 * stride);
        _tile_dpbf16ps(0, 2, 3);
        _tile_dpbf16ps(1, 2, 4);
        _tile_stored(0, to, 4 * stride);
        _tile_stored(1, to + 16, 4 * stride);
        memory_fence();
        if (columns < kDepth)
          for (int j = 0; j < block; ++j)
            for (int x = 0; x < columns; ++x) acc[(m0 + j) * lda + c + x] = edge[j * kDepth + x];
      }
    }
  }
}

constexpr MatrixKernels kAmx = {amx_packed_size, amx_pack, amx_dot, amx_sum, read_row<bf16_t>, write_row<bf16_t>, nullptr};

}  // namespace

const MatrixKernels& matrix_kernels_amx(Format format, Dtype dtype) {
  return format == Format::bf16 ? kAmx : matrix_table_of(format, dtype);
}

}  // namespace sirius::cpu
