// bf16 products on AMX tiles: sixteen input rows cost what one costs. fp16 and fp32 are the AVX-512 bodies.
//
// A weight tile is staged through a small buffer, which lets its sixteen rows come from anywhere. One input row uses the same
// tile instructions as sixteen, in the same order: that is what makes a row's bits independent of the rows beside it.
#include <cstring>

#include "kernels_simd.h"

namespace sirius::cpu {
namespace {

constexpr int kTileRows = 16;
constexpr int kDepth = 32;     // bf16 elements in a tile row of 64 bytes
constexpr int kMaxBlocks = 4;  // blocks of 16 input rows that share one staging

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int num_rows, int bytes) {
    rows[tile] = uint8_t(num_rows);
    row_bytes[tile] = uint16_t(bytes);
  }
};

struct Tiles {
  explicit Tiles(const TileConfig& config) { _tile_loadconfig(&config); }
  ~Tiles() { _tile_release(); }
};

// GCC's tile intrinsics do not tell the compiler which memory they read and write.
inline void memory_fence() { __asm__ volatile("" ::: "memory"); }

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

// Tiles: 0-3 results [16 weight rows, block], 4 weights [16, 32], 5 a full block of inputs, 6 the last block.
void amx_dot(const void* const* row_pointers, int n, const void* packed, int m, int k, float* out, ptrdiff_t ldo) {
  constexpr int ahead = kPrefetchBytes / int(sizeof(bf16_t));
  const int width = round_up(k, kDepth);
  for (int m0 = 0; m0 < m; m0 += kMaxBlocks * kTileRows) {
    const int rows_here = m - m0 < kMaxBlocks * kTileRows ? m - m0 : kMaxBlocks * kTileRows;
    const int blocks = (rows_here + kTileRows - 1) / kTileRows;
    const int last = rows_here - (blocks - 1) * kTileRows;
    TileConfig config;
    for (int t = 0; t < blocks; ++t) config.set(t, kTileRows, 4 * (t == blocks - 1 ? last : kTileRows));
    config.set(4, kTileRows, 64);
    config.set(5, kTileRows, 64);
    config.set(6, kTileRows, 4 * last);
    const Tiles tiles(config);
    const bf16_t* inputs = static_cast<const bf16_t*>(packed) + ptrdiff_t(m0) * width;

    for (int i = 0; i < n; i += kTileRows) {
      const int height = n - i < kTileRows ? n - i : kTileRows;
      const bf16_t* rows[2 * kTileRows];
      for (int r = 0; r < kTileRows; ++r) {
        rows[r] = static_cast<const bf16_t*>(row_pointers[i + (r < height ? r : 0)]);
        rows[kTileRows + r] = static_cast<const bf16_t*>(row_pointers[i + (r < height ? height + r : 0)]);
      }
      _tile_zero(0);
      if (blocks > 1) _tile_zero(1);
      if (blocks > 2) _tile_zero(2);
      if (blocks > 3) _tile_zero(3);
      for (int c = 0; c < k; c += kDepth) {
        alignas(64) bf16_t stage[kTileRows * kDepth];
        const int target = c + ahead;
        const int next = target < k ? 0 : kTileRows;
        const int column = target < k ? target : (target - k < k ? target - k : c);
        const __mmask32 mask = first(k - c);
        for (int r = 0; r < kTileRows; ++r) {
          prefetch(rows[next + r] + column);
          _mm512_store_si512(stage + r * kDepth, _mm512_maskz_loadu_epi16(mask, rows[r] + c));
        }
        memory_fence();
        _tile_loadd(4, stage, 64);
        const bf16_t* in = inputs + ptrdiff_t(c) * kTileRows;
        const auto block = [&](int t) { return inputs + ptrdiff_t(t) * kTileRows * width + ptrdiff_t(c) * kTileRows; };
        if (blocks > 1) {
          _tile_loadd(5, in, 64);
          _tile_dpbf16ps(0, 4, 5);
        }
        if (blocks > 2) {
          _tile_loadd(5, block(1), 64);
          _tile_dpbf16ps(1, 4, 5);
        }
        if (blocks > 3) {
          _tile_loadd(5, block(2), 64);
          _tile_dpbf16ps(2, 4, 5);
        }
        _tile_loadd(6, inputs + ptrdiff_t(blocks - 1) * kTileRows * width + ptrdiff_t(c) * last, 4 * last);
        switch (blocks) {
          case 1: _tile_dpbf16ps(0, 4, 6); break;
          case 2: _tile_dpbf16ps(1, 4, 6); break;
          case 3: _tile_dpbf16ps(2, 4, 6); break;
          default: _tile_dpbf16ps(3, 4, 6);
        }
      }
      for (int t = 0; t < blocks; ++t) {
        const int columns = t == blocks - 1 ? last : kTileRows;
        alignas(64) float result[kTileRows * kTileRows];
        switch (t) {
          case 0: _tile_stored(0, result, 4 * columns); break;
          case 1: _tile_stored(1, result, 4 * columns); break;
          case 2: _tile_stored(2, result, 4 * columns); break;
          default: _tile_stored(3, result, 4 * columns);
        }
        memory_fence();
        float* to = out + (m0 + t * kTileRows) * ldo + i;
        for (int j = 0; j < columns; ++j)
          for (int r = 0; r < height; ++r) to[j * ldo + r] = result[r * columns + j];
      }
    }
  }
}

