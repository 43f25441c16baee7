// Runs a CUDA kernel's own source on the CPU, for tests: one fiber per CUDA thread, one block after the other. Proves indexing,
// tails, reductions, barriers and shuffles; says nothing about speed, memory ordering or inline PTX.
//
// A thread runs until it waits at a barrier or a warp operation. Which one runs next is the thread order: forward or reverse,
// warp by warp, each as far as it can go; or random, all side by side. A kernel that lacks a barrier gives a wrong result in one
// of them. Shared memory is filled with NaN before every block. A barrier that only some threads reach, lanes that meet at
// different warp operations, and a shuffle from a lane outside its mask are errors, thrown from `launch`.
//
// As on sm_90, a kernel begins before the one before it has run: its first block goes on until all its threads wait for that one.
// Only then does the kernel before run, all of it. What is launched runs when `finish` is called, from which its errors are
// thrown. A thread that ends without having waited is an error too. On other streams than the null one a kernel runs by itself.
//
// runtime.h has copies on other streams.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace simt {

enum class Order { forward, reverse, random };
void set_order(Order order);

// Of the running thread.
struct Context {
  uint3 thread, block;
  dim3 block_size, grid_size;
  unsigned char* shared;
};
extern Context context;

struct Stream;  // of runtime.h; null: the kernels' own

// kernel: a text in which its name stands after "Kernel = ".
void launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body, Stream* stream = nullptr);
// early: the next kernel may begin while the one before this has not ended.
void wait_for_grid_before(bool early);
// Runs all that was launched.
void finish();
// Whether the end of a call from Python is no reason to.
void set_held(bool held);
bool held();

// Of runtime.cpp. Something on a stream: it is called when all before it has begun, until it says that it is over.
void enqueue(Stream* stream, std::function<bool()> command);
void enqueue(std::function<bool()> command);  // on the kernels' own
// Called when the last kernel that has begun is over.
void after_kernel(std::function<void()> then);
// Runs what can run on another stream, if there is anything; whether there is anything on one.
bool run_elsewhere();
bool waits_elsewhere();

// What a launch asks of a GPU.
struct Launch {
  std::string kernel;
  dim3 grid, block;
  size_t shared_bytes;
};
// With so many multiprocessors launches are noted, and not run; with 0 they run again.
void set_planning(int multiprocessors);
int multiprocessors();  // when not planning few, so that small matrices are cut as large ones are
std::vector<Launch> planned();

// Where a thread waits, for messages and to tell one operation from another.
struct Place {
  const char* what;
  const char* file;
  int line;
};
#define SIMT_PLACE(what) \
  simt::Place { what, file, line }
#define SIMT_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

void block_barrier(Place place);
// Waits for every lane of `mask`. The last one to come calls complete(lanes), where lanes[i] is what lane i brought, for all.
void warp_collective(unsigned mask, void* mine, void (*complete)(void* const* lanes, unsigned mask), Place place);
[[noreturn]] void fail(const std::string& message);
unsigned lane();

template <class T>
T shuffle(unsigned mask, T value, int source, Place place) {
  static_assert(std::is_trivially_copyable<T>::value, "lanes exchange plain values");
  struct Mine {
    T value, result;
    int source;
  } mine{value, value, source};
  const auto complete = [](void* const* lanes, unsigned mask) {
    for (unsigned rest = mask; rest; rest &= rest - 1) {
      Mine& own = *static_cast<Mine*>(lanes[__builtin_ctz(rest)]);
      if (!(mask >> own.source & 1)) fail("shuffle from lane " + std::to_string(own.source) + ", which is outside the mask");
      own.result = static_cast<Mine*>(lanes[own.source])->value;
    }
  };
  warp_collective(mask, &mine, complete, place);
  return mine.result;
}

}  // namespace simt

#define threadIdx (simt::context.thread)
#define blockIdx (simt::context.block)
#define blockDim (simt::context.block_size)
#define gridDim (simt::context.grid_size)

inline void __syncthreads(SIMT_CALLER) { simt::block_barrier(SIMT_PLACE("__syncthreads")); }
inline void __syncwarp(unsigned mask = ~0u, SIMT_CALLER) {
  simt::warp_collective(mask, nullptr, [](void* const*, unsigned) {}, SIMT_PLACE("__syncwarp"));
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_CALLER) {
  const int first = int(simt::lane()) & -width;
  return simt::shuffle(mask, value, first | (source & (width - 1)), SIMT_PLACE("__shfl_sync"));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, SIMT_CALLER) {
  return simt::shuffle(mask, value, int(simt::lane()) ^ flip, SIMT_PLACE("__shfl_xor_sync"));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, SIMT_CALLER) {
  const int own = int(simt::lane()), source = own - int(delta);
  return simt::shuffle(mask, value, source < 0 ? own : source, SIMT_PLACE("__shfl_up_sync"));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, SIMT_CALLER) {
  const int own = int(simt::lane()), source = own + int(delta);
  return simt::shuffle(mask, value, source > 31 ? own : source, SIMT_PLACE("__shfl_down_sync"));
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_CALLER) {
  unsigned ballot = predicate != 0;
  const auto complete = [](void* const* lanes, unsigned mask) {
    unsigned all = 0;
    for (unsigned rest = mask; rest; rest &= rest - 1) {
      const int i = __builtin_ctz(rest);
      all |= *static_cast<unsigned*>(lanes[i]) << i;
    }
    for (unsigned rest = mask; rest; rest &= rest - 1) *static_cast<unsigned*>(lanes[__builtin_ctz(rest)]) = all;
  };
  simt::warp_collective(mask, &ballot, complete, SIMT_PLACE("__ballot_sync"));
  return ballot;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, SIMT_CALLER) {
  const auto complete = [](void* const* lanes, unsigned mask) {
    unsigned sum = 0;
    for (unsigned rest = mask; rest; rest &= rest - 1) sum += *static_cast<unsigned*>(lanes[__builtin_ctz(rest)]);
    for (unsigned rest = mask; rest; rest &= rest - 1) *static_cast<unsigned*>(lanes[__builtin_ctz(rest)]) = sum;
  };
  simt::warp_collective(mask, &value, complete, SIMT_PLACE("__reduce_add_sync"));
  return value;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, SIMT_CALLER) {
  const auto complete = [](void* const* lanes, unsigned mask) {
    unsigned most = 0;
    for (unsigned rest = mask; rest; rest &= rest - 1) most = std::max(most, *static_cast<unsigned*>(lanes[__builtin_ctz(rest)]));
    for (unsigned rest = mask; rest; rest &= rest - 1) *static_cast<unsigned*>(lanes[__builtin_ctz(rest)]) = most;
  };
  simt::warp_collective(mask, &value, complete, SIMT_PLACE("__reduce_max_sync"));
  return value;
}

// Threads take turns, so every operation is atomic.
template <class T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at = T(old + value);
  return old;
}

using std::max;
using std::min;
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const unsigned long long bytes = (unsigned long long)(y) << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return out;
}
