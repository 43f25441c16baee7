// CRC-32C of blocks of memory: what tells weights that were read from a disk from others.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sirius::cpu {

// sums[i]: of bytes i * size to (i + 1) * size - 1, for i < count.
void checksums(const void* data, size_t size, int count, uint32_t* sums);

}  // namespace sirius::cpu
