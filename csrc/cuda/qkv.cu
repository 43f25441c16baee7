#include "dot.cuh"
#include "rope.cuh"

namespace sirius::cuda {
namespace {

constexpr int kPairs = kTileRows / 2;

// Pair number `pair` of all heads of q, k and v: two elements of a head. First come the pairs that are rotated; what is left of a
// head is paired in the same way.
struct Place {
  int part, head, first, second;  // head: of all; the elements are numbered within the head
  bool rotated;

  // half_head: head_dim / 2
  __device__ Place(const RopeParams& rope, Divisor half_head, int pair) {
    const int head_dim = rope.cache.head_dim, d = half_head.rest(pair), half = rope.rotary_dim / 2;
    head = half_head.quotient(pair);
    part = head < rope.heads ? 0 : head < rope.heads + rope.cache.kv_heads ? 1 : 2;
    rotated = d < half && part < 2;
    first = d < half ? d : d + half;
    second = d < half ? d + half : d + head_dim / 2;
  }

  // The row of the part's matrix that the head's element 0 is.
  __device__ int line(const RopeParams& rope) const {
    return (part == 0 ? head : part == 1 ? head - rope.heads : head - rope.heads - rope.cache.kv_heads) * rope.cache.head_dim;
  }
};

// grid: [pairs of some parts / 8, rows of input / 16]. The tile's rows r and r + 8 are a pair, which is rotated as soon as it is
// summed up. (Two matrices, as it were, of sixteen rows each took an H100 a tenth longer in eight bits.)
template <class T, class W, bool Aligned, int Columns>
__global__ void __launch_bounds__(kDotWarps* kWarp, (kDotBlocks<T, Aligned, Columns, 1>))
    qkv_kernel(const LinearParams p, const RopeParams rope, const Norm norm, Divisor half_head, int first_pair, int pairs,
               Format format) {
  auto& shared = shared_memory<DotShared<T, W, Columns, 1>>();
  const int head_dim = rope.cache.head_dim, end = first_pair + pairs;
  const Input in{p.x, norm, p.num_rows, p.parts[0].weight.cols, format};
  const auto first = [&](int tile) { return first_pair + tile * kPairs; };
  for_each_tile<false, T, W, Aligned>(
      in, shared, int(gridDim.x),
      // Twice the pair, and one more for its second element.
      [&](int tile, int row) {
        const int pair = first(tile) + row % kPairs;
        return 2 * (pair < end ? pair : end - 1) + row / kPairs;
      },
      [&](int, int line) {
        const Place at(rope, half_head, line / 2);
        return WeightRow<T, W, Aligned>(projection_at(p.parts, at.part).weight,
                                        at.line(rope) + (line % 2 == 0 ? at.first : at.second));
      },
      [&](int tile, int input_rows) {
        const int left = end - first(tile);
        for_each_sum<Columns>(left < kPairs ? left : kPairs, input_rows, [&](int row, int column) {
          const Place at(rope, half_head, first(tile) + row);
          const int m = int(blockIdx.y) * kTileRows + column;
          Pair sum{shared.sum(0, row, column), shared.sum(0, row + kPairs, column)};
          if (const T* bias = static_cast<const T*>(projection_at(p.parts, at.part).bias)) {
            sum.first += to_float(bias[at.line(rope) + at.first]);
            sum.second += to_float(bias[at.line(rope) + at.second]);
          }
          if (at.rotated) {
            const size_t angle = angles_of(rope, m) + at.first;
            sum = rotate(sum, rope.cos[angle], rope.sin[angle]);
          }
          T* const q = static_cast<T*>(rope.qkv) + (size_t(m) * rope.heads + at.head) * head_dim;
          T* const out = head_output(rope, q, m, at.head);
          out[at.first] = from_float<T>(sum.first);
          out[at.second] = from_float<T>(sum.second);
        });
      });
}

}  // namespace

void qkv_rope_kv_write(const LinearParams& p, const RopeParams& rope, const Norm& norm, Workspace, StreamHandle stream) {
  int done = 0;
  with_bodies(p, norm, [&](auto type, auto format, auto aligned, auto columns, int begin, int end) {
    using T = typename decltype(type)::type;
    using W = typename decltype(format)::type;
    int pairs = 0;
    for (int i = begin; i < end; ++i) pairs += p.parts[i].weight.rows / 2;
    launch<qkv_kernel<T, W, aligned.value, columns.value>>(
        "qkv_rope_kv_write", dim3(ceil_div(pairs, kPairs), ceil_div(p.num_rows, kTileRows)), kDotWarps * kWarp,
        DotShared<T, W, columns.value, 1>::bytes(p.parts[0].weight.cols), stream, p, rope, norm, Divisor(rope.cache.head_dim / 2),
        done, pairs, p.parts[begin].weight.format);
    done += pairs;
  });
}

}  // namespace sirius::cuda