// Interleaves rows 2i and 2i + 1: low and high halves of 32 columns become two tiles of [16 pairs of rows, 16 columns].
struct Interleave {
  __m512i low, high;

  Interleave() {
    alignas(64) uint16_t index[2][32];
    for (int c = 0; c < 16; ++c)
      for (int half = 0; half < 2; ++half) {
        index[half][2 * c] = uint16_t(16 * half + c);
        index[half][2 * c + 1] = uint16_t(32 + 16 * half + c);
      }
    low = _mm512_load_si512(index[0]);
    high = _mm512_load_si512(index[1]);
  }
};

// Tiles: 0, 1 accumulators [rows, 16 columns], 2 coefficients [rows, 32], 3, 4 weights [16 pairs, 16 columns].
void amx_sum(const void* const* row_pointers, int n, const void* coefficients, ptrdiff_t ldc, int m, int begin, int end,
             float* acc, ptrdiff_t lda) {
  constexpr int ahead = kPrefetchBytes / int(sizeof(bf16_t));
  const Interleave order;
  for (int m0 = 0; m0 < m; m0 += kTileRows) {
    const int block = m - m0 < kTileRows ? m - m0 : kTileRows;
    TileConfig config;
    for (int t = 0; t < 3; ++t) config.set(t, block, 64);
    config.set(3, kTileRows, 64);
    config.set(4, kTileRows, 64);
    const Tiles tiles(config);

    for (int i = 0; i < n; i += kDepth) {
      const int depth = n - i < kDepth ? n - i : kDepth;
      const bf16_t* const* rows = reinterpret_cast<const bf16_t* const*>(row_pointers) + i;
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
            prefetch(rows[next + r] + column);
            even = _mm512_maskz_loadu_epi16(mask, rows[r] + c);
          }
          if (r + 1 < depth) {
            prefetch(rows[next + r + 1] + column);
            odd = _mm512_maskz_loadu_epi16(mask, rows[r + 1] + c);
          }
          _mm512_store_si512(stage[0] + r / 2 * kDepth, _mm512_permutex2var_epi16(even, order.low, odd));
          _mm512_store_si512(stage[1] + r / 2 * kDepth, _mm512_permutex2var_epi16(even, order.high, odd));
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

constexpr Kernels amx_table() {
  Kernels kernels = table<bf16_t>;
  kernels.packed_size = amx_packed_size;
  kernels.pack = amx_pack;
  kernels.dot = amx_dot;
  kernels.sum = amx_sum;
  return kernels;
}

constexpr Kernels kAmx = amx_table();

}  // namespace

const Kernels& kernels_amx(Dtype dtype) { return dtype == Dtype::bf16 ? kAmx : table_of(dtype); }

}  // namespace sirius::cpu
