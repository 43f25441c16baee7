// What every CUDA kernel here shares: launching, shared memory, 16-byte loads, reductions, tickets. The same source is compiled
// by nvcc for a GPU and by g++ over simt/simt.h for the tests; inline PTX has a plain fallback beside it.
#pragma once

#if defined(__CUDACC__)
#define SIRIUS_OUT_OF_LINE __noinline__
#else
#include "../simt/simt.h"
#define SIRIUS_OUT_OF_LINE
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "../types.h"
#include "ops.h"

namespace sirius::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ------------------------------------------------------------------------------------------------------------ launching

// On sm_90 and later a kernel is launched while the one before it still runs: it begins as soon as all blocks of that one have
// come past their `wait_for_kernel_before`, and what it asks of memory until it comes to its own is on the way meanwhile. Until
// then it may use nothing but what no kernel writes: weights, and its own arguments. Every thread of every kernel must come
// there, also one that has nothing to do: whoever waits for a kernel takes for granted that it has waited for the one before.
//
// Early: the next kernel may begin as soon as this one's blocks have, while the one before still runs. That is for kernels which
// read no weights and have little to do, attention and norms: what reads weights after them asks for its first ones meanwhile.
// What counts as `settled` for that one, a list of neurons say, must then be from before the kernel before this one.
template <bool Early = false>
__device__ __forceinline__ void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 900
  if (Early) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (!Early) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
#elif !defined(__CUDACC__)
  simt::wait_for_grid_before(Early);
#endif
}

// For a kernel that writes weights: the next one asks for such before it waits, so it begins when this one has ended.
__device__ __forceinline__ void wait_without_overlap() {
#if defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
#elif !defined(__CUDACC__)
  simt::wait_for_grid_before(false);
#endif
}

#if defined(__CUDACC__)
inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Lets a kernel have so much shared memory. What it may have only grows, since another thread may be about to launch it with what
// it has asked for.
template <auto Kernel>
void allow_shared(const char* name, size_t bytes) {
  static std::mutex mutex;
  static std::map<int, size_t> allowed;  // by device
  int device = 0;
  check(cudaGetDevice(&device), name);
  const std::lock_guard lock(mutex);
  if (bytes <= allowed[device]) return;
  check(cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)), name);
  allowed[device] = bytes;
}

// Kernel<<<grid, block, shared_bytes, stream>>>(arguments...), checked.
template <auto Kernel, class... Arguments>
void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, StreamHandle stream, Arguments&&... arguments) {
  if (shared_bytes > (48 << 10)) allow_shared<Kernel>(name, shared_bytes);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  // What was compiled for an older card does not wait, whatever it runs on.
  cudaFuncAttributes about{};
  check(cudaFuncGetAttributes(&about, Kernel), name);
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = about.ptxVersion >= 90 && about.binaryVersion >= 90 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, Kernel, std::forward<Arguments>(arguments)...), name);
}

// Of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}
#else
template <auto Kernel, class... Arguments>
void launch(const char*, dim3 grid, dim3 block, size_t shared_bytes, StreamHandle stream, const Arguments&... arguments) {
  simt::launch(__PRETTY_FUNCTION__, grid, block, shared_bytes, [=] { Kernel(arguments...); }, static_cast<simt::Stream*>(stream));
}

inline int multiprocessors() { return simt::multiprocessors(); }
#endif

// The block's dynamic shared memory, as one plain struct. All shared memory is dynamic, so that the tests can fill it with NaN.
template <class T>
__device__ __forceinline__ T& shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char memory[];
  return *reinterpret_cast<T*>(memory);
#else
  return *reinterpret_cast<T*>(simt::context.shared);
#endif
}

// -------------------------------------------------------------------------------------------------------------- loading

// One of two 16-bit numbers in a word: the first is in its lower half.
template <class T>
__device__ __forceinline__ float half_of(uint32_t word, int which) {
  if constexpr (std::is_same_v<T, bf16_t>) return float_of(which ? word & 0xffff0000u : word << 16);
#if defined(__CUDA_ARCH__)
  float out;
  if (which)
    asm("{.reg .f16 first, second; mov.b32 {first, second}, %1; cvt.f32.f16 %0, second;}" : "=f"(out) : "r"(word));
  else
    asm("{.reg .f16 first, second; mov.b32 {first, second}, %1; cvt.f32.f16 %0, first;}" : "=f"(out) : "r"(word));
  return out;
#else
  return to_float(T{uint16_t(which ? word >> 16 : word)});
#endif
}

