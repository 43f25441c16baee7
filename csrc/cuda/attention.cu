// Split-KV attention. The slots that a row sees, in order, are cut into chunks; each chunk yields a maximum, a sum of
// exponentials and a weighted sum of values, which are combined in order. Where a chunk ends depends on how many slots the row
// sees before it and on nothing else, so a token's result is the same bits in a pass of its own, in a window, or in a tree. A
// slot's number in that order is its position: with a sliding window a row's chunks end where they would end without it, the
// first one that it sees begins with the first position that it sees, and so its bits depend on its position alone.
//
// Whole chunks of the prefix that all rows see are the same for all: a block serves up to 16 queries of a kv head. The chunks in
// which some row's window begins, what is left of the prefix, and the slots in a row's mask are a list of its own for every row.
// Device memory must deliver the keys and values of 2 * kv_heads * head_dim * (what of the prefix is seen + num_rows) elements
// once; further readings, by blocks of other queries, find them in L2.
#include <algorithm>

#include "attention.cuh"

namespace sirius::cuda {
namespace {

// Chunks are short where a text is short, so that a thousand tokens fill a card: of 8 kv heads 128 blocks. From kDoubling on a
// chunk has twice as many slots in each doubling of the position, so that their results stay few, up to kMostSlots.
constexpr int kDoubling = 4096, kOfDoubling = kDoubling / kStep / 2;  // chunks from one doubling to the next
constexpr int kDoublings = 3, kStepBits = 6;
static_assert(kStep == 1 << kStepBits && kStep << kDoublings == kMostSlots);

// The number of the chunk that a position is in, and the first position of a chunk.
__host__ __device__ constexpr int chunk_at(int position) {
  int doublings = 0;
  for (int i = 0; i < kDoublings; ++i) doublings += position >= kDoubling << i;
  return kOfDoubling * doublings + (position >> (kStepBits + doublings));
}
__host__ __device__ constexpr int begin_of(int chunk) {
  int doublings = chunk / kOfDoubling - 1;
  doublings = doublings < 0 ? 0 : doublings > kDoublings ? kDoublings : doublings;
  return (chunk - kOfDoubling * doublings) << (kStepBits + doublings);
}
static_assert(begin_of(63) == 63 * 64 && begin_of(64) == 4096 && begin_of(96) == 8192 && begin_of(129) == 16384 + 512);
static_assert(chunk_at(4095) == 63 && chunk_at(4096) == 64 && chunk_at(8191) == 95 && chunk_at(16384 + 1023) == 129);

// How rows and heads are divided, known when a graph is captured. A tile is the rows of a block: several only where one slice of
// a kv head's group is all of it.
struct Tiles {
  int group;  // query heads of a kv head
  Divisor slices, heads, rows, count,
      total;  // slices of a group, query heads of a slice, rows of a tile, tiles of a slice, tiles

  Tiles(int num_rows, int kv_heads, int group_, int columns)
      : group(group_),
        slices(ceil_div(group, columns)),
        heads(ceil_div(group, slices.by)),
        rows(std::min(columns / heads.by, num_rows)),
        count(ceil_div(num_rows, rows.by)),
        total(kv_heads * slices.by * count.by) {}

  Tiles(const AttentionParams& p)
      : Tiles(p.num_rows, p.cache.kv_heads, p.heads / p.cache.kv_heads, p.cache.head_dim <= 2 * kSpan ? 2 * kGroup : kGroup) {}
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
#pragma unroll 1
  for (int row = int(threadIdx.x) % kWarp; row < p.num_rows; row += kWarp) {
    const int start = start_of(p, prefix, row);
    least = start < least ? start : least;
    most = start > most ? start : most;
  }
  return {warp_reduce(least, [](int a, int b) { return a < b ? a : b; }),
          warp_reduce(most, [](int a, int b) { return a > b ? a : b; })};
}

// How the slots are divided, known when the kernel runs. In order there are chunks of the prefix that not all rows see from their
// beginning on, whole ones that all see, and those of what is left of the prefix and of the mask.
struct Chunks {
  int prefix, rest;                 // slots of the prefix, and of them in the tails
  int first, leads, shared, tails;  // the first chunk's number; then how many there are of each kind

