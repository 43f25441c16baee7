// One chunk of split-KV attention: some queries against the cache slots of a chunk, by one block.
//
// A warp multiplies sixteen slots at a time with up to eight queries (sixteen where `groups` is 2), and goes on with those that
// are kStep further on; what its slots give joins what it has by a running maximum. Then the warps' results are merged, in their
// order. A query is a column of every product: nothing of it depends on which queries stand beside it, or on how many.
//
// 16-bit types multiply on tensor cores. Scores are keys [16 slots, head_dim] times queries [head_dim, 8], outputs are values
// turned over [head_dim, 16 slots] times weights [16 slots, 8]. Lane 4 g + t gets scores of slots g and g + 8, but is asked for
// weights of column g: the tiles of 8 by 8 between are transposed by one instruction each. Keys and values come from the cache
// as they lie there, 16 bytes a lane, and never pass through shared memory. Weights are rounded to T, as on the CPU.
#pragma once

#include "mma.cuh"

namespace sirius::cuda {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = kAttentionWarps * kWarp;
constexpr int kAtOnce = 16;                       // slots that a warp multiplies
constexpr int kStep = kAttentionWarps * kAtOnce;  // slots that a block does
constexpr int kGroup = 8;                         // queries of a product
constexpr int kMostSlots = 8 * kStep;             // of a chunk
constexpr int kSpan = 64;                         // elements of a head: eight lanes' 16 bytes of 16-bit types

// Which kernel. Spans: head_dim is at most so many times kSpan. Groups: of queries, kGroup each.
template <class T_, bool Aligned_, int Spans_, int Groups_>
struct Attention {
  using T = T_;
  static constexpr bool aligned = Aligned_;
  static constexpr int spans = Spans_, groups = Groups_;
  static constexpr int columns = groups * kGroup;
  // Registers hold outputs and queries of up to 128 elements beside the next slots' keys and values. Of more, all is loaded where
  // it is used, values one half after the other.
  static constexpr bool late = spans > 2 && !std::is_same_v<T, float>;
  // Blocks of a multiprocessor: 168 registers a thread, or 255.
  static constexpr int resident = sizeof(T) == 2 && aligned && groups == 1 && spans <= 2 ? 3 : 2;
};

// A query vector and where its results go: column i is row `row + i / heads`, head `head + i % heads`.
struct Columns {
  int row, head, count;
  Divisor heads;

  __device__ __forceinline__ int row_of(int column) const { return row + heads.quotient(column); }
  __device__ __forceinline__ int head_of(int column) const { return head + heads.rest(column); }
};

// Chunk results: index(...) is where one query's are.
struct Partials {
  float *values, *max, *sum;  // [chunks, num_rows, heads], values times `stride`
  int stride, num_rows, heads;

  __device__ __forceinline__ size_t index(int chunk, int row, int head) const {
    return (size_t(chunk) * num_rows + row) * heads + head;
  }
};

template <class A>
struct AttentionMemory {
  // What each warp has of a column: its maximum, its sum, and its values times the exponentials. Rows of values stand apart, so
  // that the lanes of a warp meet in few banks.
  float values[kAttentionWarps][A::columns][A::spans * kSpan + Vec<float>::size];
  float max[kAttentionWarps][A::columns], sum[kAttentionWarps][A::columns];
  float weights[kAttentionWarps][std::is_same_v<typename A::T, float> ? kAtOnce : 1][kGroup];  // of float32
  int32_t slots[kMostSlots];
};

// The first n slots of a list; or from `first` on, if first is not negative.
struct SlotList {
  int first, n;
};

// 16 bytes of keys or values, `Bytes` after `at`; they stay in L2 for blocks of other queries. `into` stays what it is unless
// they are `there`: what it was is as good wherever nothing is. As load_weights, but not by the path for what no kernel writes:
// the kernel before wrote some of it.
template <int Bytes, class T>
__device__ __forceinline__ void load_cache(Vec<T>& into, const T* at, bool there) {
#if defined(__CUDA_ARCH__)
  asm volatile(
      "{.reg .pred there;\n"
      "setp.ne.u32 there, %5, 0;\n"
      "@there ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4 + %6];}"
      : "+r"(into.words[0]), "+r"(into.words[1]), "+r"(into.words[2]), "+r"(into.words[3])
      : "l"(at), "r"(uint32_t(there)), "n"(Bytes));
#else
  if (!there) return;
  at += Bytes / sizeof(T);
  expect_aligned(at);
  std::memcpy(&into, at, sizeof(into));
#endif
}

// A kv head's keys or values of a chunk.
template <class A>
struct CacheRows {
  using T = typename A::T;
  const T* cache;  // [capacity, head_dim]
  SlotList slots;
  const int32_t* list;
  int head_dim;