// Two numbers in a word, rounded to T.
template <class T>
__device__ __forceinline__ uint32_t word_of(float first, float second) {
#if defined(__CUDA_ARCH__)
  uint32_t out;
  if constexpr (std::is_same_v<T, bf16_t>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(second), "f"(first));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(second), "f"(first));
  return out;
#else
  return uint32_t(from_float<T>(first).bits) | uint32_t(from_float<T>(second).bits) << 16;
#endif
}

// A function of three words, bit by bit, in one operation: left to itself nvcc takes two where two of them are constants. Table:
// what the function makes of these three.
constexpr uint32_t kFirst = 0xf0, kSecond = 0xcc, kThird = 0xaa;
template <uint32_t Table>
__device__ __forceinline__ uint32_t of_three(uint32_t first, uint32_t second, uint32_t third) {
  uint32_t out = 0;
#if defined(__CUDA_ARCH__)
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(out) : "r"(first), "r"(second), "r"(third), "n"(Table & 0xff));
#else
  for (int i = 0; i < 8; ++i)
    if (Table >> i & 1) out |= (i & 4 ? first : ~first) & (i & 2 ? second : ~second) & (i & 1 ? third : ~third);
#endif
  return out;
}

__device__ __forceinline__ uint32_t masked_or(uint32_t a, uint32_t mask, uint32_t bits) {
  return of_three<(kFirst & kSecond) | kThird>(a, mask, bits);
}

// Some elements of T side by side, as the words in which they are loaded and multiplied. Whoever looks at one gets it as a float:
// of an array of 16-bit elements nvcc keeps each in a register of its own, and takes the words apart for it.
template <class T, int Size>
struct alignas(Size * sizeof(T)) Packed {
  static constexpr int size = Size;
  static constexpr int kEach = 4 / sizeof(T);  // elements of a word
  uint32_t words[Size / kEach];

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (kEach == 1)
      return float_of(words[i]);
    else
      return half_of<T>(words[i / 2], i % 2);
  }

  __device__ static __forceinline__ Packed rounded(const float (&values)[Size]) {
    Packed out;
#pragma unroll
    for (int i = 0; i < Size / kEach; ++i) {
      if constexpr (kEach == 1)
        out.words[i] = bits_of(values[i]);
      else
        out.words[i] = word_of<T>(values[2 * i], values[2 * i + 1]);
    }
    return out;
  }

  __device__ __forceinline__ void put_half(int which, const Packed<T, Size / 2>& half) {
#pragma unroll
    for (int i = 0; i < Size / kEach / 2; ++i) words[which * (Size / kEach / 2) + i] = half.words[i];
  }

  // Elements one by one, for bodies that are not for speed. `put` wants a zero in its place.
  __device__ __forceinline__ T element(int i) const {
    if constexpr (kEach == 1)
      return float_of(words[i]);
    else
      return {uint16_t(words[i / 2] >> i % 2 * 16)};
  }
  __device__ __forceinline__ void put(int i, T value) {
    if constexpr (kEach == 1)
      words[i] = bits_of(value);
    else
      words[i / 2] |= uint32_t(value.bits) << i % 2 * 16;
  }
};

// 16 bytes of T.
template <class T>
using Vec = Packed<T, 16 / sizeof(T)>;

SIRIUS_ANYWHERE inline bool aligned16(const void* address) { return reinterpret_cast<std::uintptr_t>(address) % 16 == 0; }

// A GPU faults by itself.
__device__ __forceinline__ void expect_aligned([[maybe_unused]] const void* address) {
#if !defined(__CUDACC__)
  if (!aligned16(address)) simt::fail("16 bytes at an address that is no multiple of 16");
#endif
}

// A number or an address as it is: nvcc, which knows it as a sum of others, would keep those and add them up again in every step.
template <class T>
__device__ __forceinline__ T added_up(T value) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_pointer_v<T>)
    asm("" : "+l"(value));
  else
    asm("" : "+r"(value));
#endif
  return value;
}