  __host__ __device__ Chunks(int prefix_, int mask_words, Starts starts) : prefix(prefix_), first(chunk_at(starts.least)) {
    const int whole = chunk_at(prefix), inside = chunk_at(starts.most);
    const int seen_by_all = inside + (begin_of(inside) < starts.most);
    rest = prefix - begin_of(whole);
    leads = (seen_by_all < whole ? seen_by_all : whole) - first;
    shared = whole - first - leads;
    tails = chunk_at(prefix + mask_words * 64 - 1) + 1 - whole;
  }

  // Chunks that are a list of its own for every row.
  __host__ __device__ int lists() const { return leads + tails; }
  __host__ __device__ int number_of_list(int i) const { return first + (i < leads ? i : shared + i); }
};

__device__ __forceinline__ int count_bits(const uint64_t* mask, int words) {
  int n = 0;
#pragma unroll 1
  for (int w = 0; w < words; ++w) n += __popcll(mask[w]);
  return n;
}

// The slots of the row's positions from begin to end, of those after the whole chunks, go to `slots`. Returns how many.
__device__ int list_slots(const Chunks& chunks, const uint64_t* mask, int words, int begin, int end, int32_t* slots) {
#pragma unroll 1
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
  const int start = start_of(p, chunks.prefix, row), number = chunks.number_of_list(i), end = begin_of(number + 1);
  const int begin = start > begin_of(number) ? start : begin_of(number);
  if (i < chunks.leads) return {begin, end - begin};
  return {-1, list_slots(chunks, p.mask + size_t(row) * p.mask_words, p.mask_words, begin, end, slots)};
}

// What a block does at a time.
struct Unit {
  Columns served;            // whose result this is
  int kv_head, chunk, list;  // list: which of the row's own; -1: a chunk that all rows see

  __device__ __forceinline__ Unit(const AttentionParams& p, const Tiles& tiles, const Chunks& chunks, int number)
      : served{0, 0, 0, tiles.heads} {
    const int tile = tiles.total.rest(number), part = tiles.total.quotient(number), slice = tiles.count.quotient(tile);
    const int first_head = tiles.slices.rest(slice) * tiles.heads.by, first_row = tiles.count.rest(tile) * tiles.rows.by;
    const int heads = min(tiles.group - first_head, tiles.heads.by), rows = min(p.num_rows - first_row, tiles.rows.by);
    kv_head = tiles.slices.quotient(slice);
    served = {first_row, kv_head * tiles.group + first_head, rows * heads, tiles.heads};
    // Lists first, which must be made; then the longest chunks.
    const int of_lists = tiles.rows.by * chunks.lists();
    if (part < of_lists) {
      list = tiles.rows.quotient(part);
      chunk = chunks.number_of_list(list);
      const int row = tiles.rows.rest(part);
      served.row += row;
      served.count = row < rows ? heads : 0;
    } else {
      list = -1;
      chunk = chunks.first + chunks.leads + chunks.shared - 1 - (part - of_lists);
    }
  }
};

// The number itself, of which the compiler knows nothing: what was made of it before must be made again.
__device__ __forceinline__ int forgotten(int number) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(number));
#endif
  return number;
}

// Of memory that may be written meanwhile. It leaves nothing in L1, where who reads it after the wait would find it.
__device__ __forceinline__ int32_t glance(const int32_t* at) {
#if defined(__CUDA_ARCH__)
  int32_t value;
  asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(value) : "l"(at));
  return value;
#else
  return *at;
#endif
}

// Asks for what a block will most likely read first, up to kStep slots, while the kernel before still runs. Which it is stands in
// memory that an earlier kernel has written, and if it were not so, only what is asked for would be wrong.
template <class A>
__device__ __forceinline__ void ask_early(const AttentionParams& p, const Tiles& tiles) {
  if (p.window != 0) return;
  const int prefix = p.prefix + (p.base ? glance(p.base) : 0);
  if (prefix < 0 || prefix > p.cache.capacity) return;
  const Chunks chunks(prefix, p.mask_words, {0, 0});
  const Unit unit(p, tiles, chunks, int(blockIdx.x));
  if (unit.chunk < 0) return;
  const int begin = begin_of(unit.chunk), n = prefix - begin < kStep ? prefix - begin : kStep;
  constexpr int kLine = 128;
  const size_t row = size_t(p.cache.head_dim) * sizeof(typename A::T);
  const size_t first = (size_t(unit.kv_head) * p.cache.capacity + begin) * row;
#pragma unroll 1
  for (int at = int(threadIdx.x) * kLine; at < n * int(row); at += kAttentionThreads * kLine) {
    prefetch(static_cast<const char*>(p.k_cache) + first + at);
    prefetch(static_cast<const char*>(p.v_cache) + first + at);
  }
}

