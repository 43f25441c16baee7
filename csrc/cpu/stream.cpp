#include "stream.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>

#include "checks.h"

namespace sirius::cpu {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kPage = Stream::kPage;
constexpr int64_t kPiece = 512 << 10;  // bytes that are read at a time: larger ones were no faster (measured)
// Between two neurons that are wanted, so many bytes are rather read too than left out: another request takes as long (measured).
constexpr int64_t kGap = 16 << 10;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::string said(int error) { return std::strerror(error); }

int64_t page_below(int64_t at) { return at / kPage * kPage; }
int64_t page_above(int64_t at) { return page_below(at + kPage - 1); }

// Memory of its own, or addresses for what is mapped into it later.
class Region {
 public:
  Region() = default;
  explicit Region(int64_t nbytes, int protection = PROT_READ | PROT_WRITE) : nbytes_(nbytes) {
    if (nbytes == 0) return;
    const int reserve = protection == PROT_NONE ? MAP_NORESERVE : 0;
    void* const at = mmap(nullptr, nbytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | reserve, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<char*>(at);
  }
  Region(Region&& other) noexcept : data_(std::exchange(other.data_, nullptr)), nbytes_(other.nbytes_) {}
  Region& operator=(Region&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(nbytes_, other.nbytes_);
    return *this;
  }
  ~Region() {
    if (data_) munmap(data_, nbytes_);
  }

  char* data() const { return data_; }

  // Memory from `at` on, for good.
  void commit(int64_t at, int64_t nbytes) { map(at, nbytes, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); }
  // The file's pages from `at` on, shared with all that map them.
  void share(int64_t at, int64_t nbytes, int file, int64_t from) { map(at, nbytes, MAP_SHARED, file, from); }

 private:
  void map(int64_t at, int64_t nbytes, int flags, int file, int64_t from) {
    if (nbytes == 0) return;
    if (mmap(data_ + at, nbytes, PROT_READ | PROT_WRITE, flags | MAP_FIXED, file, from) == MAP_FAILED) throw std::bad_alloc();
  }

  char* data_ = nullptr;
  int64_t nbytes_ = 0;
};

class File {
 public:
  explicit File(int number) : number_(number) {}
  File(File&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
  ~File() {
    if (number_ >= 0) close(number_);
  }
  int number() const { return number_; }

 private:
  int number_;
};

// Past the page cache, where the file system has that: the file is larger than the memory.
File open_file(const std::string& path) {
  int number = open(path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC);
  if (number < 0 && errno == EINVAL) number = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (number < 0) throw StreamError(path + ": " + said(errno));
  return File(number);
}

File anonymous_file(int64_t nbytes) {
  File file(memfd_create("sirius_ext", MFD_CLOEXEC));
  if (file.number() < 0 || ftruncate(file.number(), nbytes) != 0) throw std::bad_alloc();
  return file;
}

}  // namespace

struct Stream::State {
  // What a reader does: bundles [first, first + count) of a layer's image come to their own places, or those of them that have a
  // slot to it; or they come from slots.
  struct Task {
    enum Kind { to_image, to_slots, from_slots } kind;
    int layer, image, first, count;
  };
  struct Buffer {
    int layer = -1;
    int left = 0;  // tasks
    bool ready = false;
    std::string error;
  };
  struct Slots {
    Region memory;
    std::vector<int32_t> of_neuron, neuron;  // -1: none
    std::vector<const char*> places;
    int next = 0;  // where the search for one to empty goes on
  };

  explicit State(StreamOptions given)
      : options(std::move(given)),
        file(open_file(options.path)),
        ring(make_ring()),
        arena(total_bytes(), PROT_NONE),
        buffers(options.buffers) {
    stamps.resize(options.rows);
    int64_t at = 0, checks = 0;
    for (int layer = 0; layer < num_layers(); ++layer) map_layer(layer, &at, &checks);
  }

  int num_layers() const { return int(options.layers.size()); }
  Buffer& buffer(int layer) { return buffers[layer % options.buffers]; }
  const StreamImage& image(int layer, int number) const { return options.layers[layer][number]; }

  static int64_t resident_bytes(const StreamImage& image) {
    return image.resident == image.rows ? image.nbytes : image.resident * image.bundle;
  }

