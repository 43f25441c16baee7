// The down projection, whose rows are added up. Neurons are the sum's k and stand one after the other in memory, so the tensor
// cores' pairs of k are put together from two rows.
//
// A block has a stretch of columns of `out` and a part of the neurons; its warps take turns at 16 neurons, reading 128 bytes of
// each. Parts and warps are added up in order. Where the neurons are cut depends on their number and on `hidden` alone. Bytes
// that must move: hidden * neurons elements, once for every 16 rows of input; the parts' sums stay in L2.
#include "mma.cuh"
#include "weights.cuh"

namespace sirius::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kStep = 16;  // neurons that a warp adds up at a time: four a lane
constexpr int kLaneNeurons = 4;
constexpr int kBlocks = 512;       // that shall run at a time: nearly four for each multiprocessor of an H100
constexpr int kPartNeurons = 128;  // least of a part: one step for each warp

// Columns of `out` that a warp has: 16 bytes for each of eight lanes.
template <class T>
constexpr int kStretch = 8 * Vec<T>::size;

int parts_of(int stretch, int hidden, int num_neurons) {
  const int parts = kBlocks / ceil_div(hidden, stretch), most = ceil_div(num_neurons, kPartNeurons);
  return parts < 1 ? 1 : parts < most ? parts : most;
}

// Neurons 4 t .. 4 t + 3 of a row of x.
template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T v[kLaneNeurons];
};

// The sums of a warp: kStretch columns of out by Columns rows of input.
template <class T, int Columns>
class Sums {
 public:
  static constexpr int kInputs = Columns / 8;
  __device__ static __forceinline__ int column(int input) { return input * 8 + lane_row(); }

  // weights[i]: 16 bytes of neuron 4 t + i, from column 8 g of the stretch on.
  __device__ __forceinline__ void add(const Vec<T> (&weights)[kLaneNeurons], const Quad<T> (&x)[kInputs]) {
    const Words<T> w[kLaneNeurons] = {Words<T>(weights[0]), Words<T>(weights[1]), Words<T>(weights[2]), Words<T>(weights[3])};
#pragma unroll
    for (int i = 0; i < kInputs; ++i) {
      const uint32_t b[2] = {uint32_t(x[i].v[0].bits) | uint32_t(x[i].v[1].bits) << 16,
                             uint32_t(x[i].v[2].bits) | uint32_t(x[i].v[3].bits) << 16};
      // The tile's row g is the even one of the lane's columns 2 j and 2 j + 1, and row g + 8 the odd one.
#pragma unroll
      for (int j = 0; j < 4; ++j)
        mma<T>(sums_[j][i], {{lower(w[0].w[j], w[1].w[j]), upper(w[0].w[j], w[1].w[j]), lower(w[2].w[j], w[3].w[j]),
                              upper(w[2].w[j], w[3].w[j])},
                             {b[0], b[1]}});
    }
  }

  __device__ __forceinline__ void put(float (&out)[Columns][kStretch<T>]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < kInputs; ++i)
#pragma unroll
        for (int k = 0; k < 4; ++k) out[i * 8 + lane_part() * 2 + k % 2][lane_row() * 8 + 2 * j + k / 2] = sums_[j][i][k];
  }

 private:
  __device__ static __forceinline__ uint32_t lower(uint32_t a, uint32_t b) { return (a & 0xffffu) | b << 16; }
  __device__ static __forceinline__ uint32_t upper(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }

  float sums_[4][kInputs][4] = {};
};

template <int Columns>
class Sums<float, Columns> {
 public:
  static constexpr int kInputs = Columns;
  __device__ static __forceinline__ int column(int input) { return input; }

  __device__ __forceinline__ void add(const Vec<float> (&weights)[kLaneNeurons], const Quad<float> (&x)[kInputs]) {
#pragma unroll
    for (int i = 0; i < Columns; ++i)
#pragma unroll
      for (int n = 0; n < kLaneNeurons; ++n)
#pragma unroll
        for (int c = 0; c < Vec<float>::size; ++c) sums_[i][c] += weights[n].v[c] * x[i].v[n];
  }

  __device__ __forceinline__ void put(float (&out)[Columns][kStretch<float>]) const {
#pragma unroll
    for (int i = 0; i < Columns; ++i)
#pragma unroll
      for (int c = 0; c < Vec<float>::size; ++c) {
        float sum = sums_[i][c];
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        if (lane_part() == 0) out[i][lane_row() * Vec<float>::size + c] = sum;
      }
  }

 private:
  float sums_[Columns][Vec<float>::size] = {};
};

template <class T, int Columns>
struct Shared {
  float sums[kWarps][Columns][kStretch<T>];
  int32_t last;
};

