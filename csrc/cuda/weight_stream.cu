#include <algorithm>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "weight_stream.h"

#if defined(__CUDACC__)
#include <cuda.h>
#include <cuda_runtime.h>
#else
#include "../simt/runtime.h"
#endif

namespace sirius::cuda {
namespace {

struct NoMemory : std::bad_alloc {
  explicit NoMemory(const char* whose) : whose(whose) {}
  const char* what() const noexcept override { return whose; }
  const char* whose;
};

void check(cudaError_t error, const char* what) {
  if (error == cudaErrorMemoryAllocation) throw NoMemory("out of host memory that can be pinned");
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

void check(CUresult error, const char* what) {
  if (error == CUDA_ERROR_OUT_OF_MEMORY) throw NoMemory("out of the device's memory, for weights");
  if (error != CUDA_SUCCESS) throw std::runtime_error(std::string(what) + ": error " + std::to_string(int(error)));
}

// A function of the driver, which the runtime finds: whoever links the driver needs one to be there.
template <class Function>
Function* of_driver([[maybe_unused]] const char* name, Function* function) {
#if defined(__CUDACC__)
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result), name);
#else
  check(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result), name);
#endif
  if (!found || result != cudaDriverEntryPointSuccess) throw std::runtime_error(std::string(name) + ": the driver has none");
  return reinterpret_cast<decltype(function)>(found);
#else
  return function;
#endif
}
#if defined(__CUDACC__)
#define DRIVER(name) of_driver(#name, static_cast<decltype(&name)>(nullptr))
#else
#define DRIVER(name) of_driver(#name, &name)
#endif

// Memory that can be mapped at several addresses.
struct Memory {
  decltype(&cuMemGetAllocationGranularity) get_granularity = DRIVER(cuMemGetAllocationGranularity);
  decltype(&cuMemAddressReserve) reserve = DRIVER(cuMemAddressReserve);
  decltype(&cuMemAddressFree) free = DRIVER(cuMemAddressFree);
  decltype(&cuMemCreate) create = DRIVER(cuMemCreate);
  decltype(&cuMemRelease) release = DRIVER(cuMemRelease);
  decltype(&cuMemMap) map = DRIVER(cuMemMap);
  decltype(&cuMemUnmap) unmap = DRIVER(cuMemUnmap);
  decltype(&cuMemSetAccess) set_access = DRIVER(cuMemSetAccess);
  CUmemAllocationProp prop{};

  Memory() {
    prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    check(cudaGetDevice(&prop.location.id), "cudaGetDevice");
  }

  size_t granularity() const {
    size_t found = 0;
    check(get_granularity(&found, &prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM), "cuMemGetAllocationGranularity");
    return found;
  }
};

// Some physical memory, which lasts as long as this or as a mapping of it. It is mapped as a whole: of a part the driver says
// that it is not supported (CUDA 13 on an H100).
class Piece {
 public:
  Piece(const Memory& memory, size_t nbytes) : memory_(&memory), nbytes_(nbytes) {
    if (nbytes) check(memory.create(&handle_, nbytes, &memory.prop, 0), "cuMemCreate");
  }
  Piece(Piece&& other) noexcept : memory_(other.memory_), nbytes_(std::exchange(other.nbytes_, 0)), handle_(other.handle_) {}
  ~Piece() {
    if (nbytes_) memory_->release(handle_);
  }
  CUmemGenericAllocationHandle handle() const { return handle_; }
  size_t nbytes() const { return nbytes_; }

 private:
  const Memory* memory_;
  size_t nbytes_;
  CUmemGenericAllocationHandle handle_{};
};

// Addresses, of which stretches get memory one after the other.
class Addresses {
 public:
  Addresses(const Memory& memory, size_t nbytes) : memory_(&memory), nbytes_(nbytes) {
    check(memory.reserve(&at_, nbytes, 0, 0, 0), "cuMemAddressReserve");
  }
  Addresses(Addresses&& other) noexcept
      : memory_(other.memory_),
        nbytes_(std::exchange(other.nbytes_, 0)),
        used_(std::exchange(other.used_, 0)),
        mapped_(std::exchange(other.mapped_, {})),
        at_(other.at_) {}
  // What was mapped by itself is unmapped by itself.
  ~Addresses() {
    CUdeviceptr at = at_;
    for (const size_t nbytes : mapped_) {
      memory_->unmap(at, nbytes);
      at += nbytes;
    }
    if (nbytes_) memory_->free(at_, nbytes_);
  }

