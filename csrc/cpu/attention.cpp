// Split-KV attention. The tokens that a row sees are numbered by their positions: those of the prefix first, then those of the
// slots in its mask. They are cut into chunks of kSlots at multiples of kSlots; each chunk yields a maximum, a sum of
// exponentials and a weighted sum of values, which are combined in order. With a sliding window the first tokens are left out, of
// a chunk or with whole chunks. What is in a chunk depends on the row's own position and on what it sees, so a token's result is
// the same bits in a pass of its own, in a window of drafts, or in a tree.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa.h"
#include "ops.h"
#include "team.h"

namespace sirius::cpu {
namespace {

constexpr int kSlots = 128;  // multiple of 32 (see MatrixKernels::sum); 16 KB of keys at head_dim 64 in bf16

int chunks_of(int slots) { return (slots + kSlots - 1) / kSlots; }

int count_bits(const uint64_t* mask, int words) {
  int n = 0;
  for (int w = 0; w < words; ++w) n += __builtin_popcountll(mask[w]);
  return n;
}

// Chunk results, [kv_heads, chunks, num_rows * group]: values (times head_dim), maxima, sums.
struct Partials {
  float *values, *max, *sum;

  Partials(const AttentionParams& p, int chunks) {
    const size_t n = size_t(chunks) * p.num_rows * p.heads;
    values = p.workspace;
    max = values + n * p.cache.head_dim;
    sum = max + n;
  }
};

class Attention {
 public:
  explicit Attention(const AttentionParams& p)
      : p_(p),
        k_(kernels(p.dtype)),
        rows_(matrix_kernels(plain(p.dtype), p.dtype)),
        group_(p.heads / p.cache.kv_heads),
        shared_(shared_chunks(p)),
        first_(first_of_all(p) / kSlots),
        chunks_(chunks_of(p.prefix + p.mask_words * 64) - first_),
        partials_(p, chunks_) {}

  void run() {
    attend_shared();
    attend_alone();
    sync();
    combine();
  }

 private:
  // The first token that a row sees.
  static int first_of(const AttentionParams& p, int row) { return p.window ? std::max(0, p.positions[row] - p.window + 1) : 0; }

  static int first_of_all(const AttentionParams& p) {
    int first = first_of(p, 0);
    for (int row = 1; row < p.num_rows; ++row) first = std::min(first, first_of(p, row));
    return first;
  }

  // The chunks of the prefix that every row sees as a whole.
  static Range shared_chunks(const AttentionParams& p) {
    int first = 0;
    for (int row = 0; row < p.num_rows; ++row) first = std::max(first, first_of(p, row));
    const int end = p.prefix / kSlots;
    return {std::min(chunks_of(first), end), end};
  }

  int seen(int row) const { return p_.prefix + count_bits(p_.mask + size_t(row) * p_.mask_words, p_.mask_words); }

  // One head's keys or values, a row a slot.
  Matrix head_of(const void* cache, int kv_head) const {
    const auto [kv_heads, capacity, head_dim] = p_.cache;
    const size_t start = size_t(kv_head) * capacity * head_dim;
    return {.data = offset(cache, start, p_.dtype),
            .format = plain(p_.dtype),
            .rows = capacity,
            .cols = head_dim,
            .stride = int64_t(head_dim * size_of(p_.dtype))};
  }

  // Queries of the kv head's group for rows [row, row + n), packed side by side.
  void* pack(int kv_head, int row, int n) const {
    const int head_dim = p_.cache.head_dim;
    const size_t length = size_t(group_) * head_dim;
    char* gathered = scratch<char>(Scratch::first, n * length * size_of(p_.dtype));
    for (int j = 0; j < n; ++j)
      std::memcpy(offset(gathered, j * length, p_.dtype),
                  offset(p_.q, size_t(row + j) * p_.q_stride + kv_head * length, p_.dtype), length * size_of(p_.dtype));
    void* packed = scratch<char>(Scratch::packed, rows_.packed_size(n * group_, head_dim));
    rows_.pack(gathered, head_dim, n * group_, head_dim, packed);
    return packed;
  }

