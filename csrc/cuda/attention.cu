// Split-KV attention. The slots that a row sees, in order, are cut into chunks of kSlots; each chunk yields a maximum, a sum of
// exponentials and a weighted sum of values, which are combined in order. Where a chunk ends depends on how many slots the row
// sees before it and on nothing else, so a token's result is the same bits in a pass of its own, in a window, or in a tree. A
// slot's number in that order is its position: with a sliding window a row's chunks end where they would end without it, the
// first one that it sees begins with the first position that it sees, and so its bits depend on its position alone.
//
// Whole chunks of the prefix that all rows see are the same for all: a block serves up to kColumns queries of a kv head. The
// chunks in which some row's window begins, what is left of the prefix, and the slots in a row's mask are a list of its own for
// every row. Device memory must deliver the keys and values of 2 * kv_heads * head_dim * (what of the prefix is seen + num_rows)
// elements once; further readings, by blocks of other queries, find them in L2.
#include <algorithm>

#include "attention.cuh"

namespace sirius::cuda {
namespace {

// As many as stay resident on the largest card meant (142 multiprocessors, two blocks each). They share the work that the length
// in device memory leaves; a grid for a cache's whole capacity would be mostly blocks that come for nothing.
constexpr int kBlocks = 288;

// How rows and heads are divided, known when a graph is captured. A tile is the rows of a block.
struct Tiles {
  int slices, heads, rows, count;  // slices of a kv head's group, query heads of a slice, rows of a tile, tiles

  Tiles(int num_rows, int group) {
    slices = ceil_div(group, kColumns);
    heads = ceil_div(group, slices);
    rows = kColumns / heads;
    count = ceil_div(num_rows, rows);
  }
};

// The first position that a row sees. prefix: p.prefix and the base.
__device__ __forceinline__ int start_of(const AttentionParams& p, int prefix, int row) {
  if (p.window == 0) return 0;
  const int start = prefix - p.prefix + p.positions[row] + 1 - p.window;
  return start < 0 ? 0 : start < prefix ? start : prefix;
}

// Of all rows' first positions.
struct Starts {
  int least, most;
};

// Found by each warp for itself.
__device__ __forceinline__ Starts starts_of(const AttentionParams& p, int prefix) {
  if (p.window == 0) return {0, 0};
  int least = prefix, most = 0;
  for (int row = int(threadIdx.x) % kWarp; row < p.num_rows; row += kWarp) {
    const int start = start_of(p, prefix, row);
    least = start < least ? start : least;
    most = start > most ? start : most;
  }
  return {warp_reduce(least, [](int a, int b) { return a < b ? a : b; }),
          warp_reduce(most, [](int a, int b) { return a > b ? a : b; })};
}

// How the slots are divided, known when the kernel runs. Chunk i holds the positions from i * kSlots on. In order there are
// chunks of the prefix that not all rows see from their beginning on, whole ones that all see, and those of what is left of the
// prefix and of the mask.
struct Chunks {
  int prefix, rest;                 // slots of the prefix, and of them in the tails
  int first, leads, shared, tails;  // the first chunk's number; then how many there are of each kind

  __host__ __device__ Chunks(int prefix_, int mask_words, Starts starts)
      : prefix(prefix_), rest(prefix % kSlots), first(starts.least / kSlots), tails(ceil_div(rest + mask_words * 64, kSlots)) {
    const int whole = prefix / kSlots, seen_by_all = ceil_div(starts.most, kSlots);
    leads = (seen_by_all < whole ? seen_by_all : whole) - first;
    shared = whole - first - leads;
  }

