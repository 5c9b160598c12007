#include "common/huge_pages.hpp"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

namespace fastnn {

void* map_huge_pages(size_t bytes) {
  // One huge page more than needed, so that an aligned start is inside.
  if (bytes > SIZE_MAX - kHugePage) return nullptr;
  void* raw =
      mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  const uintptr_t start = reinterpret_cast<uintptr_t>(raw);
  const uintptr_t aligned = (start + kHugePage - 1) / kHugePage * kHugePage;
  if (aligned > start) munmap(raw, aligned - start);
  const uintptr_t end = aligned + bytes, raw_end = start + bytes + kHugePage;
  if (raw_end > end) munmap(reinterpret_cast<void*>(end), raw_end - end);
#ifdef MADV_HUGEPAGE
  madvise(reinterpret_cast<void*>(aligned), bytes, MADV_HUGEPAGE);  // a wish: failure costs speed
#endif
  return reinterpret_cast<void*>(aligned);
}

void* paged_memory(size_t bytes) {
  constexpr size_t page = 4096;
  void* data = nullptr;
  if (posix_memalign(&data, bytes >= kHugePage ? kHugePage : page, bytes)) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (bytes >= kHugePage) madvise(data, bytes, MADV_HUGEPAGE);  // a wish: failure costs speed
#endif
  return data;
}

}  // namespace fastnn
