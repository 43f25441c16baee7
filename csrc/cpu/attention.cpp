// Split-KV attention. The slots that a row sees, in order, are cut into chunks of kSlots; each chunk yields a maximum, a sum of
// exponentials and a weighted sum of values, which are combined in order. Where a chunk ends depends on how many slots the row
// sees before it and on nothing else, so a token's result is the same bits in a pass of its own, in a window, or in a tree.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa.h"
#include "ops.h"
#include "team.h"

namespace sirius::cpu {
namespace {

constexpr int kSlots = 128;  // multiple of 32 (see Kernels::sum); 16 KB of keys at head_dim 64 in bf16

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
        group_(p.heads / p.cache.kv_heads),
        shared_(p.prefix / kSlots),
        chunks_(chunks_of(p.prefix % kSlots + p.mask_words * 64) + shared_),
        partials_(p, chunks_) {}

  void run() {
    attend_shared();
    attend_tails();
    sync();
    combine();
  }

 private:
  int rest() const { return p_.prefix - shared_ * kSlots; }  // prefix slots behind the last whole chunk

  // Queries of the kv head's group for rows [row, row + n), packed side by side.
  void* pack(int kv_head, int row, int n) const {
    const int head_dim = p_.cache.head_dim;
    const size_t length = size_t(group_) * head_dim;
    char* gathered = scratch<char>(Scratch::first, n * length * size_of(p_.dtype));
    for (int j = 0; j < n; ++j)
      std::memcpy(offset(gathered, j * length, p_.dtype),
                  offset(p_.q, size_t(row + j) * p_.q_stride + kv_head * length, p_.dtype), length * size_of(p_.dtype));
    void* packed = scratch<char>(Scratch::packed, k_.packed_size(n * group_, head_dim));
    k_.pack(gathered, head_dim, n * group_, head_dim, packed);
    return packed;
  }

  // `columns` queries against n slots; results go to the chunk's columns from `first` on.
  template <class SlotAt>
  void attend(int kv_head, int chunk, int first, int columns, const void* queries, int n, const SlotAt& slot_at) const {
    const auto [kv_heads, capacity, head_dim] = p_.cache;
    const auto row_of = [&, capacity = capacity, head_dim = head_dim](const void* cache) {
      return [=, this](int i) { return offset(cache, (size_t(kv_head) * capacity + slot_at(i)) * head_dim, p_.dtype); };
    };
    const auto keys = row_of(p_.k_cache), values = row_of(p_.v_cache);
    Rows<kSlots> rows;
    float* scores = scratch<float>(Scratch::second, size_t(columns) * kSlots);
    rows.fill(0, n, keys, [&](int i) { return values(std::min(i, n - 1)); });
    k_.dot(rows.pointers, n, queries, columns, head_dim, scores, kSlots);

    const size_t at = (size_t(kv_head) * chunks_ + chunk) * p_.num_rows * group_ + first;
    char* weights = scratch<char>(Scratch::probabilities, size_t(columns) * kSlots * size_of(p_.dtype));
    for (int j = 0; j < columns; ++j)
      k_.softmax(scores + size_t(j) * kSlots, n, p_.scale, offset(weights, size_t(j) * kSlots, p_.dtype), partials_.max + at + j,
                 partials_.sum + at + j);
    float* out = partials_.values + at * head_dim;
    std::fill_n(out, size_t(columns) * head_dim, 0.0f);
    rows.fill(0, n, n, values);
    k_.sum(rows.pointers, n, weights, kSlots, columns, 0, head_dim, out, head_dim);
  }

  // Whole chunks of the prefix, which all rows see: one reading serves every row.
  void attend_shared() const {
    const Range range = share(p_.cache.kv_heads * shared_);
    int packed_head = -1;
    void* queries = nullptr;
    for (int task = range.begin; task < range.end; ++task) {
      const int kv_head = task / shared_, chunk = task % shared_;
      if (kv_head != packed_head) queries = pack(packed_head = kv_head, 0, p_.num_rows);
      attend(kv_head, chunk, 0, p_.num_rows * group_, queries, kSlots, [=](int i) { return chunk * kSlots + i; });
    }
  }

  // What is left of the prefix and the window slots in the row's mask: a list of its own for every row.
  void attend_tails() const {
    const Range range = share(p_.cache.kv_heads * p_.num_rows);
    for (int task = range.begin; task < range.end; ++task) {
      const int kv_head = task / p_.num_rows, row = task % p_.num_rows;
      int32_t* slots = scratch<int32_t>(Scratch::pointers, size_t(kSlots) + size_t(p_.mask_words) * 64);
      int n = 0;
      while (n < rest()) {
        slots[n] = shared_ * kSlots + n;
        ++n;
      }
      for (int w = 0; w < p_.mask_words; ++w)
        for (uint64_t bits = p_.mask[size_t(row) * p_.mask_words + w]; bits; bits &= bits - 1)
          slots[n++] = p_.prefix + w * 64 + __builtin_ctzll(bits);
      if (n == 0) continue;
      const void* queries = pack(kv_head, row, 1);
      for (int begin = 0; begin < n; begin += kSlots)
        attend(kv_head, shared_ + begin / kSlots, row * group_, group_, queries, std::min(kSlots, n - begin),
               [&](int i) { return slots[begin + i]; });
    }
  }

  void combine() const {
    const int head_dim = p_.cache.head_dim;
    const Range range = share(p_.num_rows * p_.heads);
    for (int task = range.begin; task < range.end; ++task) {
      const int row = task / p_.heads, head = task % p_.heads;
      const int seen = rest() + count_bits(p_.mask + size_t(row) * p_.mask_words, p_.mask_words);
      const int chunks = shared_ + chunks_of(seen);
      const auto at = [&](int chunk) {
        return (size_t(head / group_) * chunks_ + chunk) * p_.num_rows * group_ + row * group_ + head % group_;
      };
      float max = partials_.max[at(0)], sum = 0.0f;
      for (int c = 1; c < chunks; ++c) max = std::max(max, partials_.max[at(c)]);
      float* out = scratch<float>(Scratch::accumulator, head_dim);
      std::fill_n(out, head_dim, 0.0f);
      for (int c = 0; c < chunks; ++c) {
        const float weight = std::exp(partials_.max[at(c)] - max);
        sum += weight * partials_.sum[at(c)];
        const float* values = partials_.values + at(c) * head_dim;
        for (int d = 0; d < head_dim; ++d) out[d] += weight * values[d];
      }
      for (int d = 0; d < head_dim; ++d) out[d] /= sum;
      k_.store(out, nullptr, nullptr, head_dim, offset(p_.out, size_t(task) * head_dim, p_.dtype));
    }
  }

  const AttentionParams& p_;
  const Kernels& k_;
  const int group_;   // query heads per kv head
  const int shared_;  // whole chunks of the prefix
  const int chunks_;  // at most, of a row
  const Partials partials_;
};

}  // namespace

void tree_attention(const AttentionParams& p) { Attention(p).run(); }

size_t attention_workspace(int num_rows, int heads, int head_dim, int slots) {
  return (size_t(chunks_of(slots)) + 2) * num_rows * heads * (head_dim + 2);
}

}  // namespace sirius::cpu