  // Chunks that are a list of its own for every row.
  __host__ __device__ int lists() const { return leads + tails; }
  __host__ __device__ int number_of_list(int i) const { return first + (i < leads ? i : shared + i); }
};

__device__ __forceinline__ int count_bits(const uint64_t* mask, int words) {
  int n = 0;
  for (int w = 0; w < words; ++w) n += __popcll(mask[w]);
  return n;
}

// The slots of the row's positions from begin to end, of those after the whole chunks, go to `slots`. Returns how many.
__device__ int list_slots(const Chunks& chunks, const uint64_t* mask, int words, int begin, int end, int32_t* slots) {
  for (int i = int(threadIdx.x); i < chunks.rest + words * 64; i += kAttentionThreads) {
    int position = chunks.prefix - chunks.rest + i, slot = position;
    if (i >= chunks.rest) {
      const int bit = i - chunks.rest;
      const uint64_t word = mask[bit / 64];
      if (!(word >> bit % 64 & 1)) continue;
      position = chunks.prefix + count_bits(mask, bit / 64) + __popcll(word & ((uint64_t(1) << bit % 64) - 1));
      slot = chunks.prefix + bit;
    }
    if (begin <= position && position < end) slots[position - begin] = slot;
  }
  __syncthreads();
  const int left = chunks.prefix + count_bits(mask, words) - begin;
  return left < 0 ? 0 : left < end - begin ? left : end - begin;
}

// What a row sees of the i-th chunk that is its own.
__device__ __forceinline__ SlotList own_slots(const AttentionParams& p, const Chunks& chunks, int row, int i, int32_t* slots) {
  const int start = start_of(p, chunks.prefix, row), number = chunks.number_of_list(i), end = (number + 1) * kSlots;
  const int begin = start > number * kSlots ? start : number * kSlots;
  if (i < chunks.leads) return {begin, end - begin};
  return {-1, list_slots(chunks, p.mask + size_t(row) * p.mask_words, p.mask_words, begin, end, slots)};
}

// The rows' outputs from their chunks, in order. One warp a column.
template <class T>
__device__ __forceinline__ void combine(const AttentionParams& p, const Columns& columns, const Chunks& chunks,
                                        const Partials& partials) {
  const int lane = int(threadIdx.x) % kWarp, head_dim = p.cache.head_dim;
  for (int column = int(threadIdx.x) / kWarp; column < columns.count; column += kAttentionWarps) {
    const int row = columns.row_of(column), head = columns.head_of(column);
    const int seen = chunks.prefix + count_bits(p.mask + size_t(row) * p.mask_words, p.mask_words);
    const int first = start_of(p, chunks.prefix, row) / kSlots, end = ceil_div(seen, kSlots);
    float max = -INFINITY;
    for (int chunk = first + lane; chunk < end; chunk += kWarp) {
      const float other = partials.max[partials.index(chunk, row, head)];
      max = other > max ? other : max;
    }
    max = warp_max(max);
    for (int d = lane * Vec<float>::size; d < head_dim; d += kWarp * Vec<float>::size) {
      float sum = 0.0f, out[Vec<float>::size] = {};
#pragma unroll 4
      for (int chunk = first; chunk < end; ++chunk) {
        const size_t at = partials.index(chunk, row, head);
        const float weight = expf(partials.max[at] - max);
        const Vec<float> values = load(partials.values + at * partials.stride + d);
        sum = fmaf(weight, partials.sum[at], sum);
#pragma unroll
        for (int i = 0; i < Vec<float>::size; ++i) out[i] = fmaf(weight, values[i], out[i]);
      }
      T* const to = static_cast<T*>(p.out) + (size_t(row) * p.heads + head) * head_dim + d;
#pragma unroll
      for (int i = 0; i < Vec<float>::size; ++i)
        if (d + i < head_dim) to[i] = from_float<T>(out[i] / sum);
    }
  }
}

// grid: [kBlocks]; the blocks share the tiles' units. A tile's units are the chunks that all rows see and, for each of its rows,
// the others; who finishes a tile's last unit combines its chunks.
template <class Reader>
__global__ void __launch_bounds__(kAttentionThreads, Reader::resident)
    attention_kernel(const AttentionParams p, const Tiles tiles, const Partials partials, int32_t* counters) {
  auto& memory = shared_memory<AttentionMemory<Reader>>();
  wait_for_kernel_before();
  const int prefix = p.prefix + (p.base ? *p.base : 0);
  const Chunks chunks(prefix, p.mask_words, starts_of(p, prefix));
  const int group = p.heads / p.cache.kv_heads, units_a_tile = chunks.shared + tiles.rows * chunks.lists();
  const int units = p.cache.kv_heads * tiles.slices * tiles.count * units_a_tile;
  for (int unit = int(blockIdx.x); unit < units; unit += int(gridDim.x)) {
    const int tile = unit / units_a_tile, slice = tile / tiles.count;
    const int part = unit % units_a_tile;
    const int kv_head = slice / tiles.slices, first_head = slice % tiles.slices * tiles.heads;
    const int first_row = tile % tiles.count * tiles.rows;
    const int heads = group - first_head < tiles.heads ? group - first_head : tiles.heads;
    const int rows = p.num_rows - first_row < tiles.rows ? p.num_rows - first_row : tiles.rows;
    const Columns columns{first_row, kv_head * group + first_head, heads, rows * heads};
    Columns served = columns;
    int chunk = chunks.first + chunks.leads + part;
    SlotList slots{chunk * kSlots, kSlots};
    if (part >= chunks.shared) {
      const int list = (part - chunks.shared) % chunks.lists();
      served.row = first_row + (part - chunks.shared) / chunks.lists();
      served.count = heads;
      slots = {-1, 0};
      if (served.row < first_row + rows) slots = own_slots(p, chunks, served.row, list, memory.slots);
      chunk = chunks.number_of_list(list);
    }
    if (slots.n > 0) attend<Reader>(p, served, kv_head, chunk, slots, partials, memory);
    if (last_block(counters + tile, units_a_tile, &memory.last)) combine<typename Reader::T>(p, columns, chunks, partials);
  }
}

// body(RowReader) for rows of head_dim elements, up to 256.
template <class T, class Body>
void with_reader(int head_dim, bool aligned, Body&& body) {
  with_flag(aligned, [&](auto flag) {
    constexpr bool kAligned = decltype(flag)::value;
    const int parts = ceil_div(head_dim, Vec<T>::size);
    if (parts <= 8) return body(RowReader<T, kAligned, 8, 1>());
    if (parts <= 16) return body(RowReader<T, kAligned, 16, 1>());
    if (parts <= 32) return body(RowReader<T, kAligned, 32, 1>());
    if constexpr (sizeof(T) == 4)
      if (parts <= 64) return body(RowReader<T, kAligned, 32, 2>());
    throw std::invalid_argument("tree_attention: expected a head_dim of at most 256, got " + std::to_string(head_dim));
  });
}

int chunks_of(int slots) { return ceil_div(slots, kSlots); }

int stride_of(int head_dim) { return ceil_div(head_dim, Vec<float>::size) * Vec<float>::size; }

// Of the workspace: a row's results of all its chunks.
size_t floats_of_row(int heads, int head_dim, int capacity) {
  return size_t(chunks_of(capacity)) * heads * (stride_of(head_dim) + 2);
}

// The rows whose results are in the workspace at a time: those of a pass through our own layers, or more if 128 MB hold more.
int rows_together(int num_rows, int heads, int head_dim, int capacity) {
  constexpr size_t kFloats = (128 << 20) / sizeof(float);
  constexpr int kLeast = 16;
  return std::min(num_rows,
                  std::max(kLeast, int(std::min<size_t>(kFloats / floats_of_row(heads, head_dim, capacity), num_rows))));
}

void launch_rows(const AttentionParams& p, Workspace workspace, StreamHandle stream) {
  const Tiles tiles(p.num_rows, p.heads / p.cache.kv_heads);
  const size_t results = size_t(chunks_of(p.cache.capacity)) * p.num_rows * p.heads;
  const int stride = stride_of(p.cache.head_dim);
  float* const max = workspace.floats + results * stride;
  const Partials partials{workspace.floats, max, max + results, stride, p.num_rows, p.heads};

  const Chunks longest(p.cache.capacity, p.mask_words, {0, 0});
  const int units = p.cache.kv_heads * tiles.slices * tiles.count * (longest.shared + tiles.rows * (longest.tails + 1));
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool aligned = p.cache.head_dim % Vec<T>::size == 0 && p.q_stride % Vec<T>::size == 0 && aligned16(p.q) &&
                         aligned16(p.k_cache) && aligned16(p.v_cache);
    with_reader<T>(p.cache.head_dim, aligned, [&](auto reader) {
      using Reader = decltype(reader);
      launch<attention_kernel<Reader>>("tree_attention", std::min(units, kBlocks), kAttentionThreads,
                                       sizeof(AttentionMemory<Reader>), stream, p, tiles, partials, workspace.counters);
    });
  });
}

}  // namespace

void tree_attention(const AttentionParams& p, Workspace workspace, StreamHandle stream) {
  const Tiles all(p.num_rows, p.heads / p.cache.kv_heads);
  const int slices = p.cache.kv_heads * all.slices;
  const int rows_at_once =
      std::min(rows_together(p.num_rows, p.heads, p.cache.head_dim, p.cache.capacity), kCounters / slices * all.rows);
  for (int row = 0; row < p.num_rows; row += rows_at_once) {
    AttentionParams part = p;
    part.num_rows = std::min(rows_at_once, p.num_rows - row);
    part.q = static_cast<const char*>(p.q) + size_t(row) * p.q_stride * size_of(p.dtype);
    part.mask = p.mask + size_t(row) * p.mask_words;
    if (p.positions) part.positions = p.positions + row;
    part.out = static_cast<char*>(p.out) + size_t(row) * p.heads * p.cache.head_dim * size_of(p.dtype);
    launch_rows(part, workspace, stream);
  }
}

size_t attention_workspace(int num_rows, int heads, int head_dim, int capacity) {
  return rows_together(num_rows, heads, head_dim, capacity) * floats_of_row(heads, head_dim, capacity);
}

}  // namespace sirius::cuda