  struct Row {
    const T* at;
    bool there;
  };
  // In a place of the chunk; none after the last one.
  __device__ __forceinline__ Row row(int place) const {
    const bool there = place < slots.n;
    int slot = slots.first + place;
    if (slots.first < 0) slot = list[there ? place : 0];
    return {cache + size_t(there ? slot : 0) * head_dim, there};
  }
  // Its elements from begin + Offset on. After the end of a row `into` stays what it is, and so it does if there is no row.
  template <int Offset>
  __device__ __forceinline__ void part(Vec<T>& into, const Row& row, int begin) const {
    const int n = row.there ? head_dim : 0;
    if constexpr (A::aligned)
      load_cache<Offset * sizeof(T)>(into, row.at + begin, begin + Offset < n);
    else
      into = load_elements<Vec<T>::size>(row.at, begin + Offset, n);
  }
};

// body(std::integral_constant<int, i>()) for every i below N.
template <int N, class Body>
__device__ __forceinline__ void each_index(Body body) {
  if constexpr (N > 0) {
    each_index<N - 1>(body);
    body(std::integral_constant<int, N - 1>());
  }
}

// Some floats that a lane brings, all of one struct.
template <class Floats>
__device__ __forceinline__ Floats exchanged(const Floats& mine, int flip) {
#if defined(__CUDACC__)
  Floats others;
#pragma unroll
  for (int i = 0; i < int(sizeof(mine.v) / sizeof(float)); ++i) others.v[i] = __shfl_xor_sync(kAllLanes, mine.v[i], flip);
  return others;
#else
  return __shfl_xor_sync(kAllLanes, mine, flip);  // at once: every exchange takes simt a turn of all lanes
#endif
}

// The query vectors of a unit.
template <class A>
struct QueryRows {
  const AttentionParams& p;
  const Columns& columns;

  __device__ __forceinline__ Vec<typename A::T> part(int column, int begin) const {
    using T = typename A::T;
    const int there = column < columns.count ? column : 0;
    const T* const row = static_cast<const T*>(p.q) + size_t(columns.row_of(there)) * p.q_stride +
                         size_t(columns.head_of(there)) * p.cache.head_dim;
    const int n = column < columns.count ? p.cache.head_dim : 0;
    if constexpr (!A::aligned) return load_elements<Vec<T>::size>(row, begin, n);
    Vec<T> out{};
    load_cache<0>(out, row + begin, begin < n);
    return out;
  }
};

// Keys, values and queries as a lane holds them, and the two products. c: scores, then weights, of (slot g, column 2 t),
// (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).
template <class A, class T = typename A::T>
struct Fragments {
  static constexpr int kParts = kSpan / 32 * A::spans;  // 32 elements are 16 bytes of each t

  struct Queries {
    Vec<T> x[kParts];
    __device__ __forceinline__ void load(const QueryRows<A>& rows, int group) {
#pragma unroll
      for (int i = 0; i < kParts; ++i) x[i] = rows.part(group * kGroup + lane_row(), i * 32 + lane_part() * Vec<T>::size);
    }
  };