  int64_t total_bytes() const {
    int64_t total = 0;
    for (const auto& images : options.layers)
      for (const StreamImage& image : images) total += image.nbytes;
    return total;
  }

  File make_ring() {
    for (const auto& images : options.layers) {
      int64_t tail = 0;
      for (const StreamImage& image : images) tail += image.nbytes - resident_bytes(image);
      buffer_bytes = std::max(buffer_bytes, tail);
    }
    return anonymous_file(buffer_bytes * options.buffers);
  }

  // at, checks: where its images begin in the arena, and their sums among all; moved on.
  void map_layer(int layer, int64_t* at, int64_t* checks) {
    const std::vector<StreamImage>& images = options.layers[layer];
    int64_t in_ring = int64_t(layer) % options.buffers * buffer_bytes;
    auto& places_of_images = images_at.emplace_back();
    auto& checks_of_images = checks_at.emplace_back();
    for (const StreamImage& image : images) {
      const int64_t resident = resident_bytes(image);
      arena.commit(*at, resident);
      arena.share(*at + resident, image.nbytes - resident, ring.number(), in_ring);
      in_ring += image.nbytes - resident;
      places_of_images.push_back(arena.data() + *at);
      checks_of_images.push_back(*checks);
      *at += image.nbytes;
      *checks += image.rows;
    }
    const StreamImage& first = images[0];
    if (first.rows != options.rows) return;  // not of neurons
    Slots own{Region(options.slots * first.bundle)};
    own.of_neuron.assign(options.rows, -1);
    own.neuron.assign(options.slots, -1);
    own.places.assign(options.rows, nullptr);
    for (int i = 0; i < first.resident; ++i) own.places[i] = places_of_images[0] + i * first.bundle;
    slots.push_back(std::move(own));
  }

  // ------------------------------------------------------------------------------------------------------------ reading

  // Bytes [at, at + nbytes) of the file, both multiples of a page.
  void read_pages(int64_t at, int64_t nbytes, char* to) {
    int64_t got = 0;
    for (int in_vain = 0; got < nbytes;) {
      const ssize_t n = pread(file.number(), to + got, nbytes - got, at + got);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) throw StreamError(options.path + ": reading at byte " + std::to_string(at + got) + ": " + said(errno));
      if (n == 0) throw StreamError(options.path + ": it ends at byte " + std::to_string(at + got) + ": it was cut off");
      const int64_t whole = page_below(got + n);  // after less than was asked for, whole pages are read on
      if (whole == got && ++in_vain > kMostInVain)
        throw StreamError(options.path + ": reading at byte " + std::to_string(at + got) + " does not get on");
      progress.fetch_add(whole - got, std::memory_order_relaxed);
      got = whole;
    }
  }

  void check(int layer, int number, int first, int count, const char* bundles) const {
    const int64_t size = image(layer, number).bundle;
    uint32_t sums[64];
    const uint32_t* wanted = options.checks.data() + checks_at[layer][number] + first;
    for (int i = 0; i < count; i += 64) {
      const int n = std::min(64, count - i);
      checksums(bundles + i * size, size, n, sums);
      for (int j = 0; j < n; ++j)
        if (sums[j] != wanted[i + j])
          throw StreamError(options.path + ": bundle " + std::to_string(first + i + j) + " of layer " + std::to_string(layer) +
                            " is not what was written: the file was changed, or the disk is failing; prepare it again");
    }
  }

  void run(const Task& task) {
    const StreamImage& from = image(task.layer, task.image);
    char* const base = images_at[task.layer][task.image];
    const int64_t begin = task.first * from.bundle, end = begin + task.count * from.bundle;
    if (task.kind == Task::from_slots) {
      const Slots& own = slots[task.layer];
      for (int i = task.first; i < task.first + task.count; ++i) std::memcpy(base + i * from.bundle, own.places[i], from.bundle);
      return;
    }
    // What is read beside the bundles, up to whole pages, is what is there in any case.
    const int64_t first = page_below(begin), last = page_above(end);
    if (task.kind == Task::to_image) {
      read_pages(from.at + first, last - first, base + first);
      check(task.layer, task.image, task.first, task.count, base + begin);
      return;
    }
    thread_local Region bounce;
    thread_local int64_t size = 0;
    if (size < last - first) {
      bounce = Region(last - first);
      size = last - first;
    }
    Slots& own = slots[task.layer];
    read_pages(from.at + first, last - first, bounce.data());
    for (int i = task.first; i < task.first + task.count; ++i) {
      const char* bundle = bounce.data() + (i * from.bundle - first);
      const int slot = own.of_neuron[i];
      if (slot < 0 || own.places[i]) continue;  // it was read for its neighbours' sake
      check(task.layer, task.image, i, 1, bundle);
      std::memcpy(own.memory.data() + slot * from.bundle, bundle, from.bundle);
    }
  }

