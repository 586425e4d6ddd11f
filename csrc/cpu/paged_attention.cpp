// Attention over a paged cache on a CPU: kernels/paged_attention.py has the formula.
//
// A work item is one tile of queries of one sequence over one part (kSplit tokens) of its context, or over all of them where
// the tile has several queries. Inside, chunks of kChunk tokens: scores of all rows (query, head), online softmax, values.
// Every boundary is a multiple of a constant, counted from the sequence's start, and every sum has one order, so a row's
// bits depend on its own sequence alone, and decode and prefill agree bit for bit.
#include "paged_attention.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "../ops.h"
#include "paged_rows.h"
#include "paged_tokens.h"

namespace fastppo {
namespace {

struct Job {
  const void* q;
  int64_t q_token, q_head;
  int q_dtype;
  const void *k, *v;
  int cache_dtype;
  const int32_t* tables;
  int64_t M;
  const int32_t *lens, *starts;
  void* out;
  int64_t B, H, KV, D, block;
  float scale, softcap;
  int64_t window;
  int padded;
};

struct Item {
  int64_t b, query;   // first query, in [0, N)
  int position, count;  // position of that query, and queries in the tile
  int part, part_end;   // parts of the context, in units of kSplit
  int64_t partial;      // where in the workspace the part goes; -1: the item writes its result
};

struct Range {
  int64_t begin, end;
};

struct Rows {  // running softmax of some rows
  float *acc, *max, *sum;
  void clear(int64_t rows, int padded) const {
    std::fill(acc, acc + rows * padded, 0.0f), std::fill(sum, sum + rows, 0.0f);
    std::fill(max, max + rows, -std::numeric_limits<float>::infinity());
  }
};

// A buffer that grows. It begins where a line of cache does: vectors that cross one take twice as long.
class Floats {
 public:
  float* at_least(int64_t n) {
    if (n > 16 * static_cast<int64_t>(lines_.size())) lines_.resize((n + 15) / 16);
    return reinterpret_cast<float*>(lines_.data());
  }

 private:
  struct alignas(64) Line {
    float x[16];
  };
  std::vector<Line> lines_;
};

int64_t floats_of(int64_t rows, int padded) { return (rows * (padded + 2) + 15) / 16 * 16; }

Rows rows_at(float* p, int64_t rows, int padded) { return {p, p + rows * padded, p + rows * (padded + 1)}; }

struct Scratch {
  Floats q, s, alpha, part, whole;
};

template <typename T>
class Worker {
 public:
  Worker(const Job& job, Scratch& scratch)
      : j(job), s(scratch), group(job.H / job.KV), token_bytes(job.KV * job.D * sizeof(T)) {}

  // next: what this thread works on afterwards, whose first keys are fetched meanwhile; or nullptr.
  void run(const Item& item, const Item* next, float* workspace) {
    const int64_t rows = item.count * j.H;
    after = next;
    load_queries(item);
    Rows part = rows_at(s.part.at_least(floats_of(rows, j.padded)), rows, j.padded);
    if (item.partial >= 0) part = partial(item.partial, workspace);
    if (item.part_end - item.part <= 1) {
      part.clear(rows, j.padded);
      if (item.part < item.part_end) attend(item, item.part, part);
      return item.partial < 0 ? write(item, part) : void();
    }
    Rows whole = rows_at(s.whole.at_least(floats_of(rows, j.padded)), rows, j.padded);
    whole.clear(rows, j.padded);
    for (int i = item.part; i < item.part_end; ++i) {
      part.clear(rows, j.padded);
      attend(item, i, part);
      merge(whole, part, rows);
    }
    write(item, whole);
  }

  // Merges the parts of one decode query, which lie one after the other in the workspace.
  void merge_parts(const Item& first, int parts, float* workspace) {
    Rows whole = rows_at(s.whole.at_least(floats_of(j.H, j.padded)), j.H, j.padded);
    whole.clear(j.H, j.padded);
    for (int i = 0; i < parts; ++i) merge(whole, partial(first.partial + i, workspace), j.H);
    write(first, whole);
  }

 private:
  Rows partial(int64_t i, float* workspace) const {
    return rows_at(workspace + i * floats_of(j.H, j.padded), j.H, j.padded);
  }

  void merge(Rows whole, Rows part, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r)
      if (part.sum[r] > 0)
        merge_row(whole.acc + r * j.padded, part.acc + r * j.padded, j.padded, whole.max + r, whole.sum + r, part.max[r], part.sum[r]);
  }

  // Rows of a key/value head lie together: row = (kv * count + query) * group + head in group.
  int64_t row_of(const Item& item, int64_t i, int64_t h) const {
    return (h / group * item.count + i) * group + h % group;
  }

