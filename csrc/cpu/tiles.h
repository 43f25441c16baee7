// Tiles of AMX: how they are configured, and the products of integers in groups of 32 (q8.h) by them.
#pragma once

#include <cstdint>

#if defined(__AMX_INT8__)
#include <immintrin.h>
#endif

namespace sirius::cpu {
namespace {

#if defined(__AMX_INT8__)

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int num_rows, int bytes) {
    rows[tile] = uint8_t(num_rows);
    row_bytes[tile] = uint16_t(bytes);
  }
};

// GCC's tile intrinsics do not tell the compiler which memory they read and write: of a configuration only its first eight bytes,
// and it leaves out what is stored in the others.
inline void memory_fence() { __asm__ volatile("" ::: "memory"); }
inline void configure(const TileConfig& config) {
  __asm__ volatile("" ::"m"(config));
  _tile_loadconfig(&config);
}

struct Tiles {
  explicit Tiles(const TileConfig& config) { configure(config); }
  ~Tiles() { _tile_release(); }
};

// Rows of input from which on `sum` leaves products of codes that share their scales to tiles: with twelve VNNI is as fast, with
// eight faster.
constexpr int kTileInputs = 13;

// While it lives, and if there are so many rows of input, tiles are configured for products of groups: 0 sums [inputs, 16 lanes],
// 1 integers [inputs, 32 bytes], 2 codes [8, 16 lanes of four].
class GroupTiles {
 public:
  explicit GroupTiles(int inputs) : used_(inputs >= kTileInputs) {
    if (!used_) return;
    TileConfig config;
    config.set(0, inputs, 64);
    config.set(1, inputs, 32);
    config.set(2, 8, 64);
    configure(config);
  }
  ~GroupTiles() {
    if (used_) _tile_release();
  }

  // All rows of input by sixteen lanes, sums: int32 [inputs][16]. Inputs and vectors of codes lie so many bytes apart. Needs a
  // memory_fence after what was stored, and before what is loaded.
  static void multiply(const int8_t* inputs, ptrdiff_t input_stride, const void* codes, ptrdiff_t code_stride, int32_t* sums) {
    _tile_zero(0);
    _tile_loadd(1, inputs, input_stride);
    _tile_loadd(2, codes, code_stride);
    _tile_dpbsud(0, 1, 2);
    _tile_stored(0, sums, 64);
  }

 private:
  const bool used_;
};

#else

struct GroupTiles {
  explicit GroupTiles(int) {}
};

#endif

}  // namespace
}  // namespace sirius::cpu
