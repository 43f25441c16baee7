// Four bits: how the formats q4, q4_k, q4_across and q4_k_across lie in memory. They hold the numbers of GGUF's 4-bit types (and
// of others that are made alike) exactly: weights come in groups of 32, each with a scale and a minimum,
//
//   weight = scale * code + minimum, code 0 .. 15
//
// and codes lie as the upper nibbles of q8 do: 16 bytes a group, byte b with the code of weight b in its lower half and that of
// weight 16 + b in its upper half. There are two ways to give scale and minimum:
//
//   q4    as they are, f16 both: Q4_1, and Q4_0 with minimum = -8 * scale. 5 bits a weight
//   q4_k  for eight groups together f16 d and e, and for each group numbers s and m of 6 bits: scale = d * s, minimum = -e * m.
//         As Q4_K, 4.5 bits a weight
//
// Rows whose groups lie along them, for `dot`. What comes first is 16 bytes for every four groups (q4) or eight (q4_k), so that a
// reader of many rows side by side gets it as it gets nibbles, and the rest of the row is read straight on:
//
//   headers [..][16] | nibbles [groups][16]
//   of q4:    scale, minimum of each group, in turn
//   of q4_k:  dword 0: d, e | dwords 1 to 3: of groups 0, 1 | 2, 3 | 4, 5 in bits 0-5 s, 6-11 m, 12-17 s, 18-23 m; and groups 6
//             and 7 have the same place in the dword that the three top bytes make up
//
// `down` is stored neuron by neuron, but its groups lie along the neurons, as in the files: there 32 neighbouring rows have a
// group in each column. Rows are nibbles alone, where columns take the places of weights, and scales stand by themselves, at
// Matrix::shared; C columns, filled up to a multiple of 32:
//
//   of q4_across:    for every 32 rows   scale, minimum f16 [C][2]
//   of q4_k_across:  for every 256 rows  d, e f16 [C][2] | for each 32 of them s, m u8 [C][2]
#pragma once

#include "q8.h"

namespace sirius::q4 {

using q8::groups, q8::kGroup, q8::kGroupBytes;

constexpr int kSuper = 8;  // groups that share d and e

// Groups that a header of 16 bytes is for.
SIRIUS_ANYWHERE constexpr int header_groups(bool supers) { return supers ? kSuper : 4; }

SIRIUS_ANYWHERE constexpr int header_bytes(int cols, bool supers) {
  return 16 * ((groups(cols) + header_groups(supers) - 1) / header_groups(supers));
}

// The shared scales of the group of rows 32 * group and on; of q4_k_across, its s and m.
SIRIUS_ANYWHERE constexpr int64_t shared_at(int group, int cols, bool supers) {
  const int64_t columns = int64_t(kGroup) * groups(cols);
  if (!supers) return group * 4 * columns;
  return (group / kSuper * (4 + 2 * kSuper) + 4 + group % kSuper * 2) * columns;
}

// Of q4_k_across, d and e of a group.
SIRIUS_ANYWHERE constexpr int64_t super_at(int group, int cols) {
  return int64_t(group / kSuper) * (4 + 2 * kSuper) * kGroup * groups(cols);
}

}  // namespace sirius::q4
