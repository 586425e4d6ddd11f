// 4 KiB pages of fresh memory cost as much as what is written into them, and reading them a page walk every 64 lines.
#pragma once
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastppo {

// A hint for the pages that lie wholly within these bytes: no error where the system has none.
inline void ask_for_huge_pages(uintptr_t begin, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 4096, kHuge = 2 << 20;
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, end = (begin + bytes) / kPage * kPage;
  if (bytes >= static_cast<int64_t>(2 * kHuge)) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fastppo