  void append(const Piece& piece) { append(&piece, 1); }
  void append(const Piece* pieces, size_t count) {
    const size_t before = used_;
    for (size_t i = 0; i < count; ++i) {
      if (pieces[i].nbytes() == 0) continue;
      check(memory_->map(at_ + used_, pieces[i].nbytes(), 0, pieces[i].handle(), 0), "cuMemMap");
      mapped_.push_back(pieces[i].nbytes());
      used_ += pieces[i].nbytes();
    }
    if (used_ == before) return;
    CUmemAccessDesc access{};
    access.location = memory_->prop.location;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    check(memory_->set_access(at_ + before, used_ - before, &access, 1), "cuMemSetAccess");
  }

  // Where the next stretch begins.
  char* end() const { return reinterpret_cast<char*>(at_ + used_); }

 private:
  const Memory* memory_;
  size_t nbytes_, used_ = 0;
  std::vector<size_t> mapped_;  // bytes of each mapping, in order
  CUdeviceptr at_{};
};

class Event {
 public:
  Event() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreate"); }
  Event(const Event&) = delete;
  ~Event() { cudaEventDestroy(event_); }
  void record(cudaStream_t stream) { check(cudaEventRecord(event_, stream), "cudaEventRecord"); }
  // What comes after this on the stream comes after what was recorded last.
  void precede(cudaStream_t stream) { check(cudaStreamWaitEvent(stream, event_, 0), "cudaStreamWaitEvent"); }

 private:
  cudaEvent_t event_{};
};

// Destroyed after what is on it.
struct CopyStream {
  cudaStream_t handle{};
  CopyStream() { check(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking), "cudaStreamCreate"); }
  CopyStream(const CopyStream&) = delete;
  ~CopyStream() { cudaStreamDestroy(handle); }
};

// Around calls that a capture of this thread would refuse, of something that is no part of it: caches come and go at any moment.
class OutsideOfCaptures {
#if defined(__CUDACC__)
 public:
  OutsideOfCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  OutsideOfCaptures(const OutsideOfCaptures&) = delete;
  ~OutsideOfCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
#endif
};

char* pinned(int64_t nbytes) {
  [[maybe_unused]] const OutsideOfCaptures outside;
  void* memory = nullptr;
  if (nbytes) check(cudaHostAlloc(&memory, size_t(nbytes), cudaHostAllocDefault), "cudaHostAlloc");
  return static_cast<char*>(memory);
}

}  // namespace

PinnedMemory::PinnedMemory(int64_t nbytes) : data_(pinned(nbytes)) {}
PinnedMemory::~PinnedMemory() {
  [[maybe_unused]] const OutsideOfCaptures outside;
  cudaFreeHost(data_);
}

void to_host(const void* from, void* to, size_t nbytes, StreamHandle stream) {
  check(cudaMemcpyAsync(to, from, nbytes, cudaMemcpyDeviceToHost, static_cast<cudaStream_t>(stream)), "cudaMemcpyAsync");
}

struct WeightStream::State {
  struct Buffer {
    Event arrived, free;
  };
  struct Image {
    char* data;
    std::unique_ptr<PinnedMemory> host;
    char* slots;
  };

  State(std::vector<std::vector<StreamedImage>> layers, int buffers) : sizes(std::move(layers)), buffers(buffers) {
    const int64_t grain = int64_t(memory.granularity());
    const auto whole = [&](int64_t nbytes) { return size_t((nbytes + grain - 1) / grain * grain); };
    // Each ring has memory for the longest of the tails, in pieces of which each tail maps as many as it needs.
    std::vector<size_t> longest(sizes.at(0).size());
    for (const auto& layer : sizes)
      for (size_t number = 0; number < longest.size(); ++number) {
        const StreamedImage& image = layer.at(number);
        if (image.resident < image.nbytes && image.resident % grain)
          throw std::invalid_argument("WeightStream: expected resident bytes in multiples of " + std::to_string(grain) +
                                      ", got " + std::to_string(image.resident));
        longest[number] = std::max(longest[number], whole(image.nbytes - image.resident));
      }
    std::vector<std::vector<std::vector<Piece>>> ring(longest.size());
    for (size_t number = 0; number < longest.size(); ++number) {
      ring[number].resize(buffers);
      for (auto& buffer : ring[number])
        for (size_t i = 0; i < longest[number]; i += size_t(grain)) buffer.emplace_back(memory, size_t(grain));
    }

    size_t nbytes = 0;
    for (const auto& layer : sizes)
      for (const StreamedImage& image : layer) nbytes += whole(image.resident) + whole(image.nbytes - image.resident);
    Addresses& at = *(all = std::make_unique<Addresses>(memory, nbytes));
    for (size_t layer = 0; layer < sizes.size(); ++layer) {
      auto& own = images.emplace_back();
      for (size_t number = 0; number < longest.size(); ++number) {
        const StreamedImage& image = sizes[layer][number];
        const size_t resident = whole(image.resident), tail = whole(image.nbytes - image.resident), slots = whole(image.slots);
        own.push_back({at.end(), std::make_unique<PinnedMemory>(image.nbytes - image.resident), nullptr});
        const Piece stays(memory, resident);
        at.append(stays);
        at.append(ring[number][layer % buffers].data(), tail / size_t(grain));
        if (!slots) continue;
        Addresses& again = held.emplace_back(memory, resident + slots);
        own.back().slots = again.end();
        again.append(stays);
        again.append(Piece(memory, slots));
      }
    }
  }

