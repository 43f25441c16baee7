#pragma once

#include <string>
#include <vector>

namespace simt {

// What the kernel of this name writes, in its right or its broken form.
std::vector<float> run_fault(const std::string& name, bool broken);

// One product on tensor cores in bf16, by 32 lanes: a [32, 8] and b [32, 4], what each lane holds of its operands, in order.
// Returns [32, 4], what each then holds of the sums.
std::vector<float> run_mma(const std::vector<float>& a, const std::vector<float>& b);

}  // namespace simt