// Sixteen bytes of weights, first to leave L2; `Bytes` after `at`. Those that are read once a pass go past L1. Nothing is read
// unless they are `there`: then they are zero, or where that does not matter anything. Volatile, so that loads stand where they
// are written: before the products of other weights, which are volatile too.
template <bool PastL1, int Bytes, bool Zero = true, class T>
__device__ __forceinline__ Vec<T> load_weights(const T* at, bool there) {
  Vec<T> out{};
#if defined(__CUDA_ARCH__)
  // With a branch around it nvcc copies words as soon as they are loaded, and so waits for them. The policy as a constant is six
  // instructions less in a step of some loops, but takes registers that others lack.
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#define SIRIUS_LOAD_WEIGHTS(past_l1, otherwise)                                            \
  asm volatile(                                                                            \
      "{.reg .pred there;\n"                                                               \
      "setp.ne.u32 there, %6, 0;\n" otherwise "@there ld.global.nc" past_l1                \
      ".L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4 + %7], %5;}"                           \
      : "=&r"(out.words[0]), "=&r"(out.words[1]), "=&r"(out.words[2]), "=&r"(out.words[3]) \
      : "l"(at), "l"(policy), "r"(uint32_t(there)), "n"(Bytes))
#define SIRIUS_ZERO "mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
  if constexpr (PastL1 && Zero)
    SIRIUS_LOAD_WEIGHTS(".L1::no_allocate", SIRIUS_ZERO);
  else if constexpr (PastL1)
    SIRIUS_LOAD_WEIGHTS(".L1::no_allocate", "");
  else
    SIRIUS_LOAD_WEIGHTS("", SIRIUS_ZERO);
#undef SIRIUS_ZERO
#undef SIRIUS_LOAD_WEIGHTS
#else
  if (!there) return out;
  at += Bytes / sizeof(T);
  expect_aligned(at);
  std::memcpy(&out, at, sizeof(out));
#endif
  return out;
}

template <int Bytes = 0, bool Zero = true, class T>
__device__ __forceinline__ Vec<T> load_streaming(const T* at, bool there) {
  return load_weights<true, Bytes, Zero>(at, there);
}

// Two words of weights beside which others read: kept in L1.
__device__ __forceinline__ Packed<uint32_t, 2> load_two_words(const void* at, bool there) {
  Packed<uint32_t, 2> out{};
#if defined(__CUDA_ARCH__)
  asm volatile(
      "{.reg .pred there;\n"
      "setp.ne.u32 there, %3, 0;\n"
      "mov.u32 %0, 0; mov.u32 %1, 0;\n"
      "@there ld.global.nc.v2.u32 {%0, %1}, [%2];}"
      : "=&r"(out.words[0]), "=&r"(out.words[1])
      : "l"(at), "r"(uint32_t(there)));
#else
  if (there) std::memcpy(&out, at, sizeof(out));
#endif
  return out;
}

__device__ __forceinline__ void prefetch([[maybe_unused]] const void* at) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#endif
}

// Activations, caches: read again soon. `at` is a multiple of 16.
template <class T>
__device__ __forceinline__ Vec<T> load(const T* at) {
  expect_aligned(at);
  return *reinterpret_cast<const Vec<T>*>(at);
}

template <class T>
__device__ __forceinline__ void store(T* at, const Vec<T>& value) {
  expect_aligned(at);
  *reinterpret_cast<Vec<T>*>(at) = value;
}

// For arrays that no 16-byte load may read. A function of its own: inlined everywhere, it takes most of nvcc's time.
template <int Size, class T>
SIRIUS_OUT_OF_LINE __device__ Packed<T, Size> load_elements(const T* array, int begin, int n) {
  Packed<T, Size> out{};
#pragma unroll
  for (int i = 0; i < Size; ++i)
    if (begin + i < n) out.put(i, array[begin + i]);
  return out;
}

// Elements [begin, begin + Vec::size) of an array of n, zero from n on. `Aligned` promises that the array starts at a multiple of
// 16 bytes and that begin and n are multiples of Vec::size; without it elements are loaded one by one.
template <bool Aligned, class T>
__device__ __forceinline__ Vec<T> load_part(const T* array, int begin, int n) {
  if constexpr (Aligned) {
    Vec<T> out{};
    if (begin < n) out = load(array + begin);
    return out;
  } else {
    return load_elements<Vec<T>::size>(array, begin, n);
  }
}

template <bool Aligned, class T>
__device__ __forceinline__ Vec<T> load_part_streaming(const T* array, int begin, int n) {
  if constexpr (Aligned)
    return load_streaming(array + begin, begin < n);
  else
    return load_elements<Vec<T>::size>(array, begin, n);
}

template <bool Aligned, class T>
__device__ __forceinline__ void store_part(T* array, int begin, int n, const Vec<T>& value) {
  if constexpr (Aligned) {
    if (begin < n) store(array + begin, value);
  } else {
#pragma unroll
    for (int i = 0; i < Vec<T>::size; ++i)
      if (begin + i < n) array[begin + i] = value.element(i);
  }
}

// ------------------------------------------------------------------------------------------------------------- reducing