  static void work(const std::shared_ptr<State>& state) {
    State& s = *state;
    std::unique_lock lock(s.mutex);
    for (;;) {
      s.wake_reader.wait(lock, [&] { return s.stopping || !s.tasks.empty(); });
      if (s.stopping) break;
      const Task task = s.tasks.front();
      s.tasks.pop_front();
      if (s.running++ == 0) s.busy_since = Clock::now();
      lock.unlock();
      std::string error;
      try {
        s.run(task);
      } catch (const std::exception& problem) {
        error = problem.what();
      }
      lock.lock();
      if (--s.running == 0) s.statistics.busy += seconds_since(s.busy_since);
      s.finish(task, error);
      s.wake_waiter.notify_all();
    }
    --s.alive;
    s.wake_waiter.notify_all();
  }

  void finish(const Task& task, const std::string& error) {
    const int64_t nbytes = task.count * image(task.layer, task.image).bundle;
    if (task.kind != Task::from_slots) statistics.bytes += nbytes;
    if (task.kind == Task::to_slots) {
      statistics.fetched += nbytes;
      --fetching;
      if (fetch_error.empty()) fetch_error = error;
      return;
    }
    Buffer& to = buffer(task.layer);
    if (to.error.empty()) to.error = error;
    to.ready = --to.left == 0 && to.error.empty();
  }

  // --------------------------------------------------------------------------------------------- with the mutex held

  void queue(Task task, int end) {
    const int step = std::max<int64_t>(1, kPiece / image(task.layer, task.image).bundle);
    for (; task.first < end; task.first += step) {
      task.count = std::min(step, end - task.first);
      tasks.push_back(task);
      if (task.kind == Task::to_slots)
        ++fetching;
      else
        ++buffer(task.layer).left;
    }
    wake_reader.notify_all();
  }

  // Runs of bundles from `begin` to the end of which `wanted(i)` are to be read: use(first, last) gets each, with small gaps.
  template <class Wanted, class Use>
  void runs(int64_t bundle, int begin, const Wanted& wanted, const Use& use) const {
    const int gap = int(kGap / bundle);
    for (int i = begin; i < options.rows;) {
      if (!wanted(i)) {
        ++i;
        continue;
      }
      int end = i + 1, next = end;
      for (; next < options.rows && next - end <= gap; ++next)
        if (wanted(next)) end = next + 1;
      use(i, end);
      i = end;
    }
  }

  void start(int layer) {
    Buffer& to = buffer(layer);
    to = {layer};
    for (int number = 0; number < int(options.layers[layer].size()); ++number) {
      const StreamImage& from = image(layer, number);
      if (number > 0 || options.slots == 0 || layer >= int(slots.size())) {
        queue({Task::to_image, layer, number, from.resident}, from.rows);
        continue;
      }
      const std::vector<const char*>& places = slots[layer].places;
      int done = from.resident;
      const auto copy = [&](int end) { queue({Task::from_slots, layer, number, done}, end); };
      runs(
          from.bundle, done, [&](int i) { return !places[i]; },
          [&](int first, int last) {
            copy(first);
            queue({Task::to_image, layer, number, first}, last);
            done = last;
          });
      copy(options.rows);
    }
    to.ready = to.left == 0;
  }

  bool is_loading(const Buffer& each) const { return each.left > 0; }

  // Begins with the layers that come after `layer`, as many as there are buffers for.
  void read_on(int layer) {
    const auto after = [&](int ahead) { return (layer + ahead) % num_layers(); };
    for (int ahead = 1; ahead <= options.buffers; ++ahead) {
      const int next = after(ahead);
      Buffer& to = buffer(next);
      // The buffer may be that of a layer which is read before.
      for (int before = current == layer ? 0 : 1; before < ahead; ++before)
        if (&buffer(after(before)) == &to) return;
      if (to.layer == next && (to.ready || is_loading(to))) continue;
      if (is_loading(to)) return;
      start(next);
    }
  }

