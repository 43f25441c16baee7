// Small kernels, each of which has a right and a broken form: tests/test_simt.py makes sure that simt tells them apart.
#include "faults.h"

#include <algorithm>
#include <map>
#include <memory>

#include "../cuda/mma.cuh"

namespace simt {
namespace {

using namespace sirius::cuda;
using simt::launch;

constexpr int kThreads = 64, kBlocks = 4;

struct Shared {
  float values[kThreads];
  int32_t last;
};

// in, out: [kThreads * kBlocks]. partials: [kBlocks]. counter: [1], zero.
struct Data {
  const float* in;
  float *out, *partials;
  int32_t* counter;
  bool broken;
};

// Every thread gets another warp's value through shared memory.
__global__ void missing_barrier(const Data d) {
  const int t = int(threadIdx.x), at = int(blockIdx.x) * kThreads;
  auto& shared = shared_memory<Shared>();
  shared.values[t] = d.in[at + t];
  if (!d.broken) __syncthreads();
  d.out[at + t] = shared.values[kThreads - 1 - t];
}

// The same memory again, while others still read it.
__global__ void missing_second_barrier(const Data d) {
  const int t = int(threadIdx.x), at = int(blockIdx.x) * kThreads;
  auto& shared = shared_memory<Shared>();
  float sum = 0.0f;
  for (int i = 0; i < 2; ++i) {
    shared.values[t] = d.in[at + t] + float(i);
    __syncthreads();
    sum += shared.values[(t + 32) % kThreads];
    if (!d.broken) __syncthreads();
  }
  d.out[at + t] = sum;
}

__global__ void missing_warp_barrier(const Data d) {
  const int t = int(threadIdx.x), at = int(blockIdx.x) * kThreads;
  auto& shared = shared_memory<Shared>();
  shared.values[t] = d.in[at + t];
  if (!d.broken) __syncwarp();
  d.out[at + t] = shared.values[t ^ 31];
}

__global__ void divergent_barrier(const Data d) {
  const int t = int(threadIdx.x);
  if (d.broken && t < kThreads / 2)
    __syncthreads();
  else
    __syncthreads();
  d.out[int(blockIdx.x) * kThreads + t] = 1.0f;
}

__global__ void early_return(const Data d) {
  const int t = int(threadIdx.x);
  if (d.broken && t == kThreads - 1) return;
  __syncthreads();
  d.out[int(blockIdx.x) * kThreads + t] = 1.0f;
}

__global__ void shuffle_from_outside(const Data d) {
  const int t = int(threadIdx.x), at = int(blockIdx.x) * kThreads;
  float value = d.in[at + t];
  if (t % kWarp < 16) value = __shfl_sync(0xffffu, value, d.broken ? 16 : 15);
  d.out[at + t] = value;
}

__global__ void lane_outside_its_mask(const Data d) {
  const int t = int(threadIdx.x), at = int(blockIdx.x) * kThreads;
  d.out[at + t] = __shfl_sync(d.broken ? 0x7fffffffu : kAllLanes, d.in[at + t], 3);
}

__global__ void different_operations(const Data d) {
  const int t = int(threadIdx.x), at = int(blockIdx.x) * kThreads;
  float value = d.in[at + t];
  if (d.broken && t % 2)
    value = __shfl_xor_sync(kAllLanes, value, 1);
  else
    value = __shfl_xor_sync(kAllLanes, value, 1);
  d.out[at + t] = value;
}

__global__ void missing_lane(const Data d) {
  const int t = int(threadIdx.x), at = int(blockIdx.x) * kThreads;
  if (d.broken && t % kWarp == 7) return;
  d.out[at + t] = warp_sum(d.in[at + t]);
}

__global__ void misaligned_load(const Data d) {
  const int t = int(threadIdx.x), at = int(blockIdx.x) * kThreads;
  if (t == 0) d.out[at] = load(d.in + at + (d.broken ? 1 : 0))[0];
}

__global__ void misaligned_store(const Data d) {
  const int t = int(threadIdx.x), at = int(blockIdx.x) * kThreads;
  if (t == 0) store(d.out + at + (d.broken ? 1 : 0), load(d.in));
}

// Only half of the memory is written, but all of it is read.
__global__ void uninitialised_memory(const Data d) {
  const int t = int(threadIdx.x), at = int(blockIdx.x) * kThreads;
  auto& shared = shared_memory<Shared>();
  if (!d.broken || t < kThreads / 2) shared.values[t] = d.in[at + t];
  __syncthreads();
  d.out[at + t] = shared.values[kThreads - 1 - t];
}

// The sum of all blocks by the last one to arrive; or by the one of the highest number, whenever it runs.
__global__ void not_the_last_block(const Data d) {
  const int t = int(threadIdx.x), block = int(blockIdx.x), blocks = int(gridDim.x);
  auto& shared = shared_memory<Shared>();
  if (t == 0) d.partials[block] = d.in[block];
  if (!(d.broken ? block == blocks - 1 : last_block(d.counter, blocks, &shared.last))) return;
  if (t == 0)
    for (int i = 0; i < blocks; ++i) d.out[0] += d.partials[i];
}

// Adds one to what the kernel before has written, which is the input.
__global__ void early_read(const Data d) {
  const int at = int(blockIdx.x) * kThreads + int(threadIdx.x);
  float value = d.out[at];
  wait_for_kernel_before();
  if (!d.broken) value = d.out[at];
  d.out[at] = value + 1.0f;
}

__global__ void missing_wait(const Data d) {
  if (!d.broken || threadIdx.x > 0) wait_for_kernel_before();
  d.out[int(blockIdx.x) * kThreads + int(threadIdx.x)] = 1.0f;
}

// What follows is left to AddressSanitizer.

__global__ void beyond_shared_memory(const Data d) {
  const int t = int(threadIdx.x), at = int(blockIdx.x) * kThreads;
  float* values = reinterpret_cast<float*>(context.shared);
  values[t + (d.broken ? int(sizeof(Shared) / sizeof(float) + 3) / 4 * 4 - kThreads + 1 : 0)] = d.in[at + t];
  d.out[at + t] = 1.0f;
}

__global__ void read_beyond_the_end(const Data d) {
  const int i = int(blockIdx.x) * kThreads + int(threadIdx.x);
  d.out[i] = d.in[i + (d.broken ? 1 : 0)];
}

__global__ void write_beyond_the_end(const Data d) {
  const int i = int(blockIdx.x) * kThreads + int(threadIdx.x);
  d.out[i + (d.broken ? 1 : 0)] = d.in[i];
}

__global__ void copy(const Data d) {
  wait_for_kernel_before();
  const int at = int(blockIdx.x) * kThreads + int(threadIdx.x);
  d.out[at] = d.in[at];
}

// These wait where they want to, and come after `copy`; the others have waited before all else.
const std::map<std::string, void (*)(Data)> second_kernels = {{"early_read", early_read}, {"missing_wait", missing_wait}};

const std::map<std::string, void (*)(Data)> kernels = {
    {"missing_barrier", missing_barrier},
    {"missing_second_barrier", missing_second_barrier},
    {"missing_warp_barrier", missing_warp_barrier},
    {"divergent_barrier", divergent_barrier},
    {"early_return", early_return},
    {"shuffle_from_outside", shuffle_from_outside},
    {"lane_outside_its_mask", lane_outside_its_mask},
    {"different_operations", different_operations},
    {"missing_lane", missing_lane},
    {"misaligned_load", misaligned_load},
    {"misaligned_store", misaligned_store},
    {"uninitialised_memory", uninitialised_memory},
    {"not_the_last_block", not_the_last_block},
    {"beyond_shared_memory", beyond_shared_memory},
    {"read_beyond_the_end", read_beyond_the_end},
    {"write_beyond_the_end", write_beyond_the_end},
};

}  // namespace

std::vector<float> run_fault(const std::string& name, bool broken) {
  constexpr int kCount = kThreads * kBlocks;
  // Each array in memory of its own, so that AddressSanitizer sees where it ends.
  const auto array = [](int n) { return std::unique_ptr<float[]>(new float[n]()); };
  const auto in = array(kCount), out = array(kCount), partials = array(kBlocks);
  for (int i = 0; i < kCount; ++i) in[i] = float(i + 1);
  int32_t counter = 0;
  const Data data{in.get(), out.get(), partials.get(), &counter, broken};
  if (const auto found = second_kernels.find(name); found != second_kernels.end()) {
    launch("Kernel = copy;", kBlocks, kThreads, 0, [=] { copy(data); });
    launch("Kernel = fault;", kBlocks, kThreads, 0, [=] { found->second(data); });
  } else {
    launch("Kernel = fault;", kBlocks, kThreads, sizeof(Shared), [=, kernel = kernels.at(name)] {
      wait_for_kernel_before();
      kernel(data);
    });
  }
  finish();
  return {out.get(), out.get() + kCount};
}

std::vector<float> run_mma(const std::vector<float>& a, const std::vector<float>& b) {
  std::vector<float> out(kWarp * 4);
  launch("Kernel = mma;", 1, kWarp, 0, [&] {
    wait_for_kernel_before();
    const int lane = int(threadIdx.x);
    Operands operands;
    for (int i = 0; i < 4; ++i) operands.a[i] = word_of<sirius::bf16_t>(a[lane * 8 + 2 * i], a[lane * 8 + 2 * i + 1]);
    for (int i = 0; i < 2; ++i) operands.b[i] = word_of<sirius::bf16_t>(b[lane * 4 + 2 * i], b[lane * 4 + 2 * i + 1]);
    float sums[4] = {};
    mma<sirius::bf16_t>(sums, operands);
    std::copy(sums, sums + 4, out.begin() + lane * 4);
  });
  finish();
  return out;
}

}  // namespace simt
