#include "common/huge_pages.hpp"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

namespace fastnn {

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
