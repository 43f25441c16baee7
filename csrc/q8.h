// Eight bits in two planes: how the formats q8 and q8_upper lie in memory. A row has `cols` weights in groups of 32, the last one
// filled up:
//
//   at the row's address:               scales f16 [groups], filled up to 16 bytes | upper nibbles [groups][16]
//   Matrix::lower bytes from there on:  lower nibbles [groups][16]
//
// Byte b of a group's 16 has the nibble of weight b in its lower half and that of weight 16 + b in its upper half. F reads all:
//
//   weight = scale * (code - 128), code = 16 * upper + lower
//
// S reads the same rows without the lower nibbles and takes 7.5, their mean, for each. So q8_upper is a view of a q8 matrix, or a
// matrix of its own that has no lower nibbles. The upper plane of all rows comes before the lower one of all: a reader of the
// upper ones then reads straight on, which is a third faster than to skip what lies between (measured: hardware reads it all the
// same).
#pragma once

#include "types.h"

namespace sirius::q8 {

constexpr int kGroup = 32, kGroupBytes = 16;
constexpr int kZero = 128;            // the code of a weight of zero
constexpr float kUpperZero = 120.5f;  // the same, to be taken from 16 * upper

SIRIUS_ANYWHERE constexpr int groups(int cols) { return (cols + kGroup - 1) / kGroup; }

SIRIUS_ANYWHERE constexpr int scale_bytes(int cols) { return (2 * groups(cols) + 15) / 16 * 16; }

// Of a row without its lower nibbles.
SIRIUS_ANYWHERE constexpr int upper_bytes(int cols) { return scale_bytes(cols) + kGroupBytes * groups(cols); }

}  // namespace sirius::q8