  struct Keys {
    Vec<T> k[kParts][2] = {};
    __device__ __forceinline__ void load(const CacheRows<A>& rows, int first) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto row = rows.row(first + half * 8 + lane_row());
        each_index<kParts>([&](auto i) { rows.template part<i.value * 32>(k[i.value][half], row, lane_part() * Vec<T>::size); });
      }
    }
    __device__ __forceinline__ void score(const CacheRows<A>&, const QueryRows<A>&, const Queries& q, float (&c)[4]) const {
#pragma unroll
      for (int i = 0; i < kParts; ++i)
#pragma unroll
        for (int w = 0; w < 4; w += 2)
          mma<T>(c, {{k[i][0].words[w], k[i][1].words[w], k[i][0].words[w + 1], k[i][1].words[w + 1]},
                     {q.x[i].words[w], q.x[i].words[w + 1]}});
    }
  };

  // Of kHeld spans from First on.
  struct Values {
    static constexpr int kHeld = A::late ? A::spans / 2 : A::spans;
    Vec<T> v[kHeld][4] = {};
    template <int First>
    __device__ __forceinline__ void load(const CacheRows<A>& rows, int first) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const auto row = rows.row(first + k / 2 * 8 + lane_part() * 2 + k % 2);
        each_index<kHeld>(
            [&](auto i) { rows.template part<(First + i.value) * kSpan>(v[i.value][k], row, lane_row() * Vec<T>::size); });
      }
    }
  };

  // Of elements kSpan * i + 8 g + 2 j (+ 1) and columns 2 t (+ 1).
  struct Outputs {
    float o[A::spans][4][4] = {};

    __device__ __forceinline__ void scale(const float (&by)[2]) {
#pragma unroll
      for (int i = 0; i < A::spans; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int k = 0; k < 4; ++k) o[i][j][k] *= by[k % 2];
    }

    template <int First, class Memory>
    __device__ __forceinline__ void add(const CacheRows<A>&, const Values& values, int, const float (&c)[4], Memory&) {
      const uint32_t weights[2] = {transposed(word_of<T>(c[0], c[1])), transposed(word_of<T>(c[2], c[3]))};
#pragma unroll
      for (int i = 0; i < Values::kHeld; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Vec<T>(&v)[4] = values.v[i];
          mma<T>(o[First + i][j], {{lower_halves(v[0].words[j], v[1].words[j]), upper_halves(v[0].words[j], v[1].words[j]),
                                    lower_halves(v[2].words[j], v[3].words[j]), upper_halves(v[2].words[j], v[3].words[j])},
                                   {weights[0], weights[1]}});
        }
    }

    // The lane's elements of one of its two columns.
    __device__ __forceinline__ void put(int which, float* column) const {
#pragma unroll
      for (int i = 0; i < A::spans; ++i)
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          const float four[4] = {o[i][j][which], o[i][j][which + 2], o[i][j + 1][which], o[i][j + 1][which + 2]};
          store(column + i * kSpan + lane_row() * 8 + j * 2, Vec<float>::rounded(four));
        }
    }
  };
};

// float32, which has no tensor cores that keep its precision: keys and values are read where they are used.
template <class A>
struct Fragments<A, float> {
  static constexpr int kSize = Vec<float>::size;

  struct Queries {
    int first;
    __device__ __forceinline__ void load(const QueryRows<A>&, int group) { first = group * kGroup; }
  };

  struct Keys {
    int first;
    __device__ __forceinline__ void load(const CacheRows<A>&, int from) { first = from; }
    __device__ __forceinline__ void score(const CacheRows<A>& rows, const QueryRows<A>& queries, const Queries& q,
                                          float (&c)[4]) const {
      struct {
        float v[2 * kGroup] = {};
      } sums;
      const auto upper = rows.row(first + lane_row()), lower = rows.row(first + 8 + lane_row());
#pragma unroll 1
      for (int begin = lane_part() * kSize; begin < A::spans * kSpan; begin += 4 * kSize) {
        Vec<float> k[2] = {};
        rows.template part<0>(k[0], upper, begin);
        rows.template part<0>(k[1], lower, begin);
#pragma unroll
        for (int column = 0; column < kGroup; ++column) {
          const Vec<float> x = queries.part(q.first + column, begin);
#pragma unroll
          for (int i = 0; i < 2 * kSize; ++i) {
            float& sum = sums.v[i / kSize * kGroup + column];
            sum = fmaf(k[i / kSize][i % kSize], x[i % kSize], sum);
          }
        }
      }
#pragma unroll
      for (int flip = 1; flip < 4; flip *= 2) {
        const auto others = exchanged(sums, flip);
#pragma unroll
        for (int i = 0; i < 2 * kGroup; ++i) sums.v[i] += others.v[i];
      }
#pragma unroll
      for (int i = 0; i < 2 * kGroup; ++i)
        if (i % kGroup / 2 == lane_part()) c[i / kGroup * 2 + i % 2] = sums.v[i];
    }
  };

  struct Values {
    template <int>
    __device__ __forceinline__ void load(const CacheRows<A>&, int) {}
  };

  // Of elements 32 * i + 4 g + j and columns 2 t (+ 1).
  struct Outputs {
    static constexpr int kParts = kSpan / 32 * A::spans;
    float o[kParts][kSize][2] = {};

