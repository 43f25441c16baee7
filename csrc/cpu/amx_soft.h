// AMX in plain C++, for tests on machines that have none: tiles, and the intrinsics of theirs that the kernels use, by Intel's
// manual. What is a fault there ends the process here, with a message.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace sirius::cpu::amx_soft {
namespace {

constexpr int kTiles = 8, kMaxRows = 16, kMaxBytes = 64;

struct Tile {
  int rows = 0, bytes = 0;  // of a row
  alignas(64) uint8_t data[kMaxRows][kMaxBytes] = {};
};

thread_local Tile tiles[kTiles];  // without rows where none is configured

inline void expect(bool right, const char* instruction, const char* what) {
  if (right) return;
  std::fprintf(stderr, "amx_soft: %s: %s\n", instruction, what);
  std::abort();
}

inline Tile& tile(int t, const char* instruction) {
  expect(t >= 0 && t < kTiles, instruction, "a tile is one of eight");
  expect(tiles[t].rows > 0, instruction, "a tile that is not configured");
  return tiles[t];
}

inline void release() {
  for (Tile& each : tiles) each = {};
}

inline void load_config(const void* p) {
  const char* const name = "ldtilecfg";
  uint8_t bytes[64];
  std::memcpy(bytes, p, 64);
  expect(bytes[0] == 1, name, "a palette other than 1");
  expect(bytes[1] == 0, name, "a start row, which only an interrupt leaves");
  for (int i = 2; i < 64; ++i)
    expect(i / 16 == 1 || (i >= 48 && i < 56) || i < 2 || bytes[i] == 0, name, "reserved bytes that are not zero");
  for (int t = 0; t < kTiles; ++t) {
    const int rows = bytes[48 + t], width = bytes[16 + 2 * t] | bytes[17 + 2 * t] << 8;
    expect(rows <= kMaxRows && width <= kMaxBytes, name, "a tile of more than 16 rows or 64 bytes");
    expect((rows == 0) == (width == 0), name, "rows without bytes, or bytes without rows");
    tiles[t] = {};
    tiles[t].rows = rows;
    tiles[t].bytes = width;
  }
}

inline void zero(int t) { std::memset(tile(t, "tilezero").data, 0, sizeof(Tile::data)); }

inline void load(int t, const void* from, ptrdiff_t stride) {
  Tile& to = tile(t, "tileloadd");
  std::memset(to.data, 0, sizeof(to.data));
  for (int r = 0; r < to.rows; ++r) std::memcpy(to.data[r], static_cast<const char*>(from) + r * stride, to.bytes);
}

inline void store(int t, void* to, ptrdiff_t stride) {
  const Tile& from = tile(t, "tilestored");
  for (int r = 0; r < from.rows; ++r) std::memcpy(static_cast<char*>(to) + r * stride, from.data[r], from.bytes);
}

// c [m, n] += a [m, k] * b [k, n], in elements of four bytes.
struct Operands {
  Tile& c;
  const Tile &a, &b;
  const int columns;

  Operands(int i, int j, int k, const char* name) : c(tile(i, name)), a(tile(j, name)), b(tile(k, name)), columns(c.bytes / 4) {
    expect(i != j && i != k && j != k, name, "the same tile twice");
    expect((c.bytes | a.bytes | b.bytes) % 4 == 0, name, "rows that are no multiple of four bytes");
    expect(c.rows == a.rows && c.bytes == b.bytes && a.bytes / 4 == b.rows, name, "tiles that do not fit each other");
  }
};

inline float bf16_at(const uint8_t* p) {
  const uint32_t bits = uint32_t(p[0] | p[1] << 8) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Even and odd elements are summed apart, in order and by fused multiplication, then together, then with c. Not inlined: what is
// set for its arithmetic must stand before all of it.
__attribute__((noinline)) inline void add_products_bf16(const Operands& of) {
  constexpr int n = kMaxBytes / 4;
  float b[kMaxRows][2][n];
  for (int k = 0; k < of.b.rows; ++k)
    for (int i = 0; i < n; ++i)
      for (int half = 0; half < 2; ++half) b[k][half][i] = bf16_at(of.b.data[k] + 4 * i + 2 * half);
  for (int m = 0; m < of.c.rows; ++m) {
    float even[n] = {}, odd[n] = {}, sum[n];
    for (int k = 0; k < of.b.rows; ++k) {
      const float first = bf16_at(of.a.data[m] + 4 * k), second = bf16_at(of.a.data[m] + 4 * k + 2);
      for (int i = 0; i < n; ++i) {
        even[i] = std::fma(first, b[k][0][i], even[i]);
        odd[i] = std::fma(second, b[k][1][i], odd[i]);
      }
    }
    std::memcpy(sum, of.c.data[m], sizeof(sum));
    for (int i = 0; i < n; ++i) sum[i] += even[i] + odd[i];
    std::memcpy(of.c.data[m], sum, 4 * of.columns);
  }
}

inline void dpbf16ps(int c, int a, int b) {
  const Operands of(c, a, b, "tdpbf16ps");
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x9fc0);  // to the nearest, subnormals read and written as zero, no exceptions: whatever the thread has set
  add_products_bf16(of);
  _mm_setcsr(before);
}

// Four products of a signed and an unsigned byte at a time, with sums modulo 2^32.
inline void dpbsud(int c, int a, int b) {
  const Operands of(c, a, b, "tdpbsud");
  for (int m = 0; m < of.c.rows; ++m) {
    uint32_t sum[kMaxBytes / 4];
    std::memcpy(sum, of.c.data[m], sizeof(sum));
    for (int k = 0; k < of.b.rows; ++k)
      for (int i = 0; i < kMaxBytes; ++i) sum[i / 4] += uint32_t(int8_t(of.a.data[m][4 * k + i % 4]) * of.b.data[k][i]);
    std::memcpy(of.c.data[m], sum, 4 * of.columns);
  }
}

}  // namespace
}  // namespace sirius::cpu::amx_soft

// Some of the compiler's are macros, others functions.
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_loadconfig sirius::cpu::amx_soft::load_config
#define _tile_release sirius::cpu::amx_soft::release
#define _tile_zero sirius::cpu::amx_soft::zero
#define _tile_loadd sirius::cpu::amx_soft::load
#define _tile_stored sirius::cpu::amx_soft::store
#define _tile_dpbf16ps sirius::cpu::amx_soft::dpbf16ps
#define _tile_dpbsud sirius::cpu::amx_soft::dpbsud
