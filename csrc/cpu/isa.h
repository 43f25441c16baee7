// Which bodies run: the best that the CPU has, or the one that SIRIUS_ISA or set_isa names.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace sirius::cpu {

const Kernels& kernels(Dtype dtype);
const MatrixKernels& matrix_kernels(Format format, Dtype dtype);

std::vector<std::string> available_isas();  // best first; never empty
std::string isa();
// Heeds SIRIUS_ISA, if nobody has yet. Throws as set_isa; out of a thread of a team nothing may be thrown.
void choose_isa();
void set_isa(const std::string& name);  // throws std::invalid_argument that lists what there is

}  // namespace sirius::cpu
