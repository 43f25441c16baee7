#include "runtime.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <vector>

#include "simt.h"

namespace simt {

struct Event {
  long recorded = 0;  // how often, in the order of calls
  long happened = 0;  // the last one that did
};

// Another than the kernels'.
struct Stream {
  std::deque<std::function<bool()>> queue;  // as `enqueue` has it
};

namespace {

constexpr size_t kPage = 4096, kMost = size_t(1) << 30;  // of a device's memory at once

std::vector<Stream*> streams_;

// Physical memory, by its handle.
struct Pages {
  int file;
  size_t nbytes;
};
std::map<CUmemGenericAllocationHandle, Pages> pages_;
CUmemGenericAllocationHandle last_handle_ = 0;

void* pointer(CUdeviceptr at) { return reinterpret_cast<void*>(at); }

// Addresses without memory behind them: whoever touches them faults.
void* reserve(void* at, size_t nbytes, int flags) {
  return mmap(at, nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | flags, -1, 0);
}

// What comes when all before it has ended, kernels too.
void enqueue_after_kernel(Stream* stream, std::function<void()> command) {
  enqueue(stream, [stream, command = std::move(command)] {
    stream ? command() : after_kernel(command);
    return true;
  });
}

}  // namespace

void enqueue(Stream* stream, std::function<bool()> command) {
  if (stream)
    stream->queue.push_back(std::move(command));
  else
    enqueue(std::move(command));
}

bool run_elsewhere() {
  for (Stream* stream : streams_) {
    if (stream->queue.empty() || !stream->queue.front()()) continue;
    stream->queue.pop_front();
    return true;
  }
  return false;
}

bool waits_elsewhere() {
  return std::any_of(streams_.begin(), streams_.end(), [](const Stream* stream) { return !stream->queue.empty(); });
}

}  // namespace simt

using namespace simt;

const char* cudaGetErrorString(cudaError_t error) { return error == cudaErrorMemoryAllocation ? "out of memory" : "no error"; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  streams_.push_back(*stream = new Stream);
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int) { return cudaSuccess; }

cudaError_t cudaDeviceSynchronize() {
  finish();
  while (run_elsewhere()) continue;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  streams_.erase(std::find(streams_.begin(), streams_.end(), stream));
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new Event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  enqueue_after_kernel(stream, [event, number = ++event->recorded] { event->happened = std::max(event->happened, number); });
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  enqueue(stream, [event, number = event->recorded] { return event->happened >= number; });
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t nbytes, cudaMemcpyKind, cudaStream_t stream) {
  enqueue_after_kernel(stream, [=] { std::memcpy(to, from, nbytes); });
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** memory, size_t nbytes, unsigned) {
  *memory = std::malloc(nbytes);
  return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void* memory) {
  std::free(memory);
  return cudaSuccess;
}

CUresult cuMemGetAllocationGranularity(size_t* granularity, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
  *granularity = kPage;
  return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr* at, size_t nbytes, size_t, CUdeviceptr, unsigned long long) {
  if (nbytes == 0 || nbytes % kPage) return CUDA_ERROR_INVALID_VALUE;
  void* const found = reserve(nullptr, nbytes, 0);
  if (found == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  *at = reinterpret_cast<CUdeviceptr>(found);
  return CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr at, size_t nbytes) {
  return munmap(pointer(at), nbytes) == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t nbytes, const CUmemAllocationProp*, unsigned long long) {
  if (nbytes == 0 || nbytes % kPage) return CUDA_ERROR_INVALID_VALUE;
  if (nbytes > kMost) return CUDA_ERROR_OUT_OF_MEMORY;
  const int file = memfd_create("simt", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, off_t(nbytes)) != 0) return CUDA_ERROR_OUT_OF_MEMORY;
  // NaN in every element type, as what nobody has written may be on a device.
  const std::vector<unsigned char> page(kPage, 0xff);
  for (size_t at = 0; at < nbytes; at += kPage)
    if (pwrite(file, page.data(), kPage, off_t(at)) != ssize_t(kPage)) return CUDA_ERROR_OUT_OF_MEMORY;
  pages_[*handle = ++last_handle_] = {file, nbytes};
  return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  const auto found = pages_.find(handle);
  if (found == pages_.end()) return CUDA_ERROR_INVALID_VALUE;
  close(found->second.file);  // mappings stay
  pages_.erase(found);
  return CUDA_SUCCESS;
}

CUresult cuMemMap(CUdeviceptr at, size_t nbytes, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long) {
  const auto found = pages_.find(handle);
  if (found == pages_.end() || nbytes == 0 || nbytes % kPage || at % kPage) return CUDA_ERROR_INVALID_VALUE;
  if (offset != 0 || nbytes != found->second.nbytes) return CUDA_ERROR_NOT_SUPPORTED;
  void* const mapped = mmap(pointer(at), nbytes, PROT_NONE, MAP_SHARED | MAP_FIXED, found->second.file, 0);
  return mapped == MAP_FAILED ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult cuMemUnmap(CUdeviceptr at, size_t nbytes) {
  return reserve(pointer(at), nbytes, MAP_FIXED) == MAP_FAILED ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr at, size_t nbytes, const CUmemAccessDesc*, size_t) {
  return mprotect(pointer(at), nbytes, PROT_READ | PROT_WRITE) == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