// Over the warp; every lane gets the result, and the order of the sum never changes.
template <class T, class Op>
__device__ __forceinline__ T warp_reduce(T value, Op op) {
#pragma unroll
  for (int flip = kWarp / 2; flip > 0; flip /= 2) value = op(value, __shfl_xor_sync(kAllLanes, value, flip));
  return value;
}

__device__ __forceinline__ float warp_sum(float value) {
  return warp_reduce(value, [](float a, float b) { return a + b; });
}

__device__ __forceinline__ float warp_max(float value) {
  return warp_reduce(value, [](float a, float b) { return a > b ? a : b; });
}

// counter + 1, atomically; returns what it was. What this thread wrote before, and what its block did before a barrier, is
// visible to whoever arrives later, and what those who came before it wrote is visible to this one.
__device__ __forceinline__ int32_t arrive(int32_t* counter) {
#if defined(__CUDA_ARCH__)
  int32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
#else
  return atomicAdd(counter, 1);
#endif
}

// Whether this is the last of `blocks` blocks to arrive; true in all its threads or in none. What the others wrote before is then
// visible. The counter starts at zero and is zero again when the last block has arrived. `memory`: one int of shared memory.
__device__ __forceinline__ bool last_block(int32_t* counter, int blocks, int32_t* memory) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const int32_t arrived = arrive(counter);
    *memory = arrived == blocks - 1;
    if (arrived == blocks - 1) *counter = 0;
  }
  __syncthreads();
  return *memory != 0;
}

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A number that the host knows and kernels divide by: a division takes some twenty instructions. Exact where n * by < 2^32.
struct Divisor {
  int by;
  uint32_t factor;

  explicit Divisor(int by_) : by(by_), factor(by_ == 1 ? 0 : uint32_t((uint64_t(1) << 32) / uint64_t(by_)) + 1) {}

  __host__ __device__ int quotient(int n) const { return by == 1 ? n : int(uint64_t(uint32_t(n)) * factor >> 32); }
  __host__ __device__ int rest(int n) const { return n - quotient(n) * by; }
};

// ------------------------------------------------------------------------------------------------- elementwise functions

// 1 / sqrt(x) and a / b for normal numbers, to the last bit or two: all of their bits would take a GPU some hundred instructions
// each, on the way of all that comes after them.
__device__ __forceinline__ float inverse_root(float x) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
#else
  return 1.0f / std::sqrt(x);
#endif
}

__device__ __forceinline__ float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
#else
  return a / b;
#endif
}

// 1 / sqrt(mean(row^2) + eps), from the sum of a row's n squares: with the same bits wherever it is needed.
__device__ __forceinline__ float inverse_rms(float squares, int n, float eps) {
  return inverse_root(quotient(squares, float(n)) + eps);
}

__device__ __forceinline__ float activate(Activation activation, float x) {
  // 1 + tanh(y) is 2 / (1 + exp(-2 y)): both functions are x times a sigmoid.
  const float y = activation == Activation::silu ? x : 1.5957691216057308f * fmaf(0.044715f * x * x, x, x);
  return quotient(x, 1.0f + expf(-y));
}

// softcap(v), where softcap is not 0.
__device__ __forceinline__ float capped(float v, float softcap) { return softcap * tanhf(quotient(v, softcap)); }

// softcap(scale * sum) + residual. The last two operations are one, in all kernels alike.
__device__ __forceinline__ float scaled(float sum, float scale, float softcap, float residual) {
  return softcap != 0.0f ? fmaf(softcap, tanhf(quotient(scale * sum, softcap)), residual) : fmaf(scale, sum, residual);
}

// ---------------------------------------------------------------------------------------------------------- dispatching

template <class T>
struct Type {
  using type = T;
};

// body(Type<T>()) for the element type T.
template <class Body>
void with_type(Dtype dtype, Body&& body) {
#if defined(SIRIUS_BF16_ALONE)  // a third of the code, for tests that compile all of it anew
  if (dtype != Dtype::bf16) throw std::logic_error("this build has kernels of bfloat16 alone");
  return body(Type<bf16_t>());
#else
  switch (dtype) {
    case Dtype::f32: return body(Type<float>());
    case Dtype::f16: return body(Type<f16_t>());
    case Dtype::bf16: return body(Type<bf16_t>());
  }
#endif
}

// body(std::bool_constant<value>()).
template <class Body>
void with_flag(bool value, Body&& body) {
  if (value) return body(std::true_type());
  return body(std::false_type());
}

}  // namespace sirius::cuda
