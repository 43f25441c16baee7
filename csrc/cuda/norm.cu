#include "norm.cuh"

namespace sirius::cuda {
namespace {

constexpr int kWarps = 4;

// grid: [num_rows / kWarps]; one warp a row
template <class T, bool Aligned>
__global__ void rms_norm_kernel(const RmsNormParams p) {
  const int row = int(blockIdx.x) * kWarps + int(threadIdx.x) / kWarp, first = int(threadIdx.x) % kWarp * Vec<T>::size;
  if (row >= p.num_rows) return;
  const size_t at = size_t(row) * p.hidden;
  const T *x = static_cast<const T*>(p.x) + at, *weight = static_cast<const T*>(p.norm.weight);
  const T* residual = p.residual ? static_cast<const T*>(p.residual) + at : nullptr;
  const float scale = inverse_rms<Aligned>(x, p.hidden, p.norm.eps);
  for (int c = first; c < p.hidden; c += kWarp * Vec<T>::size) {
    const Vec<T> from = load_part<Aligned>(x, c, p.hidden);
    const Vec<T> w = load_part<Aligned>(weight, c, p.hidden);
    Vec<T> add{};
    if (residual) add = load_part<Aligned>(residual, c, p.hidden);
    float out[Vec<T>::size];
#pragma unroll
    for (int i = 0; i < Vec<T>::size; ++i) {
      out[i] = from[i] * scale * (w[i] + p.norm.offset);
      if (residual) out[i] += add[i];
    }
    store_part<Aligned>(static_cast<T*>(p.out) + at, c, p.hidden, Vec<T>::rounded(out));
  }
}

}  // namespace

void rms_norm(const RmsNormParams& p, Workspace, StreamHandle stream) {
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool aligned =
        p.hidden % Vec<T>::size == 0 && aligned16(p.x) && aligned16(p.norm.weight) && aligned16(p.residual) && aligned16(p.out);
    with_flag(aligned, [&](auto flag) {
      launch("rms_norm", rms_norm_kernel<T, flag.value>, ceil_div(p.num_rows, kWarps), kWarps * kWarp, 0, stream, p);
    });
  });
}

}  // namespace sirius::cuda
