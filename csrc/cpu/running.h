// The sequences of several decode steps that run without Python in between: their state, and what becomes of it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastppo {
namespace {

// Several decode steps of B sequences: state in, samples out. Arrays of B unless said; S steps, M pages, D hidden.
// decode_program.py has the same fields in the same order.
struct Steps {
  int64_t steps, B, M;
  uintptr_t tokens, positions, seeds, left;  // int64; left: tokens that a sequence may still get
  uintptr_t tables;                          // int32 [B, M], with the pages for all steps
  uintptr_t sampled_tokens, counts, numbers, hidden;  // int64 [S, B]; int64; float [3, S, B]; float [S, B, D]
  int tokens_buffer, positions_buffer, hidden_buffer, logits_buffer;
  bool stop_at_end;  // return as soon as a sequence ends: others wait for its place
  std::vector<int64_t> eos;
};

struct Draw {
  double temperature;
  int64_t top_k;
  double top_p, min_p, logprob_temperature;
};

// What one forward pass reads and writes besides the program.
struct Pass {
  int64_t rows, sequences;
  uintptr_t slots, tables, lens, starts;  // starts: 0 when every row is a sequence
  int64_t table_width;
};

template <typename T>
inline uintptr_t address(const std::vector<T>& x) {
  return reinterpret_cast<uintptr_t>(x.data());
}

// The sequences that go on, packed: row i is sequence index[i] of the caller.
class Running {
 public:
  Running(const Steps& f, const std::vector<int64_t>& sizes, uintptr_t tables, int64_t block)
      : f_(f), D_(sizes[f.hidden_buffer]), block_(block), all_tables_(reinterpret_cast<const int32_t*>(tables)) {
    const int64_t* token = reinterpret_cast<const int64_t*>(f.tokens);
    const int64_t* position = reinterpret_cast<const int64_t*>(f.positions);
    const int64_t* seed = reinterpret_cast<const int64_t*>(f.seeds);
    for (int64_t b = 0; b < f.B; ++b) index_.push_back(b), drawn.push_back(token[b]), next.push_back(position[b]), seeds.push_back(seed[b]);
    for (auto& x : inputs) x.resize(f.B);
    for (auto& x : numbers) x.resize(f.B);
    slots_.resize(f.B), lens_.resize(f.B), tables_.resize(f.B * f.M);
    hidden.resize(f.B * D_), logits.resize(f.B * sizes[f.logits_buffer]);
    place();
  }

  int64_t count() const { return static_cast<int64_t>(index_.size()); }
  Pass pass() const { return Pass{count(), count(), address(slots_), address(tables_), address(lens_), 0, f_.M}; }

  // Writes the step's samples down and drops the sequences that end; true when the caller has to look.
  bool advance(int64_t step) {
    int64_t kept = 0;
    bool look = false;
    for (int64_t i = 0, n = count(); i < n; ++i) {
      const int64_t b = index_[i], at = step * f_.B + b;
      reinterpret_cast<int64_t*>(f_.sampled_tokens)[at] = drawn[i];
      for (int64_t k = 0; k < 3; ++k) reinterpret_cast<float*>(f_.numbers)[k * f_.steps * f_.B + at] = numbers[k][i];
      if (f_.hidden) std::copy_n(hidden.data() + i * D_, D_, reinterpret_cast<float*>(f_.hidden) + at * D_);
      const int64_t made = ++reinterpret_cast<int64_t*>(f_.counts)[b];
      const bool ends = drawn[i] < 0 || made >= reinterpret_cast<const int64_t*>(f_.left)[b] ||
                        std::find(f_.eos.begin(), f_.eos.end(), drawn[i]) != f_.eos.end();
      look |= drawn[i] < 0 || (ends && f_.stop_at_end);
      if (ends) continue;
      index_[kept] = b, drawn[kept] = drawn[i], next[kept] = next[i], seeds[kept] = seeds[i];
      ++kept;
    }
    index_.resize(kept);
    place();
    return look;
  }

  std::vector<float> inputs[2];  // tokens and positions, as the program reads them
  std::vector<float> hidden, logits, numbers[3];
  std::vector<int64_t> drawn, next, seeds;  // last token; the position that is sampled next; of each sequence

 private:
  // Where the last token of each sequence goes, and what it sees.
  void place() {
    for (int64_t i = 0; i < count(); ++i) {
      const int32_t* table = all_tables_ + index_[i] * f_.M;
      const int64_t position = next[i]++;
      inputs[0][i] = static_cast<float>(drawn[i]), inputs[1][i] = static_cast<float>(position);
      lens_[i] = static_cast<int32_t>(position + 1);
      if (position / block_ < f_.M) slots_[i] = table[position / block_] * block_ + position % block_;
      std::copy_n(table, f_.M, tables_.data() + i * f_.M);
    }
  }

  const Steps& f_;
  const int64_t D_, block_;
  const int32_t* all_tables_;
  std::vector<int64_t> index_, slots_;
  std::vector<int32_t> lens_, tables_;
};

}  // namespace
}  // namespace fastppo
