#include "norm.cuh"

namespace sirius::cuda {
namespace {

// grid: [num_rows]; one block a row
template <class T, bool Aligned>
__global__ void __launch_bounds__(kNormWarps* kWarp) rms_norm_kernel(const RmsNormParams p) {
  auto& squares = shared_memory<Squares<1>>();
  prefetch_norm(p.norm.weight, p.hidden * int(sizeof(T)));
  wait_for_kernel_before<true>();
  const size_t at = size_t(blockIdx.x) * p.hidden;
  const T *x = static_cast<const T*>(p.x) + at, *weight = static_cast<const T*>(p.norm.weight);
  const T* residual = p.residual ? static_cast<const T*>(p.residual) + at : nullptr;
  const float sum = warp_squares<Aligned>(x, p.hidden);
  if (threadIdx.x % kWarp == 0) squares[0][threadIdx.x / kWarp] = sum;
  __syncthreads();
  const float scale = inverse_rms(squares[0], p.hidden, p.norm.eps);
  for (int c = int(threadIdx.x) * Vec<T>::size; c < p.hidden; c += kNormWarps * kWarp * Vec<T>::size) {
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
      launch<rms_norm_kernel<T, flag.value>>("rms_norm", p.num_rows, kNormWarps * kWarp, sizeof(Squares<1>), stream, p);
    });
  });
}

}  // namespace sirius::cuda