    __device__ __forceinline__ void scale(const float (&by)[2]) {
#pragma unroll
      for (int i = 0; i < kParts; ++i)
#pragma unroll
        for (int j = 0; j < kSize; ++j)
#pragma unroll
          for (int which = 0; which < 2; ++which) o[i][j][which] *= by[which];
    }

    template <int, class Memory>
    __device__ __forceinline__ void add(const CacheRows<A>& rows, const Values&, int first, const float (&c)[4], Memory& memory) {
      float (&weights)[kAtOnce][kGroup] = memory.weights[threadIdx.x / kWarp];
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[lane_row() + i / 2 * 8][lane_part() * 2 + i % 2] = c[i];
      __syncwarp();
#pragma unroll 1
      for (int slot = 0; slot < kAtOnce; ++slot) {
        const auto row = rows.row(first + slot);
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
          Vec<float> v = {};
          rows.template part<0>(v, row, i * 32 + lane_row() * kSize);
#pragma unroll
          for (int j = 0; j < kSize; ++j)
#pragma unroll
            for (int which = 0; which < 2; ++which)
              o[i][j][which] = fmaf(weights[slot][lane_part() * 2 + which], v[j], o[i][j][which]);
        }
      }
    }

    __device__ __forceinline__ void put(int which, float* column) const {
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        float four[kSize];
#pragma unroll
        for (int j = 0; j < kSize; ++j) four[j] = o[i][j][which];
        store(column + i * 32 + lane_row() * kSize, Vec<float>::rounded(four));
      }
    }
  };
};

// What a warp has so far of a group of queries: of the lane's two columns the largest score, and of its own slots the sum of
// exponentials.
struct Running {
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {};
};

// c: from products to exponentials, 0 from place n on; `running` and `outputs` become what they are beside the new maximum. With
// a soft cap p.scale is divided by it already: a division is a call.
template <class Outputs>
__device__ __forceinline__ void softmax(const AttentionParams& p, int first, int n, float (&c)[4], Running& running,
                                        Outputs& outputs) {
  struct {
    float v[2] = {-INFINITY, -INFINITY};
  } most;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    c[i] *= p.scale;
    if (p.softcap != 0.0f) c[i] = p.softcap * tanhf(c[i]);
    if (first + i / 2 * 8 + lane_row() >= n) c[i] = -INFINITY;
    most.v[i % 2] = c[i] > most.v[i % 2] ? c[i] : most.v[i % 2];
  }
#pragma unroll
  for (int flip = 4; flip < kWarp; flip *= 2) {
    const auto others = exchanged(most, flip);
#pragma unroll
    for (int i = 0; i < 2; ++i) most.v[i] = others.v[i] > most.v[i] ? others.v[i] : most.v[i];
  }
  float by[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float max = most.v[i] > running.max[i] ? most.v[i] : running.max[i];
    by[i] = expf(running.max[i] - max);
    running.max[i] = max;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] = expf(c[i] - running.max[i % 2]);
#pragma unroll
  for (int i = 0; i < 2; ++i) running.sum[i] = fmaf(running.sum[i], by[i], c[i] + c[i + 2]);
  outputs.scale(by);
}