  void load_queries(const Item& item) {
    float row[kMaxHead];
    q = s.q.at_least(item.count * j.H * j.padded);
    if (j.padded > j.D) std::fill(q, q + item.count * j.H * j.padded, 0.0f);
    for (int64_t i = 0; i < item.count; ++i)
      for (int64_t h = 0; h < j.H; ++h) {
        float* to = q + row_of(item, i, h) * j.padded;
        widen(j.q, j.q_dtype, (item.query + i) * j.q_token + h * j.q_head, j.D, interleaved<T> ? row : to);
        if (interleaved<T>) interleave(row, j.D, to);
      }
  }

  void write(const Item& item, Rows done) const {
    float row[kMaxHead];
    for (int64_t i = 0; i < item.count; ++i)
      for (int64_t h = 0; h < j.H; ++h) {
        int64_t r = row_of(item, i, h);
        float inverse = done.sum[r] > 0 ? 1.0f / done.sum[r] : 0.0f;
        const float* acc = done.acc + r * j.padded;
        if (interleaved<T>) uninterleave(acc, j.D, row);
        narrow(interleaved<T> ? row : acc, inverse, j.D, j.q_dtype, j.out, ((item.query + i) * j.H + h) * j.D);
      }
  }

  int64_t first_visible(int64_t position) const { return j.window ? std::max<int64_t>(0, position - j.window + 1) : 0; }

  Range tokens_of(const Item& item, int part) const {
    return {std::max<int64_t>(int64_t(part) * kSplit, first_visible(item.position)),
            std::min<int64_t>(int64_t(part + 1) * kSplit, item.position + item.count)};
  }

  // Byte offsets of the tokens of the chunk at c; returns how many there are. Tokens before the range are never looked at (a
  // page before the window may be gone): they repeat the first that is.
  int offsets(int64_t b, int64_t c, Range tokens, int64_t* at) const {
    const int32_t* table = j.tables + b * j.M;
    int n = static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(kChunk, tokens.end - c)));
    for (int t = 0; t < n; ++t) {
      int64_t token = std::max(tokens.begin, c + t);
      at[t] = (int64_t(table[token / j.block]) * j.block + token % j.block) * token_bytes;
    }
    return n;
  }

  void attend(const Item& item, int part, Rows state) {
    const int rows = static_cast<int>(item.count * group), KV = static_cast<int>(j.KV), D = static_cast<int>(j.D);
    float *p = s.s.at_least(j.KV * rows * kChunk), *alpha = s.alpha.at_least(j.KV * rows);
    const Range tokens = tokens_of(item, part);
    int64_t at[2][kChunk];
    const char *keys[kChunk + kAhead], *values_at[kChunk + kAhead];
    int side = 0;
    int64_t c = tokens.begin / kChunk * kChunk;
    int n = offsets(item.b, c, tokens, at[0]);
    for (; c < tokens.end; c += kChunk, side ^= 1) {
      const int skip = static_cast<int>(std::max(tokens.begin, c) - c);
      const int next_n = c + kChunk < tokens.end ? offsets(item.b, c + kChunk, tokens, at[side ^ 1]) : first_after(item, part, at[side ^ 1]);
      addresses(j.k, at[side], n, j.v, at[side], n, keys);
      scores(Tokens<T>{keys, skip, n, KV, D, j.padded}, q, rows, p);
      for (int row = 0; row < KV * rows; ++row)
        alpha[row] = softmax(item, c, n, row % rows, p + int64_t(row) * kChunk, state.max + row, state.sum + row);
      addresses(j.v, at[side], n, j.k, at[side ^ 1], next_n, values_at);
      values(Tokens<T>{values_at, skip, n, KV, D, j.padded}, p, alpha, state.acc, rows);
      n = next_n;
    }
  }

  // Offsets of the first chunk that is read after a part.
  int first_after(const Item& item, int part, int64_t* at) const {
    const bool here = part + 1 < item.part_end;
    if (!here && (!after || after->part >= after->part_end)) return 0;
    const Item& next = here ? item : *after;
    const Range tokens = tokens_of(next, here ? part + 1 : next.part);
    return offsets(next.b, tokens.begin / kChunk * kChunk, tokens, at);
  }

  // Where the n tokens of a chunk lie, and the first kAhead of what is read next, if anything is.
  static void addresses(const void* now, const int64_t* at, int n, const void* next, const int64_t* next_at, int next_n, const char** to) {
    const char *a = static_cast<const char*>(now), *b = static_cast<const char*>(next_n ? next : now);
    for (int t = 0; t < n; ++t) to[t] = a + at[t];
    for (int t = 0; t < kAhead; ++t) to[n + t] = b + (next_n ? next_at[std::min(t, next_n - 1)] : at[n - 1]);
  }

  // Scores p of a row into weights; returns the factor of what came before.
  float softmax(const Item& item, int64_t c, int n, int r, float* p, float* max, float* sum) const {
    int64_t position = item.position + r / group;
    SoftmaxArgs args{j.scale, j.softcap, static_cast<int>(std::max<int64_t>(0, first_visible(position) - c)),
                     static_cast<int>(std::min<int64_t>(n, position + 1 - c))};
    if (args.lo < args.hi) return softmax_row(p, args, max, sum);
    std::fill(p, p + kChunk, 0.0f);
    return 1.0f;
  }

  const Job& j;
  Scratch& s;
  float* q = nullptr;
  const Item* after = nullptr;
  const int64_t group, token_bytes;
};

