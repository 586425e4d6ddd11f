// Processes of one host meet, and add up gradients, in memory that all of them have mapped. Through sockets the same bytes are
// copied by the kernel four times: 18 MB over gloo cost 11 ms of each process's CPU and 20 ms of its time, here 4 ms.
//
// The memory: one counter per process, a cache line each, then two sets of one buffer per process. A process writes what it
// brings into its buffer of set (round % 2) and counts the round; when all have, it reads everybody's. Two sets are enough: who
// writes into a set again has seen the round between, and everybody came to that one with the set's last round read.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../ops.h"
#include "simd.h"

namespace fastppo {
namespace {

constexpr int64_t kLine = 64, kPage = 4096;
constexpr int kSpins = 1000;             // some 50 microseconds: longer than a wake-up, shorter than what it would delay
constexpr int kMilliseconds = 100;       // that a call waits in all before its caller looks after the others
constexpr int64_t kStep = 4096;          // numbers that are added at once: the sum so far stays in the first cache

using Counter = std::atomic<uint32_t>;
static_assert(sizeof(Counter) == 4 && Counter::is_always_lock_free, "a counter is shared between processes");

FASTPPO_CLONES void add(float* __restrict sum, const float* __restrict x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += x[i];
}

FASTPPO_CLONES void add_two(float* __restrict sum, const float* __restrict x, const float* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] = x[i] + y[i];
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

void sleep_until_changed(Counter* counter, uint32_t seen) {
#if defined(__linux__)
  timespec limit{0, kMilliseconds * 1000000};
  syscall(SYS_futex, counter, FUTEX_WAIT, seen, &limit, nullptr, 0);
#else
  std::this_thread::sleep_for(std::chrono::microseconds(50));
#endif
}

class HostGroup {
 public:
  // base: the mapping, of bytes(world, room), zeros when the first process came. room: bytes of a buffer.
  HostGroup(uintptr_t base, int rank, int world, int64_t room) : base_(base), rank_(rank), world_(world), room_(room) {}

  static int64_t bytes(int world, int64_t room) { return header(world) + 2 * world * room; }

  // Where process `rank` writes what it brings to the next round; others' may be read after meet() and before the next round.
  uintptr_t buffer(int rank) const { return base_ + header(world_) + ((next_ % 2) * world_ + rank) * room_; }

  // Come to the next round. False: somebody wasn't there within kMilliseconds; call again.
  bool meet() {
    if (!counted_) {
      counter(rank_)->store(next_, std::memory_order_release);
      counted_ = true;
#if defined(__linux__)
      syscall(SYS_futex, counter(rank_), FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
#endif
    }
    const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(kMilliseconds);
    for (int other = 0; other < world_; ++other)
      for (int spins = 0; !came(other); ++spins) {
        if (spins < kSpins) {
          pause();
        } else {
          if (std::chrono::steady_clock::now() > end) return false;
          const uint32_t seen = counter(other)->load(std::memory_order_acquire);
          if (!reached(seen)) sleep_until_changed(counter(other), seen);
        }
      }
    return true;
  }

  // The next meeting is another round.
  void leave() { ++next_, counted_ = false; }

  // numbers[begin, count) become the sums over processes, added in the order of ranks. Returns how far it came: less than count
  // where meet() gave up; call again with it.
  int64_t add_up(uintptr_t numbers, int64_t begin, int64_t count) {
    const int64_t most = room_ / int64_t(sizeof(float));
    for (int64_t n; begin < count; begin += n) {
      n = std::min(most, count - begin);
      float* own = reinterpret_cast<float*>(numbers) + begin;
      if (!counted_) std::memcpy(at(rank_), own, n * sizeof(float));
      if (!meet()) return begin;
      for (int64_t i = 0; i < n; i += kStep) sum(own + i, i, std::min(kStep, n - i));
      leave();
    }
    return count;
  }

  // Those who haven't come to the round that this process waits in.
  std::vector<int> missing() const {
    std::vector<int> ranks;
    for (int other = 0; other < world_; ++other)
      if (!came(other)) ranks.push_back(other);
    return ranks;
  }

 private:
  static int64_t header(int world) { return (world * kLine + kPage - 1) / kPage * kPage; }
  Counter* counter(int rank) const { return reinterpret_cast<Counter*>(base_ + rank * kLine); }
  float* at(int rank) const { return reinterpret_cast<float*>(buffer(rank)); }
  bool reached(uint32_t round) const { return int32_t(round - next_) >= 0; }  // rounds may wrap around
  bool came(int rank) const { return reached(counter(rank)->load(std::memory_order_acquire)); }

  void sum(float* out, int64_t first, int64_t n) const {
    add_two(out, at(0) + first, at(1) + first, n);
    for (int rank = 2; rank < world_; ++rank) add(out, at(rank) + first, n);
  }

  uintptr_t base_;
  int rank_, world_;
  int64_t room_;
  uint32_t next_ = 1;
  bool counted_ = false;  // whether this process has counted the round next_
};

}  // namespace

void bind_host_group(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<HostGroup>(m, "HostGroup", "fastppo/host_group.py")
      .def(py::init<uintptr_t, int, int, int64_t>())
      .def_static("bytes", &HostGroup::bytes)
      .def("buffer", &HostGroup::buffer)
      .def("meet", &HostGroup::meet, py::call_guard<py::gil_scoped_release>())
      .def("leave", &HostGroup::leave)
      .def("add_up", &HostGroup::add_up, py::call_guard<py::gil_scoped_release>())
      .def("missing", &HostGroup::missing);
}

}  // namespace fastppo
