#include "checks.h"

#include <array>
#include <cstring>

namespace sirius::cpu {
namespace {

// Castagnoli's polynomial, bits reversed: the one that processors have an instruction for.
constexpr uint32_t kPolynomial = 0x82f63b78;

constexpr std::array<uint32_t, 256> make_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t sum = i;
    for (int bit = 0; bit < 8; ++bit) sum = sum >> 1 ^ (sum & 1 ? kPolynomial : 0);
    table[i] = sum;
  }
  return table;
}

uint32_t by_table(const uint8_t* data, size_t size) {
  static constexpr std::array<uint32_t, 256> table = make_table();
  uint32_t sum = ~0u;
  for (size_t i = 0; i < size; ++i) sum = table[(sum ^ data[i]) & 255] ^ sum >> 8;
  return ~sum;
}

#if defined(__x86_64__)
// Blocks side by side: the instruction takes three cycles, and another one can be started in each.
constexpr int kSide = 4;

template <int kCount>
__attribute__((target("sse4.2"))) void by_instruction(const uint8_t* data, size_t size, uint32_t* out) {
  uint64_t sums[kCount];
  for (int b = 0; b < kCount; ++b) sums[b] = ~0u;
  size_t at = 0;
  for (; at + 8 <= size; at += 8)
    for (int b = 0; b < kCount; ++b) {
      uint64_t word;
      std::memcpy(&word, data + b * size + at, 8);
      sums[b] = __builtin_ia32_crc32di(sums[b], word);
    }
  for (int b = 0; b < kCount; ++b) {
    uint32_t sum = uint32_t(sums[b]);
    for (size_t i = at; i < size; ++i) sum = __builtin_ia32_crc32qi(sum, data[b * size + i]);
    out[b] = ~sum;
  }
}
#endif

}  // namespace

void checksums(const void* data, size_t size, int count, uint32_t* sums) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  int i = 0;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("sse4.2")) {
    for (; i + kSide <= count; i += kSide) by_instruction<kSide>(bytes + i * size, size, sums + i);
    for (; i < count; ++i) by_instruction<1>(bytes + i * size, size, sums + i);
  }
#endif
  for (; i < count; ++i) sums[i] = by_table(bytes + i * size, size);
}

}  // namespace sirius::cpu
