#include "rope.cuh"

namespace sirius::cuda {
namespace {

constexpr int kWarps = 4;

// Floats [begin, begin + N) of n.
template <bool Aligned, int N>
__device__ __forceinline__ void load_floats(const float* array, int begin, int n, float (&out)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += Vec<float>::size) {
    const Vec<float> part = load_part<Aligned>(array, begin + i, n);
#pragma unroll
    for (int j = 0; j < Vec<float>::size; ++j) out[i + j] = part[j];
  }
}

// A head as it is normalised: by its root mean square and a weight, or not at all.
template <class T, bool Aligned>
class Head {
 public:
  __device__ __forceinline__ Head(const T* vector, int head_dim, const Norm& norm)
      : vector_(vector), weight_(static_cast<const T*>(norm.weight)), offset_(norm.offset) {
    if (!weight_) return;
    float squares = 0.0f;
    for (int c = int(threadIdx.x) % kWarp * Vec<T>::size; c < head_dim; c += kWarp * Vec<T>::size) {
      const Vec<T> part = load_part<Aligned>(vector, c, head_dim);
#pragma unroll
      for (int i = 0; i < Vec<T>::size; ++i) squares += part[i] * part[i];
    }
    scale_ = inverse_rms(warp_sum(squares), head_dim, norm.eps);
  }

  // Elements [begin + c, begin + c + N), of which those from begin + n on are not looked at.
  template <int N>
  __device__ __forceinline__ void load(int begin, int c, int n, float (&out)[N]) const {
    const Vec<T> x = load_part<Aligned>(vector_ + begin, c, n);
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = x[i];
    if (!weight_) return;
    const Vec<T> weight = load_part<Aligned>(weight_ + begin, c, n);
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = out[i] * scale_ * (weight[i] + offset_);
  }

 private:
  const T *vector_, *weight_;
  float offset_, scale_ = 1.0f;
};

// grid: [num_rows * (heads + 2 * kv_heads) / kWarps]; one warp a head. A lane takes 16 bytes of the rotated part's first half and
// the 16 bytes that they are paired with, then 16 bytes of the rest. Moves each row twice: qkv is read, q and the caches are
// written.
template <class T, bool Aligned>
__global__ void rope_kv_write_kernel(const RopeParams p) {
  wait_for_kernel_before();
  constexpr int kPart = Vec<T>::size;
  const int all_heads = p.heads + 2 * p.cache.kv_heads, head_dim = p.cache.head_dim;
  const int index = int(blockIdx.x) * kWarps + int(threadIdx.x) / kWarp, row = index / all_heads, head = index % all_heads;
  if (row >= p.num_rows) return;
  T* const vector = static_cast<T*>(p.qkv) + size_t(index) * head_dim;
  const bool is_query = head < p.heads, is_value = head >= p.heads + p.cache.kv_heads;
  const Head<T, Aligned> from(vector, head_dim, is_query ? p.q_norm : is_value ? Norm{} : p.k_norm);
  T* const out = head_output(p, vector, row, head);

  const int first = int(threadIdx.x) % kWarp * kPart, rotary_dim = is_value ? 0 : p.rotary_dim, half = rotary_dim / 2;
  for (int c = first; c < half; c += kWarp * kPart) {
    const size_t angles = angles_of(p, row);
    float a[kPart], b[kPart], cos[kPart], sin[kPart];
    from.load(0, c, half, a);
    from.load(half, c, half, b);
    load_floats<Aligned>(p.cos + angles, c, half, cos);
    load_floats<Aligned>(p.sin + angles, c, half, sin);
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      const Pair rotated = rotate({a[i], b[i]}, cos[i], sin[i]);
      a[i] = rotated.first;
      b[i] = rotated.second;
    }
    store_part<Aligned>(out, c, half, Vec<T>::rounded(a));
    store_part<Aligned>(out + half, c, half, Vec<T>::rounded(b));
  }
  for (int c = first; c < head_dim - rotary_dim; c += kWarp * kPart) {
    float rest[kPart];
    from.load(rotary_dim, c, head_dim - rotary_dim, rest);
    store_part<Aligned>(out + rotary_dim, c, head_dim - rotary_dim, Vec<T>::rounded(rest));
  }
}

}  // namespace

void rope_kv_write(const RopeParams& p, Workspace, StreamHandle stream) {
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool aligned = p.rotary_dim / 2 % Vec<T>::size == 0 && p.cache.head_dim % Vec<T>::size == 0 && aligned16(p.qkv) &&
                         aligned16(p.cos) && aligned16(p.sin) && aligned16(p.k_cache) && aligned16(p.v_cache) &&
                         aligned16(p.q_norm.weight) && aligned16(p.k_norm.weight);
    const int heads = p.num_rows * (p.heads + 2 * p.cache.kv_heads);
    with_flag(aligned, [&](auto flag) {
      launch<rope_kv_write_kernel<T, flag.value>>("rope_kv_write", ceil_div(heads, kWarps), kWarps * kWarp, 0, stream, p);
    });
  });
}

}  // namespace sirius::cuda
