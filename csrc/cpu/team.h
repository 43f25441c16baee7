// Ops are written for a team: each of its threads calls the op with equal arguments, takes its share of the work and does not
// wait at the end. Whoever reads what an op wrote calls sync() first. Outside with_team the team is the calling thread.
//
// Threads are OpenMP's, so that they are torch's own. The barrier is ours: a layer has seven, and libgomp spins for milliseconds
// in each, which stands still a machine whose cores are shared with another busy process. This one soon offers its core to
// others.
#pragma once

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>

#include "isa.h"

namespace sirius::cpu {

using Clock = std::chrono::steady_clock;

class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}

  // since: when the caller's last wait ended; when this one has, afterwards.
  void wait(Clock::time_point& since) {
    const Clock::time_point reached = Clock::now();
    const int generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      since = reached;
      return;
    }
    constexpr int kSpins = 200;  // some microseconds: more than a balanced op needs
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
      if (spins < kSpins)
        pause();
      else
        sched_yield();
    }
    const Clock::time_point released = Clock::now();
    const Clock::duration waited = released - reached;
    if (waited > kStall && waited > 2 * (reached - since))
      stalled_.fetch_add(std::chrono::nanoseconds(waited).count(), std::memory_order_relaxed);
    since = released;
  }

  // How long threads have stood still because another was kept from its work: waited for far longer than they had worked. One
  // that is merely slower, on a smaller core, does not make others wait so long.
  double stalled() const { return 1e-9 * double(stalled_.load(std::memory_order_relaxed)); }

 private:
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  static constexpr Clock::duration kStall = std::chrono::microseconds(300);  // less than others take a core at once

  const int threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> generation_{0};
  std::atomic<int64_t> stalled_{0};
};

struct Member {
  int id = 0, size = 1;
  Barrier* barrier = nullptr;
  Clock::time_point since{};  // when it last began to work
};

inline thread_local Member member;  // this thread's place in its team

inline void sync() {
  if (member.barrier) member.barrier->wait(member.since);
}

// Returns how long threads were stalled, in seconds.
template <class Body>
double with_team(int threads, const Body& body) {
  choose_isa();
  std::unique_ptr<Barrier> barrier;
#pragma omp parallel num_threads(threads)
  {
    const int size = omp_get_num_threads();  // OpenMP may grant fewer threads than asked for
#pragma omp single
    barrier = std::make_unique<Barrier>(size);
    member = {omp_get_thread_num(), size, barrier.get(), Clock::now()};
    body();
    member = {};
  }
  return barrier->stalled();
}

struct Range {
  int begin, end;
};

// This thread's share of [0, n), cut at multiples of `grain`.
inline Range share(int n, int grain = 1) {
  const int64_t grains = (int64_t(n) + grain - 1) / grain;
  const int64_t id = member.id, threads = member.size;
  const auto bound = [&](int64_t i) { return int(grains * i / threads * grain < n ? grains * i / threads * grain : n); };
  return {bound(id), bound(id + 1)};
}

// Per-thread buffers that only grow, so that a decode step allocates nothing once it has run.
enum class Scratch {
  normed,
  packed,
  packed_again,
  first,
  second,
  probabilities,
  accumulator,
  pointers,
  neurons,
  taken_neurons,
  taken,
  count
};

template <class T>
T* scratch(Scratch which, size_t n) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  struct Buffer {
    std::unique_ptr<void, Free> memory;
    size_t size = 0;
  };
  static thread_local Buffer buffers[int(Scratch::count)];
  Buffer& buffer = buffers[int(which)];
  const size_t bytes = (n * sizeof(T) + 63) / 64 * 64;
  if (buffer.size < bytes) {
    buffer.memory.reset(std::aligned_alloc(64, bytes));
    if (!buffer.memory) throw std::bad_alloc();
    buffer.size = bytes;
  }
  return static_cast<T*>(buffer.memory.get());
}

inline const void* offset(const void* p, size_t elements, Dtype dtype) {
  return static_cast<const char*>(p) + elements * size_of(dtype);
}

inline void* offset(void* p, size_t elements, Dtype dtype) { return static_cast<char*>(p) + elements * size_of(dtype); }

// A run of row pointers as kernels want them: n rows, then kAhead more that are prefetched.
constexpr int kChunk = 64;

template <int kCapacity = kChunk>
struct Rows {
  const void* pointers[kCapacity + kAhead];
  const void* lowers[kCapacity + kAhead];

  // Rows begin .. begin + n - 1 by their places; what follows is read next: `then(i)` for i = 0, 1, ...
  template <class RowAt, class Then>
  void fill(int begin, int n, const RowAt& row_at, const Then& then) {
    for (int i = 0; i < n; ++i) set(i, row_at(begin + i));
    for (int i = 0; i < kAhead; ++i) set(n + i, then(i));
  }

  // What follows is the same run's continuation up to `end`, then its last row again.
  template <class RowAt>
  void fill(int begin, int n, int end, const RowAt& row_at) {
    fill(begin, n, row_at, [&](int i) { return row_at(begin + n + i < end ? begin + n + i : end - 1); });
  }

  RowPointers all() const { return {pointers, lowers}; }

 private:
  void set(int i, const Place& place) {
    pointers[i] = place.row;
    lowers[i] = place.lower;
  }
};

}  // namespace sirius::cpu