  // Until `over()`. StreamError if nothing arrives for too long.
  template <class Over>
  void wait(std::unique_lock<std::mutex>& lock, const Over& over) {
    const Clock::time_point begun = Clock::now();
    int64_t seen = progress.load(std::memory_order_relaxed);
    Clock::time_point moved = begun;
    while (!over()) {
      wake_waiter.wait_for(lock, std::chrono::milliseconds(100));
      if (const int64_t now = progress.load(std::memory_order_relaxed); now != seen) {
        seen = now;
        moved = Clock::now();
      }
      if (!over() && seconds_since(moved) > options.patience) {
        statistics.waited += seconds_since(begun);
        throw StreamError(options.path + ": the disk has not given anything for " + std::to_string(int(options.patience)) +
                          " seconds");
      }
    }
    statistics.waited += seconds_since(begun);
  }

  // A slot of a layer whose neuron is none of those with the newest stamp. There must be one.
  int free_slot(Slots& own) const {
    for (size_t tried = 0; tried < own.neuron.size(); ++tried) {
      const int slot = own.next;
      own.next = (own.next + 1) % int(own.neuron.size());
      const int neuron = own.neuron[slot];
      if (neuron >= 0 && stamps[neuron] == stamp) continue;
      if (neuron >= 0) own.of_neuron[neuron] = -1, own.places[neuron] = nullptr;
      return slot;
    }
    return -1;
  }

  void stamp_all(const int32_t* neurons, int count) {
    ++stamp;
    for (int i = 0; i < count; ++i) stamps[neurons[i]] = stamp;
  }

  void hold_layer(std::unique_lock<std::mutex>& lock, int layer, const int32_t* neurons, int count) {
    Slots& own = slots[layer];
    const auto missing = [&](int i) { return !own.places[i]; };
    if (std::none_of(neurons, neurons + count, missing)) return;
    wait(lock, [&] { return buffer(layer).layer != layer || !is_loading(buffer(layer)); });  // it may copy from slots
    stamp_all(neurons, count);
    for (int i = 0; i < count; ++i) {
      if (!missing(neurons[i])) continue;
      const int slot = free_slot(own);
      if (slot < 0) throw StreamError("a sparse model's set has more neurons than there is room for");
      own.neuron[slot] = neurons[i];
      own.of_neuron[neurons[i]] = slot;
    }
    runs(
        image(layer, 0).bundle, image(layer, 0).resident, [&](int i) { return own.of_neuron[i] >= 0 && missing(i); },
        [&](int first, int last) { queue({Task::to_slots, layer, 0, first}, last); });
  }

  // After the reads of `hold`: what has arrived is found from now on, what has not is nowhere.
  void settle(bool arrived) {
    for (int layer = 0; layer < int(slots.size()); ++layer) {
      Slots& own = slots[layer];
      for (size_t slot = 0; slot < own.neuron.size(); ++slot) {
        const int neuron = own.neuron[slot];
        if (neuron < 0 || own.places[neuron]) continue;
        if (arrived) {
          own.places[neuron] = own.memory.data() + slot * image(layer, 0).bundle;
        } else {
          own.of_neuron[neuron] = -1;
          own.neuron[slot] = -1;
        }
      }
    }
  }

  static constexpr int kMostInVain = 1000;

  const StreamOptions options;
  const File file;
  int64_t buffer_bytes = 0;
  const File ring;
  Region arena;
  std::vector<std::vector<char*>> images_at;
  std::vector<std::vector<int64_t>> checks_at;  // of each image, its first sum's number among all
  std::vector<Slots> slots;                     // of the layers that have neurons