// Cuts the batch into items; `merges` are the decode queries with several parts.
void plan(const Job& j, std::vector<Item>& items, std::vector<Item>& merges, int64_t* partials, int64_t* work) {
  const int tile = static_cast<int>(std::max<int64_t>(1, 8192 / (j.H * j.padded)));
  *partials = *work = 0;
  for (int64_t b = 0; b < j.B; ++b) {
    int64_t first = j.starts ? j.starts[b] : b, count = j.starts ? j.starts[b + 1] - first : 1;
    for (int64_t i = 0; i < count; i += tile) {
      int n = static_cast<int>(std::min<int64_t>(tile, count - i)), position = static_cast<int>(j.lens[b] - count + i);
      int64_t seen = j.window ? std::max<int64_t>(0, position - j.window + 1) : 0;
      int part = static_cast<int>(seen / kSplit), end = (position + n + kSplit - 1) / kSplit;
      *work += int64_t(n) * (position + n - seen) * j.H * j.D;
      bool split = count == 1 && end - part > 1;
      if (!split) {
        items.push_back({b, first + i, position, n, part, std::max(part, end), -1});
        continue;
      }
      merges.push_back({b, first + i, position, 1, part, end, *partials});
      for (int p = part; p < end; ++p) items.push_back({b, first + i, position, 1, p, p + 1, (*partials)++});
    }
  }
}

template <typename T>
void run(const Job& j) {
  static thread_local std::vector<Item> items, merges;
  static thread_local Floats workspace;
  items.clear(), merges.clear();
  int64_t partials, work;
  plan(j, items, merges, &partials, &work);
  const std::vector<Item>&todo = items, &split = merges;
  float* space = workspace.at_least(partials * floats_of(j.H, j.padded));
  const int64_t n = static_cast<int64_t>(todo.size()), workers = std::min<int64_t>(n, num_threads());
  std::atomic<int64_t> next{0};
  // Items differ in length, so threads take the next one; what an item computes does not depend on who takes it.
  parallel_for(workers, work / std::max<int64_t>(workers, 1), [&](int64_t, int64_t) {
    thread_local Scratch scratch;
    Worker<T> worker(j, scratch);
    for (int64_t i = next.fetch_add(1), after; i < n; i = after) {
      after = next.fetch_add(1);
      worker.run(todo[i], after < n ? &todo[after] : nullptr, space);
    }
  });
  parallel_for(static_cast<int64_t>(split.size()), j.H * j.padded * 4, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    Worker<T> worker(j, scratch);
    for (int64_t i = begin; i < end; ++i) worker.merge_parts(split[i], split[i].part_end - split[i].part, space);
  });
}

}  // namespace

void paged_attention(uintptr_t q, int64_t q_token, int64_t q_head, int q_dtype, uintptr_t k, uintptr_t v, int cache_dtype,
                     uintptr_t tables, int64_t M, uintptr_t lens, uintptr_t starts, uintptr_t out, int64_t B, int64_t H,
                     int64_t KV, int64_t D, int64_t block, double scale, int64_t window, double softcap) {
  Job job{reinterpret_cast<const void*>(q), q_token, q_head, q_dtype,
          reinterpret_cast<const void*>(k), reinterpret_cast<const void*>(v), cache_dtype,
          reinterpret_cast<const int32_t*>(tables), M,
          reinterpret_cast<const int32_t*>(lens), reinterpret_cast<const int32_t*>(starts),
          reinterpret_cast<void*>(out), B, H, KV, D, block,
          static_cast<float>(scale), static_cast<float>(softcap), window, static_cast<int>((D + 15) / 16 * 16)};
  pybind11::gil_scoped_release release;
  if (cache_dtype == 0) run<float>(job);
  if (cache_dtype == 1) run<bf16_t>(job);
  if (cache_dtype == 2) run<fp16_t>(job);
}

void bind_paged_attention(pybind11::module_& m) {
  m.def("paged_attention", &paged_attention, "kernels/paged_attention.py");
  m.def("cache_write", &cache_write, "kernels/paged_attention.py");
}

}  // namespace fastppo