  // What is asked of the device may still be reading, or on the way here.
  ~State() {
    int before = 0;
    cudaGetDevice(&before);
    cudaSetDevice(memory.prop.location.id);
    cudaDeviceSynchronize();
    cudaSetDevice(before);
  }

  Buffer& buffer(int layer) { return in_ring[layer % buffers]; }

  // All that is not resident of a layer, to its buffer.
  void copy(int layer) {
    for (size_t number = 0; number < images[layer].size(); ++number) {
      const StreamedImage& size = sizes[layer][number];
      const Image& image = images[layer][number];
      if (image.slots)
        fill({.held = held_layers + layer,
              .row_of = row_of + size_t(layer) * intermediate,
              .image = image.data,
              .resident = size.resident,
              .intermediate = intermediate},
             copies.handle);
      else if (size.resident < size.nbytes)
        check(cudaMemcpyAsync(image.data + size.resident, image.host->data(), size_t(size.nbytes - size.resident),
                              cudaMemcpyHostToDevice, copies.handle),
              "cudaMemcpyAsync");
    }
    buffer(layer).arrived.record(copies.handle);
  }

  const Memory memory;
  const std::vector<std::vector<StreamedImage>> sizes;
  const int buffers;
  std::unique_ptr<Addresses> all;  // of all images
  std::vector<Addresses> held;     // of each that has slots
  std::vector<std::vector<Image>> images;
  CopyStream copies;
  std::vector<Buffer> in_ring = std::vector<Buffer>(buffers);
  const HeldLayer* held_layers = nullptr;  // and the next two: as `share` got them
  const int32_t* row_of = nullptr;
  int intermediate = 0;
  Event begun;
  int next = -1, last = 0;  // the layer that the pass will need next, and the one that it ends before; -1: there is no pass
};

WeightStream::WeightStream(std::vector<std::vector<StreamedImage>> layers, int buffers)
    : state_(std::make_unique<State>(std::move(layers), buffers)) {}

WeightStream::~WeightStream() = default;

int64_t WeightStream::granularity() { return int64_t(Memory().granularity()); }

char* WeightStream::image(int layer, int number) const { return state_->images.at(layer).at(number).data; }
char* WeightStream::host(int layer, int number) const { return state_->images.at(layer).at(number).host->data(); }
char* WeightStream::slots(int layer, int number) const { return state_->images.at(layer).at(number).slots; }

void WeightStream::share(const HeldLayer* held, const int32_t* row_of, int intermediate) {
  state_->held_layers = held;
  state_->row_of = row_of;
  state_->intermediate = intermediate;
}

int WeightStream::num_layers() const { return int(state_->sizes.size()); }

void WeightStream::ahead(int first, int last, StreamHandle stream) {
  State& s = *state_;
  if (s.next == first) return;
  s.begun.record(static_cast<cudaStream_t>(stream));
  s.begun.precede(s.copies.handle);
  for (int layer = first; layer < std::min(first + s.buffers, last); ++layer) s.copy(layer);
  s.next = first;
  s.last = last;
}

void WeightStream::need(int layer, StreamHandle stream) {
  State& s = *state_;
  if (s.next < 0) ahead(layer, num_layers(), stream);
  if (layer != s.next)
    throw std::logic_error("WeightStream: expected layer " + std::to_string(s.next) + ", got " + std::to_string(layer));
  s.buffer(layer).arrived.precede(static_cast<cudaStream_t>(stream));
}

void WeightStream::done(int layer, StreamHandle stream) {
  State& s = *state_;
  const int later = layer + s.buffers;
  if (later < s.last) {
    s.buffer(layer).free.record(static_cast<cudaStream_t>(stream));
    s.buffer(layer).free.precede(s.copies.handle);
    s.copy(later);
  }
  s.next = layer + 1 < s.last ? layer + 1 : -1;
}

void WeightStream::end(StreamHandle stream) {
  State& s = *state_;
  if (s.next < 0) return;
  s.next = -1;  // even if a capture that has failed does not let it be recorded
  s.begun.record(s.copies.handle);
  s.begun.precede(static_cast<cudaStream_t>(stream));
}

}  // namespace sirius::cuda