// The chunks stand in shared memory: registers are for keys and values.
template <class A>
struct KernelMemory {
  AttentionMemory<A> attention;
  Chunks chunks;
};

// grid: any number of blocks; they share the tiles' units. A tile's units are the chunks that all rows see and, for each of its
// rows, the others.
template <class A>
__global__ void __launch_bounds__(kAttentionThreads, A::resident)
    attention_kernel(const AttentionParams p, const Tiles tiles, const Partials partials) {
  auto& [memory, chunks] = shared_memory<KernelMemory<A>>();
  ask_early<A>(p, tiles);
  wait_for_kernel_before<true>();
  const int prefix = p.prefix + (p.base ? *p.base : 0);
  const Starts starts = starts_of(p, prefix);
  if (threadIdx.x == 0) chunks = Chunks(prefix, p.mask_words, starts);
  __syncthreads();
  const int units_a_tile = chunks.shared + tiles.rows.by * chunks.lists();
  const int units = tiles.total.by * units_a_tile;
  for (int number = int(blockIdx.x); number < units; number += int(gridDim.x)) {
    const Unit unit(p, tiles, chunks, number);
    SlotList slots{begin_of(unit.chunk), begin_of(unit.chunk + 1) - begin_of(unit.chunk)};
    if (unit.list >= 0) {
      slots = {-1, 0};
      if (unit.served.count > 0) slots = own_slots(p, chunks, unit.served.row, unit.list, memory.slots);
    }
    if (slots.n == 0) continue;
    attend<A>(p, unit.served, unit.kv_head, slots, memory);
    __syncthreads();
    // Anew: while keys and values are multiplied they need the registers.
    const Unit done(p, tiles, chunks, forgotten(number));
    each_four(done.served, p.cache.head_dim, [&](int column, int d) {
      const Joined merged = joined_warps(memory, column, d);
      const size_t at = partials.index(done.chunk, done.served.row_of(column), done.served.head_of(column));
      store(partials.values + at * partials.stride + d, Vec<float>::rounded(merged.values));
      if (d != 0) return;
      partials.max[at] = merged.max;
      partials.sum[at] = merged.sum;
    });
    __syncthreads();
  }
}

constexpr int kCombineWarps = 8, kTogether = 4;  // warps of a block that combines, and chunks that each looks at at a time

// What each warp has of its chunks: as AttentionMemory.
struct CombineMemory {
  float values[kCombineWarps][4 * kSpan + Vec<float>::size];
  float max[kCombineWarps], sum[kCombineWarps];
};

