#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef SIRIUS_HAVE_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sirius::cpu {
namespace {

struct Isa {
  const char* name;
  bool (*usable)();
  const Kernels& (*kernels)(Dtype);
  const MatrixKernels& (*matrix_kernels)(Format, Dtype);
};

#ifdef SIRIUS_HAVE_AVX2
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

// Of a subleaf of CPUID's leaf 7, which says what the compiler's own test does not know.
struct Leaf7 {
  unsigned eax, ebx, ecx, edx;

  explicit Leaf7(unsigned subleaf) : eax(7), ecx(subleaf) {
    __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  }
};
#endif

#ifdef SIRIUS_HAVE_AVXVNNI
bool has_avxvnni() { return has_avx2() && (Leaf7(1).eax >> 4 & 1); }
#endif

#ifdef SIRIUS_HAVE_AVX512
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

#ifdef SIRIUS_HAVE_AMX
bool has_amx() {
  // CPUID leaf 7: EDX bit 22 is AMX-BF16, bit 24 AMX-TILE, bit 25 AMX-INT8. Linux hands out 8 KiB of tile state on request only.
  const unsigned edx = Leaf7(0).edx;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return has_avx512() && (edx >> 22 & 1) && (edx >> 24 & 3) == 3 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

constexpr Isa kIsas[] = {
#ifdef SIRIUS_HAVE_AMX
    {"amx", has_amx, kernels_avx512, matrix_kernels_amx},
#endif
#ifdef SIRIUS_HAVE_AVX512
    {"avx512", has_avx512, kernels_avx512, matrix_kernels_avx512},
#endif
#ifdef SIRIUS_HAVE_AVXVNNI
    {"avxvnni", has_avxvnni, kernels_avx2, matrix_kernels_avxvnni},
#endif
#ifdef SIRIUS_HAVE_AVX2
    {"avx2", has_avx2, kernels_avx2, matrix_kernels_avx2},
#endif
    {"scalar", [] { return true; }, kernels_scalar, matrix_kernels_scalar},
#ifdef SIRIUS_HAVE_AMX_SOFT
    // For tests; the last, so that it is never chosen by itself.
    {"amx-soft", has_avx512, kernels_avx512, matrix_kernels_amx_soft},
#endif
};

const Isa& find(const std::string& name) {
  std::string known;
  for (const Isa& isa : kIsas) {
    if (!isa.usable()) continue;
    if (name == isa.name) return isa;
    known += (known.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument("SIRIUS_ISA: expected one of " + known + " on this CPU, got '" + name + "'");
}

const Isa& choose() {
  const char* wish = std::getenv("SIRIUS_ISA");
  return find(wish && *wish ? wish : available_isas().front());
}

std::atomic<const Isa*> current{nullptr};

const Isa& chosen() {
  if (!current) current = &choose();
  return *current;
}

}  // namespace

const Kernels& kernels(Dtype dtype) { return chosen().kernels(dtype); }

const MatrixKernels& matrix_kernels(Format format, Dtype dtype) { return chosen().matrix_kernels(format, dtype); }

void choose_isa() { chosen(); }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas)
    if (isa.usable()) names.push_back(isa.name);
  return names;
}

std::string isa() { return chosen().name; }

void set_isa(const std::string& name) { current = &find(name); }

}  // namespace sirius::cpu