  mutable std::mutex mutex;
  std::condition_variable wake_reader, wake_waiter;
  std::deque<Task> tasks;
  std::vector<Buffer> buffers;
  int current = -1;  // the layer that is read right now
  int running = 0, fetching = 0, alive = 0;
  bool stopping = false;
  std::string fetch_error;
  std::vector<int64_t> stamps;
  int64_t stamp = 0;
  std::atomic<int64_t> progress{0};
  StreamStatistics statistics;
  Clock::time_point busy_since;
};

Stream::Stream(StreamOptions options) : state_(std::make_shared<State>(std::move(options))) {
  state_->alive = state_->options.readers;
  for (int i = 0; i < state_->options.readers; ++i) std::thread(State::work, state_).detach();
}

Stream::~Stream() {
  std::unique_lock lock(state_->mutex);
  state_->stopping = true;
  state_->wake_reader.notify_all();
  // A disk that does not answer must not keep the process.
  state_->wake_waiter.wait_for(lock, std::chrono::seconds(2), [&] { return state_->alive == 0; });
}

void Stream::fill(int layer) {
  State& s = *state_;
  for (int number = 0; number < int(s.options.layers[layer].size()); ++number) {
    const StreamImage& image = s.image(layer, number);
    const int64_t end = State::resident_bytes(image);
    for (int64_t at = 0; at < end; at += kPiece)
      s.read_pages(image.at + at, std::min(kPiece, end - at), s.images_at[layer][number] + at);
    s.check(layer, number, 0, image.resident, s.images_at[layer][number]);
  }
}

char* Stream::image(int layer, int number) const { return state_->images_at[layer][number]; }

const char* const* Stream::places(int layer) const { return state_->slots[layer].places.data(); }

void Stream::need(int layer) {
  State& s = *state_;
  std::unique_lock lock(s.mutex);
  s.current = layer;
  State::Buffer& own = s.buffer(layer);
  const auto arrive = [&] { s.wait(lock, [&] { return !s.is_loading(own); }); };
  const bool ahead = own.layer == layer && (own.ready || s.is_loading(own));  // an earlier call began to read it
  if (!ahead) {
    arrive();
    s.start(layer);
  }
  s.read_on(layer);
  arrive();
  if (ahead && !own.error.empty()) {  // what failed then need not fail now
    s.start(layer);
    arrive();
  }
  if (!own.error.empty()) {
    const std::string error = std::exchange(own.error, {});
    own = {};
    throw StreamError(error);
  }
}

void Stream::done(int layer) {
  State& s = *state_;
  std::unique_lock lock(s.mutex);
  if (s.current == layer) s.current = -1;
  s.read_on(layer);
}

void Stream::hold(const int32_t* neurons, int count) {
  State& s = *state_;
  std::unique_lock lock(s.mutex);
  s.wait(lock, [&] { return s.fetching == 0; });  // of a call that gave up
  s.settle(false);
  s.fetch_error.clear();
  try {
    for (int layer = 0; layer < int(s.slots.size()); ++layer) s.hold_layer(lock, layer, neurons + size_t(layer) * count, count);
    if (s.fetching == 0) return;
    s.wait(lock, [&] { return s.fetching == 0; });
  } catch (const StreamError&) {
    if (s.fetching == 0) s.settle(false);
    throw;
  }
  s.settle(s.fetch_error.empty());
  if (!s.fetch_error.empty()) throw StreamError(s.fetch_error);
}

void Stream::keep(int layer, const int32_t* neurons, int count) {
  State& s = *state_;
  const std::unique_lock lock(s.mutex);
  if (s.fetching > 0) return;  // for a call of `hold` that gave up: readers may write to any slot that is not found yet
  State::Slots& own = s.slots[layer];
  const StreamImage& image = s.image(layer, 0);
  s.stamp_all(neurons, count);
  for (int i = 0; i < count; ++i) {
    const int neuron = neurons[i];
    if (own.places[neuron]) continue;
    const int slot = s.free_slot(own);
    if (slot < 0) return;
    char* const to = own.memory.data() + slot * image.bundle;
    std::memcpy(to, s.images_at[layer][0] + neuron * image.bundle, image.bundle);
    own.neuron[slot] = neuron;
    own.of_neuron[neuron] = slot;
    own.places[neuron] = to;
  }
}

int Stream::slots() const { return state_->options.slots; }

int Stream::num_layers() const { return state_->num_layers(); }

StreamStatistics Stream::statistics() const {
  const std::unique_lock lock(state_->mutex);
  StreamStatistics now = state_->statistics;
  if (state_->running > 0) now.busy += seconds_since(state_->busy_since);
  return now;
}

}  // namespace sirius::cpu