// grid: [heads, rows]. One query's output from its chunks. A warp has every kCombineWarps-th chunk, and loads the results of
// kTogether of them at once; then the warps are joined. Which chunk is whose, and beside which, depends on its number.
template <class T>
__global__ void __launch_bounds__(kCombineWarps* kWarp) combine_kernel(const AttentionParams p, const Partials partials) {
  constexpr int kSize = Vec<float>::size, kTurn = kTogether * kCombineWarps;
  auto& memory = shared_memory<CombineMemory>();
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp, head_dim = p.cache.head_dim;
  const int head = int(blockIdx.x), row = int(blockIdx.y);
  wait_for_kernel_before<true>();
  const int prefix = p.prefix + (p.base ? *p.base : 0);
  const int first = chunk_at(start_of(p, prefix, row));
  const int end = chunk_at(prefix + count_bits(p.mask + size_t(row) * p.mask_words, p.mask_words) - 1) + 1;
  for (int d = lane * kSize; d < head_dim; d += kWarp * kSize) {
    Joined joined;
#pragma unroll 1
    for (int turn = first / kTurn * kTurn + warp; turn < end; turn += kTurn) {
      bool there[kTogether];
      float maxima[kTogether], sums[kTogether];
      Vec<float> parts[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int chunk = turn + i * kCombineWarps;
        there[i] = first <= chunk && chunk < end;
        const size_t at = partials.index(there[i] ? chunk : first, row, head);
        maxima[i] = partials.max[at];
        sums[i] = partials.sum[at];
        parts[i] = load(partials.values + at * partials.stride + d);
      }
      joined.join(maxima, sums, parts, there);
    }
    store(&memory.values[warp][d], Vec<float>::rounded(joined.values));
    if (lane == 0) {
      memory.max[warp] = joined.max;
      memory.sum[warp] = joined.sum;
    }
  }
  __syncthreads();
  T* const out = static_cast<T*>(p.out) + (size_t(row) * p.heads + head) * head_dim;
  for (int d = int(threadIdx.x) * kSize; d < head_dim; d += kCombineWarps * kWarp * kSize) {
    Vec<float> parts[kCombineWarps];
#pragma unroll
    for (int i = 0; i < kCombineWarps; ++i) parts[i] = load(&memory.values[i][d]);
    Joined joined;
    joined.join(memory.max, memory.sum, parts);
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      if (d + i < head_dim) out[d + i] = from_float<T>(joined.values[i] / joined.sum);
  }
}

// body(Attention) for heads of up to 256 elements.
template <class T, class Body>
void with_attention(int head_dim, bool aligned, int columns, Body&& body) {
  with_flag(aligned, [&](auto flag) {
    constexpr bool kAligned = decltype(flag)::value;
    const auto with_groups = [&](auto spans) {
      if (columns <= kGroup) return body(Attention<T, kAligned, spans.value, 1>());
      if constexpr (spans.value <= 2) return body(Attention<T, kAligned, spans.value, 2>());
    };
    if (head_dim <= kSpan) return with_groups(std::integral_constant<int, 1>());
    if (head_dim <= 2 * kSpan) return with_groups(std::integral_constant<int, 2>());
    if (head_dim <= 4 * kSpan) return with_groups(std::integral_constant<int, 4>());
    throw std::invalid_argument("tree_attention: expected a head_dim of at most 256, got " + std::to_string(head_dim));
  });
}

int chunks_of(int slots) { return chunk_at(slots - 1) + 1; }

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
  const Tiles tiles(p);
  const size_t results = size_t(chunks_of(p.cache.capacity)) * p.num_rows * p.heads;
  const int stride = stride_of(p.cache.head_dim);
  float* const max = workspace.floats + results * stride;
  const Partials partials{workspace.floats, max, max + results, stride, p.num_rows, p.heads};

  const Chunks longest(p.cache.capacity, p.mask_words, {0, 0});
  const int units = tiles.total.by * (longest.shared + tiles.rows.by * (longest.tails + 1));
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool aligned = p.cache.head_dim % Vec<T>::size == 0 && p.q_stride % Vec<T>::size == 0 && aligned16(p.q) &&
                         aligned16(p.k_cache) && aligned16(p.v_cache);
    with_attention<T>(p.cache.head_dim, aligned, tiles.rows.by * tiles.heads.by, [&](auto attention) {
      using A = decltype(attention);
      // No more than are there at a time: most have nothing to do before a cache is full.
      launch<attention_kernel<A>>("tree_attention", std::min(units, A::resident * multiprocessors()), kAttentionThreads,
                                  sizeof(KernelMemory<A>), stream, p, tiles, partials);
    });
    launch<combine_kernel<T>>("tree_attention", dim3(p.heads, p.num_rows), kCombineWarps * kWarp, sizeof(CombineMemory), stream,
                              p, partials);
  });
}

}  // namespace

void tree_attention(const AttentionParams& p, Workspace workspace, StreamHandle stream) {
  const int rows_at_once = rows_together(p.num_rows, p.heads, p.cache.head_dim, p.cache.capacity);
  for (int row = 0; row < p.num_rows; row += rows_at_once) {
    AttentionParams part = p;
    part.num_rows = std::min(rows_at_once, p.num_rows - row);
    if (p.softcap != 0.0f) part.scale /= p.softcap;
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