  // `columns` queries against n slots; results go to the chunk's columns from `first` on.
  template <class SlotAt>
  void attend(int kv_head, int chunk, int first, int columns, const void* queries, int n, const SlotAt& slot_at) const {
    const int head_dim = p_.cache.head_dim;
    const Matrix keys = head_of(p_.k_cache, kv_head), values = head_of(p_.v_cache, kv_head);
    const auto key = [&](int i) { return keys.place(slot_at(i)); };
    const auto value = [&](int i) { return values.place(slot_at(i)); };
    Rows<kSlots> rows;
    float* scores = scratch<float>(Scratch::second, size_t(columns) * kSlots);
    rows.fill(0, n, key, [&](int i) { return value(std::min(i, n - 1)); });
    rows_.dot(rows.all(), n, queries, columns, keys.form(), scores, kSlots);

    const size_t at = (size_t(kv_head) * chunks_ + chunk - first_) * p_.num_rows * group_ + first;
    char* weights = scratch<char>(Scratch::probabilities, size_t(columns) * kSlots * size_of(p_.dtype));
    for (int j = 0; j < columns; ++j)
      k_.softmax(scores + size_t(j) * kSlots, n, p_.scale, p_.softcap, offset(weights, size_t(j) * kSlots, p_.dtype),
                 partials_.max + at + j, partials_.sum + at + j);
    float* out = partials_.values + at * head_dim;
    std::fill_n(out, size_t(columns) * head_dim, 0.0f);
    rows.fill(0, n, n, value);
    rows_.sum(rows.all(), n, weights, kSlots, columns, values.form(), 0, head_dim, out, head_dim);
  }

  // One reading serves every row.
  void attend_shared() const {
    const int chunks = shared_.end - shared_.begin;
    const Range range = share(p_.cache.kv_heads * chunks);
    int packed_head = -1;
    void* queries = nullptr;
    for (int task = range.begin; task < range.end; ++task) {
      const int kv_head = task / chunks, chunk = shared_.begin + task % chunks;
      if (kv_head != packed_head) queries = pack(packed_head = kv_head, 0, p_.num_rows);
      attend(kv_head, chunk, 0, p_.num_rows * group_, queries, kSlots, [=](int i) { return chunk * kSlots + i; });
    }
  }

  // The chunks before and after those, which every row reads for itself: where its window begins, what is left of the prefix,
  // and the slots in its mask.
  void attend_alone() const {
    const Range range = share(p_.cache.kv_heads * p_.num_rows);
    for (int task = range.begin; task < range.end; ++task) {
      const int kv_head = task / p_.num_rows, row = task % p_.num_rows;
      int32_t* behind = scratch<int32_t>(Scratch::pointers, size_t(p_.mask_words) * 64);
      int end = p_.prefix;
      for (int w = 0; w < p_.mask_words; ++w)
        for (uint64_t bits = p_.mask[size_t(row) * p_.mask_words + w]; bits; bits &= bits - 1)
          behind[end++ - p_.prefix] = p_.prefix + w * 64 + __builtin_ctzll(bits);

      const void* queries = nullptr;
      const int first = first_of(p_, row);
      for (int chunk = first / kSlots; chunk < chunks_of(end); ++chunk) {
        if (chunk == shared_.begin) chunk = shared_.end;
        const int from = std::max(first, chunk * kSlots), to = std::min(end, (chunk + 1) * kSlots);
        if (from >= to) break;
        if (!queries) queries = pack(kv_head, row, 1);
        attend(kv_head, chunk, row * group_, group_, queries, to - from,
               [&](int i) { return from + i < p_.prefix ? from + i : behind[from + i - p_.prefix]; });
      }
    }
  }

  void combine() const {
    const int head_dim = p_.cache.head_dim;
    const Range range = share(p_.num_rows * p_.heads);
    for (int task = range.begin; task < range.end; ++task) {
      const int row = task / p_.heads, head = task % p_.heads;
      const int begin = first_of(p_, row) / kSlots, end = chunks_of(seen(row));
      const auto at = [&](int chunk) {
        return (size_t(head / group_) * chunks_ + chunk - first_) * p_.num_rows * group_ + row * group_ + head % group_;
      };
      float max = partials_.max[at(begin)], sum = 0.0f;
      for (int c = begin + 1; c < end; ++c) max = std::max(max, partials_.max[at(c)]);
      float* out = scratch<float>(Scratch::accumulator, head_dim);
      std::fill_n(out, head_dim, 0.0f);
      for (int c = begin; c < end; ++c) {
        const float weight = std::exp(partials_.max[at(c)] - max);
        sum += weight * partials_.sum[at(c)];
        const float* values = partials_.values + at(c) * head_dim;
        for (int d = 0; d < head_dim; ++d) out[d] += weight * values[d];
      }
      for (int d = 0; d < head_dim; ++d) out[d] /= sum;
      k_.store(out, nullptr, 1.0f, 0.0f, nullptr, head_dim, offset(p_.out, size_t(task) * head_dim, p_.dtype));
    }
  }

  const AttentionParams& p_;
  const Kernels& k_;
  const MatrixKernels& rows_;  // of keys and values
  const int group_;            // query heads per kv head
  const Range shared_;         // chunks
  const int first_;            // the first chunk that some row sees
  const int chunks_;           // at most, from there on
  const Partials partials_;
};

}  // namespace

void tree_attention(const AttentionParams& p) { Attention(p).run(); }

size_t attention_workspace(int num_rows, int heads, int head_dim, int slots) {
  return (size_t(chunks_of(slots)) + 2) * num_rows * heads * (head_dim + 2);
}

}  // namespace sirius::cpu
