#include "simt.h"

#include <sys/mman.h>

#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN 1
#else
#define SIMT_ASAN 0
#endif

#if !defined(__x86_64__)
#error "simt switches stacks by x86-64 assembly"
#endif

// Saves the registers that a call must keep, and goes on where another stack was left. (ucontext is ten times slower: it makes a
// system call for the signal mask.)
extern "C" void simt_switch(void** save, void* to);
asm(R"(
.pushsection .text
.type simt_switch,@function
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size simt_switch,.-simt_switch
.popsection
)");

namespace simt {

Context context;

namespace {

constexpr size_t kStack = 256 << 10, kGuard = 4096;
// Stacks begin at different places of their pages, in turn: at the same one what they begin with would share a few lines of L1.
constexpr size_t kShift = 17 * 64, kShifts = 64;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxShared = 227 << 10;  // an H100's

enum class State { ready, at_barrier, in_warp, at_grid, done };

// What a turn looks at comes first, in one line of the cache.
struct alignas(128) Fiber {
  void* stack_pointer;
  void* brought;
  Place place;
  uint3 index;
  State state;
  unsigned mask;
  bool waited;  // for the kernel before
  void* sanitizer_stack;
  char* stack;
};
static_assert(offsetof(Fiber, waited) <= 64);

// A kernel that has begun, and the block of it that runs or waits.
struct Grid {
  std::function<void()> body;
  Context context;
  size_t shared_bytes;
  std::vector<size_t> order;  // of the blocks
  std::unique_ptr<unsigned char, void (*)(void*)> shared{nullptr, std::free};
  bool may_go_on;             // the kernel before has run
  bool early;                 // the next one may begin while it has not
  std::vector<Fiber> fibers;  // of the block
  std::vector<char*> stacks;  // kept for the next block, and the next kernel
  std::vector<int> turns;
  int next, end;                       // of a round, in `turns`: whose turn it is, and where the round ends
  unsigned arrived[kMaxThreads / 32];  // of each warp: the lanes that wait at a warp operation
  std::vector<std::function<void()>> afterwards;
};

Order order_ = Order::forward;
std::mt19937 random_;
std::deque<Grid> grids_;   // those of `begun_`, and others for the next ones
std::deque<Grid*> begun_;  // kernels of which each waits for the one before
Grid elsewhere_;           // of another stream
Grid* running_ = nullptr;
Fiber* current_ = nullptr;
int planning_ = 0;
bool held_ = false;
std::vector<Launch> planned_;
std::deque<std::function<bool()>> queue_;  // of the kernels' stream
void* main_stack_pointer_;
#if SIMT_ASAN
void* main_sanitizer_stack_;
const void* main_stack_;
size_t main_stack_size_;
bool from_main_;
#endif
std::string error_;

// The next thread of the round that can go on, which then is the running one; null if there is none.
Fiber* next_turn() {
  Grid& grid = *running_;
  while (grid.next < grid.end) {
    Fiber& fiber = grid.fibers[grid.turns[grid.next++]];
    if (fiber.state != State::ready) continue;
    current_ = &fiber;
    context.thread = fiber.index;
    return &fiber;
  }
  return nullptr;
}

// A round of some threads: each that can go on does, in turn, until it waits. Whether any could.
bool run_round(int begin, int end) {
  running_->next = begin;
  running_->end = end;
  Fiber* const first = next_turn();
  if (!first) return false;
#if SIMT_ASAN
  from_main_ = true;
  __sanitizer_start_switch_fiber(&main_sanitizer_stack_, first->stack, kStack);
#endif
  simt_switch(&main_stack_pointer_, first->stack_pointer);
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(main_sanitizer_stack_, nullptr, nullptr);
#endif
  return true;
}

// What a thread does first when its turn has come. kept: AddressSanitizer's, of its stack.
[[gnu::noinline]] void begin_turn([[maybe_unused]] void* kept) {
#if SIMT_ASAN
  const void* stack;
  size_t size;
  __sanitizer_finish_switch_fiber(kept, &stack, &size);
  if (std::exchange(from_main_, false)) main_stack_ = stack, main_stack_size_ = size;
#endif
}

// The running thread waits, is done, or has failed: it is the next one's turn. After the last one, or an error, the round is
// over.
void end_turn() {
  Fiber& fiber = *current_;
  Fiber* const next = error_.empty() ? next_turn() : nullptr;
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(fiber.state == State::done ? nullptr : &fiber.sanitizer_stack, next ? next->stack : main_stack_,
                                 next ? kStack : main_stack_size_);
#endif
  simt_switch(&fiber.stack_pointer, next ? next->stack_pointer : main_stack_pointer_);
  begin_turn(fiber.sanitizer_stack);
}

// A function of its own: AddressSanitizer marks the ends of a frame's variables, and those of `entry`, which never returns, would
// stay marked where the next thread's stack begins.
[[gnu::noinline]] void expect_waited() {
  if (!current_->waited) fail("a thread ended that has not waited for the kernel before");
}

void entry() {
  begin_turn(nullptr);
  running_->body();
  expect_waited();
  current_->state = State::done;
  for (;;) end_turn();
}

int index_of(const Fiber& fiber) { return int(&fiber - running_->fibers.data()); }

bool same(const Place& a, const Place& b) { return a.line == b.line && (a.file == b.file || !std::strcmp(a.file, b.file)); }

std::string name_of(const Place& place) {
  return std::string(place.what) + " (" + place.file + ":" + std::to_string(place.line) + ")";
}

void prepare(int index, dim3 block) {
  Fiber& fiber = running_->fibers[index];
  if (index == int(running_->stacks.size())) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuard, PROT_NONE);  // a stack that overflows faults at once
    running_->stacks.push_back(static_cast<char*>(memory));
  }
  fiber.stack = running_->stacks[index];
  fiber.index = {index % block.x, index / block.x % block.y, index / (block.x * block.y)};
  fiber.state = State::ready;
  fiber.waited = false;
  void** top = reinterpret_cast<void**>(fiber.stack + kStack - index % kShifts * kShift);
  *--top = nullptr;  // where `entry` would return to; also aligns the stack as a call does
  *--top = reinterpret_cast<void*>(&entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

// What the threads wait for, when none can go on.
std::string report(const std::string& kind) {
  std::map<std::string, int> places;
  for (const Fiber& fiber : running_->fibers) {
    if (fiber.state == State::done) ++places["the end"];
    if (fiber.state == State::at_barrier || fiber.state == State::in_warp) ++places[name_of(fiber.place)];
  }
  std::string text = kind + " in block (" + std::to_string(context.block.x) + ", " + std::to_string(context.block.y) + ", " +
                     std::to_string(context.block.z) + "):";
  for (const auto& [place, count] : places) text += " " + std::to_string(count) + " threads at " + place + ";";
  return text;
}

// Runs the threads of the block as far as they can. Whether all are done: if not, some wait for the kernel before.
bool run_threads() {
  Grid& grid = *running_;
  const int threads = int(grid.fibers.size());
  context = grid.context;
  // In forward and reverse order a warp runs as far as it can before the next one does; in random order all stay close together.
  const int group = order_ == Order::random ? threads : 32;
  for (;;) {
    bool moved = false;
    for (int begin = 0; begin < threads; begin += group) {
      while (run_round(begin, std::min(begin + group, threads))) {
        moved = true;
        if (!error_.empty()) return true;
      }
    }
    const auto all = [&](auto is) { return std::all_of(grid.fibers.begin(), grid.fibers.end(), is); };
    if (all([](const Fiber& fiber) { return fiber.state == State::done; })) return true;
    if (moved) continue;
    if (!all([](const Fiber& fiber) { return fiber.state != State::at_grid; })) return false;
    const Fiber& first = grid.fibers[0];
    if (!all([&](const Fiber& fiber) { return fiber.state == State::at_barrier && same(fiber.place, first.place); })) {
      error_ = report("threads wait for each other");
      return true;
    }
    for (Fiber& fiber : grid.fibers) fiber.state = State::ready;
  }
}

// Whether its threads are done.
bool begin_block(size_t number) {
  Grid& grid = *running_;
  const dim3 size = grid.context.grid_size;
  grid.context.block = {unsigned(number % size.x), unsigned(number / size.x % size.y),
                        unsigned(number / (size_t(size.x) * size.y))};
  if (order_ == Order::random) std::shuffle(grid.turns.begin(), grid.turns.end(), random_);
  std::memset(grid.shared.get(), 0xff, grid.shared_bytes);  // NaN in every element type
  for (int i = 0; i < int(grid.fibers.size()); ++i) prepare(i, grid.context.block_size);
  std::fill(std::begin(grid.arrived), std::end(grid.arrived), 0u);
  return run_threads();
}

void throw_error() {
  begun_.clear();
  throw std::runtime_error(std::exchange(error_, ""));
}

// Runs the first kernel that has begun to its end. Whether there is one.
bool finish_kernel() {
  if (begun_.empty()) return false;
  running_ = begun_.front();
  running_->may_go_on = true;
  for (Fiber& fiber : running_->fibers)
    if (fiber.state == State::at_grid) fiber.state = State::ready;
  run_threads();
  for (size_t i = 1; error_.empty() && i < running_->order.size(); ++i) begin_block(running_->order[i]);
  if (!error_.empty()) throw_error();
  const auto afterwards = std::exchange(running_->afterwards, {});
  begun_.pop_front();
  for (const auto& then : afterwards) then();
  return true;
}

void set_up(Grid& next, dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body) {
  const size_t threads = size_t(block.x) * block.y * block.z, blocks = size_t(grid.x) * grid.y * grid.z;
  next.body = std::move(body);
  next.context = {{}, {}, block, grid, nullptr};
  next.shared_bytes = shared_bytes;
  // A buffer of exactly the launched size, so that AddressSanitizer sees what is beyond it.
  next.shared.reset(static_cast<unsigned char*>(std::aligned_alloc(16, (shared_bytes + 15) / 16 * 16)));
  next.context.shared = next.shared.get();
  next.may_go_on = next.early = false;
  next.afterwards.clear();
  next.fibers.resize(threads);
  next.turns.resize(threads);
  std::iota(next.turns.begin(), next.turns.end(), 0);
  if (order_ == Order::reverse) std::reverse(next.turns.begin(), next.turns.end());
  next.order.resize(blocks);
  std::iota(next.order.begin(), next.order.end(), 0);
  if (order_ == Order::reverse) std::reverse(next.order.begin(), next.order.end());
  if (order_ == Order::random) std::shuffle(next.order.begin(), next.order.end(), random_);
  error_.clear();
}

// Beside kernels that have not ended: as many as a GPU might have.
void begin(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body) {
  const auto idle = [](const Grid& each) { return std::find(begun_.begin(), begun_.end(), &each) == begun_.end(); };
  const auto found = std::find_if(grids_.begin(), grids_.end(), idle);
  Grid& next = found == grids_.end() ? grids_.emplace_back() : *found;
  set_up(next, grid, block, shared_bytes, std::move(body));
  running_ = &next;
  begin_block(next.order[0]);
  if (!error_.empty()) throw_error();
  while (!next.early && finish_kernel()) continue;  // all blocks have waited when another kernel begins
  begun_.push_back(&next);
}

// On another stream, in one go.
void run_whole(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body) {
  set_up(elsewhere_, grid, block, shared_bytes, std::move(body));
  elsewhere_.may_go_on = true;
  running_ = &elsewhere_;
  for (const size_t number : elsewhere_.order) {
    begin_block(number);
    if (!error_.empty()) throw_error();
  }
}

}  // namespace

void set_order(Order order) {
  order_ = order;
  random_.seed(1);
}

unsigned lane() { return unsigned(index_of(*current_)) % 32; }

void fail(const std::string& message) {
  error_ = message;
  current_->state = State::done;
  for (;;) end_turn();
}

void block_barrier(Place place) {
  current_->place = place;
  current_->state = State::at_barrier;
  end_turn();
}

namespace {

// Apart from those who come before the last one, for whom a small frame is a line of the cache less.
[[gnu::noinline]] void complete_for_all(Fiber* warp, unsigned mask, void (*complete)(void* const* lanes, unsigned mask)) {
  void* lanes[32]{};
  for (unsigned rest = mask; rest; rest &= rest - 1) lanes[__builtin_ctz(rest)] = warp[__builtin_ctz(rest)].brought;
  complete(lanes, mask);
  for (unsigned rest = mask; rest; rest &= rest - 1) warp[__builtin_ctz(rest)].state = State::ready;
}

[[gnu::noinline]] void fail_to_meet(const Place& place, const Place& other) {
  fail("lanes of a warp meet at " + name_of(place) + " and " + name_of(other));
}

[[gnu::noinline]] void fail_at(const char* what, const Place& place) { fail(what + name_of(place)); }

}  // namespace

void warp_collective(unsigned mask, void* mine, void (*complete)(void* const* lanes, unsigned mask), Place place) {
  Fiber& fiber = *current_;
  fiber.place = place;
  fiber.mask = mask;
  fiber.brought = mine;
  fiber.state = State::in_warp;
  const unsigned own = 1u << lane();
  if (!(mask & own)) fail_at("a lane outside the mask of ", place);
  const int first = index_of(fiber) / 32 * 32, lanes = int(running_->fibers.size()) - first;
  if (lanes < 32 && mask >> lanes) fail_at("a mask beyond the block at ", place);
  Fiber* const warp = &running_->fibers[first];
  unsigned& arrived = running_->arrived[first / 32];
  if (const unsigned before = arrived & mask) {
    const Fiber& other = warp[__builtin_ctz(before)];
    if (other.mask != mask || !same(other.place, place)) fail_to_meet(place, other.place);
  }
  arrived |= own;
  if ((arrived & mask) != mask) return end_turn();
  arrived &= ~mask;
  complete_for_all(warp, mask, complete);
}

void wait_for_grid_before(bool early) {
  current_->waited = true;
  running_->early |= early;
  if (running_->may_go_on) return;
  current_->state = State::at_grid;
  end_turn();
}

void finish() {
  try {
    while (!queue_.empty()) {
      if (order_ == Order::forward)
        while (run_elsewhere()) continue;
      else if (order_ == Order::random && waits_elsewhere() && random_() % 2)
        run_elsewhere();
      if (queue_.front()()) {
        queue_.pop_front();
      } else if (!run_elsewhere() && !finish_kernel()) {
        error_ = "a stream waits for an event that nothing brings about";
        throw_error();
      }
    }
    while (finish_kernel()) continue;
  } catch (...) {
    queue_.clear();
    throw;
  }
  if (order_ == Order::forward)
    while (run_elsewhere()) continue;
}

void enqueue(std::function<bool()> command) { queue_.push_back(std::move(command)); }

void after_kernel(std::function<void()> then) {
  if (!begun_.empty())
    begun_.back()->afterwards.push_back(std::move(then));
  else
    then();
}

void launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body, Stream* stream) {
  const size_t threads = size_t(block.x) * block.y * block.z, blocks = size_t(grid.x) * grid.y * grid.z;
  if (threads < 1 || threads > kMaxThreads || blocks < 1 || grid.y > 65535 || grid.z > 65535 || shared_bytes > kMaxShared)
    throw std::runtime_error("launch: no GPU takes a grid of " + std::to_string(blocks) + " blocks, " + std::to_string(threads) +
                             " threads and " + std::to_string(shared_bytes) + " bytes of shared memory");
  if (planning_ > 0) {
    const std::string text = kernel, before = "Kernel = ";
    const size_t begin = text.find(before) + before.size();
    planned_.push_back({text.substr(begin, text.find(';', begin) - begin), grid, block, shared_bytes});
    return;
  }
  enqueue(stream, [=, body = std::move(body)] {
    (stream ? run_whole : begin)(grid, block, shared_bytes, body);
    return true;
  });
}

void set_held(bool held) {
  held_ = held;
  if (!held) finish();
}

bool held() { return held_; }

void set_planning(int multiprocessors) {
  planning_ = multiprocessors;
  planned_.clear();
}

int multiprocessors() { return planning_ > 0 ? planning_ : 3; }

std::vector<Launch> planned() { return planned_; }

}  // namespace simt
