// For tests: AMX's instructions on machines that have none. There they raise SIGILL; amx_soft.h then does what they say, so that
// the machine code under test is the very code that runs on AMX.
#include <signal.h>
#include <ucontext.h>

#include "amx_soft.h"
#include "kernels.h"

namespace sirius::cpu {
namespace {

struct sigaction before_;

// By the numbers that instructions have for them.
constexpr int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

// An instruction with a VEX prefix of three bytes, of the map 0F38 and 128 bits, without W: what all of AMX's are.
struct Instruction {
  const uint8_t* const at;
  const greg_t* const registers;
  int length = 5;
  bool known;
  int prefix, third, reg, rm, mod;  // prefix: 0, or that of 66, F3, F2; third: the operand beside ModRM's
  char* address = nullptr;          // of an operand in memory
  ptrdiff_t stride = 0;             // by which its rows are apart

  Instruction(const uint8_t* at_, const greg_t* registers_) : at(at_), registers(registers_) {
    known = at[0] == 0xc4 && (at[1] & 0x1f) == 2 && (at[2] & 0x84) == 0;
    if (!known) return;
    prefix = at[2] & 3;
    third = ~at[2] >> 3 & 15;
    mod = at[4] >> 6;
    reg = at[4] >> 3 & 7;
    rm = at[4] & 7;
    if (mod != 3) find_address();
  }

  greg_t value(int number) const { return registers[kRegisters[number]]; }

  void find_address() {
    const int x = at[1] & 0x40 ? 0 : 8, b = at[1] & 0x20 ? 0 : 8;
    greg_t base = 0;
    bool has_base = true;
    if (rm == 4) {
      const uint8_t sib = at[length++];
      const int index = (sib >> 3 & 7) | x;
      if (index != 4) stride = value(index) * (1 << (sib >> 6));
      has_base = (sib & 7) != 5 || mod != 0;
      if (has_base) base = value((sib & 7) | b);
    } else if (rm == 5 && mod == 0) {
      has_base = false;
    } else {
      base = value(rm | b);
    }
    int32_t displacement = 0;
    if (mod == 1) displacement = int8_t(at[length++]);
    if (mod == 2 || !has_base) {
      std::memcpy(&displacement, at + length, 4);
      length += 4;
    }
    if (!has_base && rm == 5) base = greg_t(at + length);  // after the instruction
    address = reinterpret_cast<char*>(base + displacement);
  }

  // Whether it is one of those that the kernels use; then it is done.
  bool done() const {
    if (!known) return false;
    enum { none, x66, xf3, xf2 };
    const bool memory = mod != 3;
    switch (at[3]) {
      case 0x49:
        if (prefix == none && memory && reg == 0)
          amx_soft::load_config(address);
        else if (prefix == none && !memory && at[4] == 0xc0)
          amx_soft::release();
        else if (prefix == xf2 && !memory)
          amx_soft::zero(reg);
        else
          return false;
        return true;
      case 0x4b:
        if (!memory) return false;
        if (prefix == xf2)
          amx_soft::load(reg, address, stride);
        else if (prefix == xf3)
          amx_soft::store(reg, address, stride);
        else
          return false;
        return true;
      case 0x5c:
        if (prefix != xf3 || memory) return false;
        amx_soft::dpbf16ps(reg, rm, third);
        return true;
      case 0x5e:
        if (prefix != xf3 || memory) return false;
        amx_soft::dpbsud(reg, rm, third);
        return true;
    }
    return false;
  }
};

void trapped(int, siginfo_t*, void* context) {
  greg_t* const registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const Instruction instruction(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers);
  if (instruction.done())
    registers[REG_RIP] += instruction.length;
  else
    sigaction(SIGILL, &before_, nullptr);  // it is met again there
}

}  // namespace

const MatrixKernels& matrix_kernels_amx_soft(Format format, Dtype dtype) {
  static const bool installed = [] {
    struct sigaction action{};
    action.sa_sigaction = trapped;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    return sigaction(SIGILL, &action, &before_) == 0;
  }();
  static_cast<void>(installed);
  return matrix_kernels_amx(format, dtype);
}

}  // namespace sirius::cpu