// memory.values, max and sum: the warps' results for every column. Each key and value is read once.
template <class A>
__device__ __forceinline__ void attend(const AttentionParams& p, const Columns& columns, int kv_head, SlotList slots,
                                       AttentionMemory<A>& memory) {
  using T = typename A::T;
  using F = Fragments<A>;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp, head_dim = p.cache.head_dim;
  const size_t head = size_t(kv_head) * p.cache.capacity * head_dim;
  const CacheRows<A> key_rows{static_cast<const T*>(p.k_cache) + head, slots, memory.slots, head_dim};
  const CacheRows<A> value_rows{static_cast<const T*>(p.v_cache) + head, slots, memory.slots, head_dim};
  const QueryRows<A> query_rows{p, columns};

  typename F::Keys keys;
  typename F::Values values;
  typename F::Queries queries[A::groups];
  const auto load_queries = [&] {
#pragma unroll
    for (int group = 0; group < A::groups; ++group) queries[group].load(query_rows, group);
  };
  if constexpr (!A::late) {
    keys.load(key_rows, warp * kAtOnce);
    values.template load<0>(value_rows, warp * kAtOnce);
    load_queries();
  }
  typename F::Outputs outputs[A::groups];
  Running running[A::groups];
#pragma unroll 1
  for (int first = warp * kAtOnce; first < slots.n; first += kStep) {
    if constexpr (A::late) {
      keys = {};
      keys.load(key_rows, first);
      load_queries();
    }
    float c[A::groups][4] = {};
#pragma unroll
    for (int group = 0; group < A::groups; ++group) keys.score(key_rows, query_rows, queries[group], c[group]);
    // What the next slots need is asked for as soon as its registers are free.
    if constexpr (!A::late) keys.load(key_rows, first + kStep);
#pragma unroll
    for (int group = 0; group < A::groups; ++group) softmax(p, first, slots.n, c[group], running[group], outputs[group]);
    const auto add = [&](auto span) {
#pragma unroll
      for (int group = 0; group < A::groups; ++group)
        outputs[group].template add<span.value>(value_rows, values, first, c[group], memory);
    };
    if constexpr (A::late) {
      each_index<2>([&](auto half) {
        constexpr int kSpans = F::Values::kHeld;
        values = {};
        values.template load<half.value * kSpans>(value_rows, first);
        add(std::integral_constant<int, half.value * kSpans>());
      });
    } else {
      add(std::integral_constant<int, 0>());
      values.template load<0>(value_rows, first + kStep);
    }
  }

#pragma unroll
  for (int group = 0; group < A::groups; ++group) {
    struct {
      float v[2];
    } sum{{running[group].sum[0], running[group].sum[1]}};
#pragma unroll
    for (int flip = 4; flip < kWarp; flip *= 2) {
      const auto others = exchanged(sum, flip);
#pragma unroll
      for (int i = 0; i < 2; ++i) sum.v[i] += others.v[i];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = group * kGroup + lane_part() * 2 + i;
      outputs[group].put(i, memory.values[warp][column]);
      if (lane < 4) {
        memory.max[warp][column] = running[group].max[i];
        memory.sum[warp][column] = sum.v[i];
      }
    }
  }
}

// Elements d to d + 3 of some results, joined by their largest maximum.
struct Joined {
  float max = -INFINITY, sum = 0.0f, values[Vec<float>::size] = {};

  // With the results of N more, or of those of them that are `there`.
  template <int N>
  __device__ __forceinline__ void join(const float (&maxima)[N], const float (&sums)[N], const Vec<float> (&parts)[N]) {
    bool there[N];
#pragma unroll
    for (int i = 0; i < N; ++i) there[i] = true;
    join(maxima, sums, parts, there);
  }
  template <int N>
  __device__ __forceinline__ void join(const float (&maxima)[N], const float (&sums)[N], const Vec<float> (&parts)[N],
                                       const bool (&there)[N]) {
    float largest = max;
#pragma unroll
    for (int i = 0; i < N; ++i) largest = there[i] && maxima[i] > largest ? maxima[i] : largest;
    // Before the first one, and after some of which nothing is finite, there is nothing to scale.
    const float by = max == largest ? 1.0f : expf(max - largest);
    max = largest;
    sum *= by;
#pragma unroll
    for (int j = 0; j < Vec<float>::size; ++j) values[j] *= by;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float weight = there[i] ? expf(maxima[i] - largest) : 0.0f;
      sum = fmaf(weight, sums[i], sum);
#pragma unroll
      for (int j = 0; j < Vec<float>::size; ++j) values[j] = fmaf(weight, parts[i][j], values[j]);
    }
  }
};

// Of a column what all warps have together, in their order.
template <class A>
__device__ __forceinline__ Joined joined_warps(const AttentionMemory<A>& memory, int column, int d) {
  float maxima[kAttentionWarps], sums[kAttentionWarps];
  Vec<float> parts[kAttentionWarps];
#pragma unroll
  for (int warp = 0; warp < kAttentionWarps; ++warp) {
    maxima[warp] = memory.max[warp][column];
    sums[warp] = memory.sum[warp][column];
    parts[warp] = load(&memory.values[warp][column][d]);
  }
  Joined out;
  out.join(maxima, sums, parts);
  return out;
}

// body(column, d) for every column and every four elements of it, by all threads.
template <class Body>
__device__ __forceinline__ void each_four(const Columns& columns, int head_dim, Body body) {
#pragma unroll 1
  for (int column = int(threadIdx.x) / kWarp; column < columns.count; column += kAttentionWarps)
#pragma unroll 1
    for (int d = int(threadIdx.x) % kWarp * Vec<float>::size; d < head_dim; d += kWarp * Vec<float>::size) body(column, d);
}

}  // namespace sirius::cuda