// grid: [stretches of columns, rows of input / 16, parts of the neurons]
template <class T, bool Aligned, int Columns>
__global__ void __launch_bounds__(kWarps* kWarp, (sizeof(T) == 4 ? 1 : 2))
    down_kernel(const DownParams p, const Workspace workspace, int first_row) {
  auto& shared = shared_memory<Shared<T, Columns>>();
  constexpr int stretch = kStretch<T>;
  const int neurons = p.num_neurons_at ? *p.num_neurons_at : p.num_neurons, hidden = p.down.cols;
  const int row = first_row + int(blockIdx.y) * kTileRows, rows = p.num_rows - row < Columns ? p.num_rows - row : Columns;
  const int column = int(blockIdx.x) * stretch, parts = int(gridDim.z);
  const int part = ceil_div(ceil_div(neurons, kStep), parts) * kStep;
  const int begin = int(blockIdx.z) * part, end = begin + part < neurons ? begin + part : neurons;
  const T* x = static_cast<const T*>(p.x) + size_t(row) * p.num_neurons;

  Sums<T, Columns> sums;
  const auto neuron_at = [&](int i) { return i < end ? (p.neurons ? p.neurons[i] : i) : 0; };
  int first = begin + (int(threadIdx.x) / kWarp * 4 + lane_part()) * kLaneNeurons, next[kLaneNeurons];
#pragma unroll
  for (int i = 0; i < kLaneNeurons; ++i) next[i] = neuron_at(first + i);
#pragma unroll 2
  for (; first - lane_part() * kLaneNeurons < end; first += kWarps * kStep) {
    Vec<T> weights[kLaneNeurons];
#pragma unroll
    for (int i = 0; i < kLaneNeurons; ++i)
      weights[i] = WeightRow<T, Aligned>(p.down, next[i]).load(column + lane_row() * Vec<T>::size, first + i < end ? hidden : 0);
#pragma unroll
    for (int i = 0; i < kLaneNeurons; ++i) next[i] = neuron_at(first + kWarps * kStep + i);  // in time for the next round
    Quad<T> inputs[Sums<T, Columns>::kInputs];
#pragma unroll
    for (int i = 0; i < Sums<T, Columns>::kInputs; ++i) {
      const int m = Sums<T, Columns>::column(i);
      const T* from = x + size_t(m) * p.num_neurons + first;
      if (Aligned && m < rows && first + kLaneNeurons <= end) {
        inputs[i] = *reinterpret_cast<const Quad<T>*>(from);
      } else {
#pragma unroll
        for (int j = 0; j < kLaneNeurons; ++j) inputs[i].v[j] = m < rows && first + j < end ? from[j] : from_float<T>(0.0f);
      }
    }
    sums.add(weights, inputs);
  }
  sums.put(shared.sums[threadIdx.x / kWarp]);
  __syncthreads();

  const auto finish = [&](int m, int c, float sum) {
    const size_t at = size_t(row + m) * hidden + column + c;
    const float residual = p.residual ? to_float(static_cast<const T*>(p.residual)[at]) : 0.0f;
    static_cast<T*>(p.out)[at] = from_float<T>(scaled(sum, p.scale, 0.0f, residual));
  };
  const size_t plane = size_t(p.num_rows) * hidden;
  const auto partial = [&](int m, int c) { return workspace.floats + size_t(row + m) * hidden + column + c; };
  const int columns = hidden - column < stretch ? hidden - column : stretch;
  for (int i = int(threadIdx.x); i < Columns * stretch; i += kWarps * kWarp) {
    const int m = i / stretch, c = i % stretch;
    if (m >= rows || c >= columns) continue;
    float sum = shared.sums[0][m][c];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += shared.sums[w][m][c];
    if (parts == 1)
      finish(m, c, sum);
    else
      partial(m, c)[blockIdx.z * plane] = sum;
  }
  if (parts == 1 || !last_block(workspace.counters + blockIdx.y * gridDim.x + blockIdx.x, parts, &shared.last)) return;
  for (int i = int(threadIdx.x); i < rows * columns; i += kWarps * kWarp) {
    const int m = i / columns, c = i % columns;
    float sum = 0.0f;
    for (int z = 0; z < parts; ++z) sum += partial(m, c)[z * plane];
    finish(m, c, sum);
  }
}

}  // namespace

void down(const DownParams& p, Workspace workspace, StreamHandle stream) {
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int hidden = p.down.cols;
    const int stretches = ceil_div(hidden, kStretch<T>), parts = parts_of(kStretch<T>, hidden, p.num_neurons);
    // Every group of 16 rows and every stretch has a counter of its own.
    const int groups = ceil_div(p.num_rows, kTileRows),
              together = kCounters / stretches < groups ? kCounters / stretches : groups;
    const bool aligned = aligned16(p.x) && p.num_neurons % kLaneNeurons == 0 && weights_aligned<T>(p.down);
    with_flag(aligned, [&](auto is_aligned) {
      const auto start = [&](auto columns, int first) {
        const dim3 grid(stretches, groups - first < together ? groups - first : together, parts);
        launch("down", down_kernel<T, is_aligned.value, columns.value>, grid, kWarps * kWarp, sizeof(Shared<T, columns.value>),
               stream, p, workspace, first * kTileRows);
      };
      for (int first = 0; first < groups; first += together) {
        with_columns(p.num_rows, [&](auto columns) { start(columns, first); });
      }
    });
  });
}

size_t down_workspace(int num_rows, int hidden, int num_neurons) {
  return size_t(parts_of(kStretch<bf16_t>, hidden, num_neurons)) * num_rows * hidden;
}

}  // namespace sirius::cuda
