// The fibers of cuda_runtime.h.
#include "cuda_runtime.h"

#include <stdexcept>

thread_local uint3 threadIdx{}, blockIdx{};
thread_local dim3 blockDim{}, gridDim{};

namespace cuda_host {

thread_local Block* block = nullptr;
constexpr size_t kStackBytes = 64 << 10;

static void enter() {
  Block& b = *block;
  b.body();
  b.fibers[b.current].waits = Wait::done;
  swapcontext(&b.fibers[b.current].context, &b.scheduler);
}

void wait(Wait what, unsigned mask) {
  Block& b = *block;
  Fiber& fiber = b.fibers[b.current];
  fiber.waits = what;
  fiber.mask = mask;
  swapcontext(&fiber.context, &b.scheduler);
}

// Wakes fibers whose barrier is complete; true when any was.
static bool release(Block& b) {
  int count = static_cast<int>(b.fibers.size()), waiting = 0, alive = 0;
  for (const Fiber& f : b.fibers) {
    waiting += f.waits == Wait::block;
    alive += f.waits != Wait::done;
  }
  bool woke = false;
  if (alive && waiting == alive) {  // threads that have returned do not count, as on the GPU
    for (Fiber& f : b.fibers)
      if (f.waits == Wait::block) f.waits = Wait::none;
    return true;
  }
  for (int start = 0; start < count; start += warpSize) {
    for (int i = start; i < count && i < start + warpSize; ++i) {
      if (b.fibers[i].waits != Wait::warp) continue;
      unsigned mask = b.fibers[i].mask;
      bool all = true;
      for (int j = start; j < count && j < start + warpSize; ++j)
        if (mask >> (j - start) & 1) {
          const Fiber& f = b.fibers[j];
          all = all && (f.waits == Wait::done || (f.waits == Wait::warp && f.mask == mask));
        }
      if (!all) continue;
      for (int j = start; j < count && j < start + warpSize; ++j)
        if (mask >> (j - start) & 1 && b.fibers[j].waits == Wait::warp) b.fibers[j].waits = Wait::none;
      woke = true;
    }
  }
  return woke;
}

static void run_block(Block& b) {
  for (;;) {
    bool ran = false, alive = false;
    for (int i = 0; i < static_cast<int>(b.fibers.size()); ++i) {
      if (b.fibers[i].waits != Wait::none) continue;
      b.current = i;
      threadIdx = b.fibers[i].index;
      swapcontext(&b.scheduler, &b.fibers[i].context);
      ran = true;
    }
    for (const Fiber& f : b.fibers) alive = alive || f.waits != Wait::done;
    if (!alive) return;
    if (!release(b) && !ran)
      throw std::runtime_error("cuda_host: deadlock: some threads wait at a barrier that others never reach");
  }
}

void launch(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()>& body) {
  if (grid.y > 65535 || grid.z > 65535) throw std::runtime_error("cuda_host: grid.y and grid.z are at most 65535");
  int count = threads.x * threads.y * threads.z;
  if (count < 1 || count > 1024) throw std::runtime_error("cuda_host: a block has 1 to 1024 threads");
  if (shared_bytes > 232448) throw std::runtime_error("cuda_host: more than 227 KiB of shared memory");
  Block b;
  b.fibers.resize(count);
  b.slots.resize(count);
  b.dynamic.assign(shared_bytes / 8 + 1, 0);
  b.body = body;
  for (Fiber& f : b.fibers) f.stack.reset(new char[kStackBytes]);
  block = &b;
  struct Leave { ~Leave() { block = nullptr; } } leave;
  blockDim = threads;
  gridDim = grid;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        std::memset(b.dynamic.data(), 0xff, b.dynamic.size() * 8);  // shared memory starts as rubbish (NaN)
        for (int i = 0; i < count; ++i) {
          Fiber& f = b.fibers[i];
          f.waits = Wait::none;
          f.index = {i % threads.x, i / threads.x % threads.y, i / (threads.x * threads.y)};
          getcontext(&f.context);
          f.context.uc_stack.ss_sp = f.stack.get();
          f.context.uc_stack.ss_size = kStackBytes;
          f.context.uc_link = nullptr;
          makecontext(&f.context, enter, 0);
        }
        run_block(b);
      }
}

}  // namespace cuda_host
