// Threads that stay together over many short loops. Opening an OpenMP region costs a wake-up (tens of microseconds where idle
// threads sleep); a decode step has a hundred loops of a few microseconds each. Inside with_team(body) the region is opened
// once, body runs on the calling thread, and every parallel_for below it hands ranges to threads that wait in a spin loop.
#pragma once
#include <atomic>
#include <cstdint>
#include <exception>
#include <utility>

#include <omp.h>
#include <sched.h>

namespace fastppo {

// What a thread other than the caller's throws (std::bad_alloc, say) must not leave that thread: the process would end.
// keep() runs something on any thread, raise() throws on the caller's what came first.
class Failure {
 public:
  template <typename F>
  void keep(const F& run) noexcept {
    try {
      run();
    } catch (...) {
      if (!taken_.exchange(true)) error_ = std::current_exception();
    }
  }

  void raise() {
    if (!taken_.exchange(false)) return;
    std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  std::atomic<bool> taken_{false};
  std::exception_ptr error_;
};

class Team {
 public:
  // The team whose body runs on this thread, or nullptr.
  static Team*& current() {
    static thread_local Team* team = nullptr;
    return team;
  }

  int size() const { return size_; }

  // run(context, begin, end) on [0, n), a part on each thread; returns when all are done, and throws what one threw.
  void loop(void (*run)(const void*, int64_t, int64_t), const void* context, int64_t n) {
    run_ = run, context_ = context, n_ = n;
    signal([this] {
      Team* team = current();
      current() = nullptr;  // a loop within the loop is serial
      share(0);
      current() = team;
    });
    failure_.raise();
  }

  template <typename F>
  friend void with_team(const F& body);

 private:
  static constexpr int kMost = 64;
  struct alignas(64) Done {
    std::atomic<uint64_t> epoch{0};
  };

  template <typename Ready>
  static void wait(const Ready& ready) {
    for (int64_t i = 0; !ready(); ++i) {
      if (i > 8192) sched_yield();  // somebody else may need the core that the other thread is to run on
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }

  void share(int64_t t) {
    const int64_t begin = n_ * t / size_, end = n_ * (t + 1) / size_;
    if (begin < end) failure_.keep([&] { run_(context_, begin, end); });
  }

  // What thread 0 wrote before it raised epoch_ is read after; what this thread wrote or read is before done_, which thread 0
  // waits for before it writes again. The last thing that a thread does with the team is to say that it is done.
  void serve(int t) {
    for (uint64_t seen = 0, last = 0; !last; done_[t].epoch.store(seen, std::memory_order_release)) {
      wait([&] { return epoch_.load(std::memory_order_acquire) != seen; });
      ++seen;
      if (run_) share(t);
      else last = seen;
    }
  }

  // Raises epoch_ and waits until the others are done with it.
  template <typename Own>
  void signal(const Own& own) {
    const uint64_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
    epoch_.store(epoch, std::memory_order_release);
    own();
    for (int t = 1; t < size_; ++t) wait([&] { return done_[t].epoch.load(std::memory_order_acquire) == epoch; });
  }

  // The team is on thread 0's stack: without this wait its end and the others' last look at it would be kept apart by OpenMP's
  // barrier alone, which ThreadSanitizer does not see in libgomp (nor a region's beginning: it warns of every plain parallel region).
  void close() {
    run_ = nullptr;
    signal([] {});
  }

  alignas(64) std::atomic<uint64_t> epoch_{0};
  void (*run_)(const void*, int64_t, int64_t) = nullptr;
  const void* context_ = nullptr;
  int64_t n_ = 0;
  int size_ = 1;
  Failure failure_;
  Done done_[kMost];
};

// body() on this thread, with the other OpenMP threads at hand for its loops. What body throws comes out.
template <typename F>
void with_team(const F& body) {
  const int threads = omp_get_max_threads();
  if (threads <= 1 || threads > Team::kMost || omp_in_parallel()) return body();
  Team team;
  Failure failure;
#pragma omp parallel num_threads(threads)
  {
    const int t = omp_get_thread_num();
    if (t) {
      team.serve(t);
    } else {
      team.size_ = omp_get_num_threads();
      Team::current() = &team;
      failure.keep(body);
      Team::current() = nullptr;
      team.close();
    }
  }
  failure.raise();
}

}  // namespace fastppo
