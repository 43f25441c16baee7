// Parts of a graph that run only if a kernel before them says so: CUDA's conditional nodes, where they are.
//
// While a stream is captured, `new_condition` makes one for its graph. What is captured on `body` between `begin_if` and `end_if`
// runs in a replay if the condition was set before, and after it whatever the stream captures next. `stop` sets it.
#pragma once

#include <cstdint>

#include "ops.h"

namespace sirius::cuda {

// Whether this build and this machine's driver have them (both CUDA 12.4 or later).
bool has_conditions();

// Not 0. It is not set when a replay begins.
int64_t new_condition(StreamHandle stream);
void begin_if(int64_t condition, StreamHandle stream, StreamHandle body);
void end_if(StreamHandle body);

// Outside of a capture: waits for the stream, and says whether the flag, in device memory, is set.
bool is_set(const int32_t* flag, StreamHandle stream);

}  // namespace sirius::cuda
