#include "common/scratch.hpp"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

namespace fastnn {

namespace {
constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kKeep = size_t(256) << 20;

struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  void release() {
    std::free(data);
    data = nullptr;
    size = 0;
  }
  ~Buffer() { release(); }
};
thread_local Buffer buffers[kScratchSlots];
}  // namespace

void* scratch(Scratch slot, size_t bytes) {
  Buffer& b = buffers[int(slot)];
  if (bytes <= b.size) return b.data;
  b.release();
  // Packed panels are walked with large strides: huge pages keep them inside the TLB.
  const size_t align = bytes >= kHugePage ? kHugePage : 64;
  const size_t size = (bytes + bytes / 4 + align - 1) / align * align;
  b.data = std::aligned_alloc(align, size);
  if (!b.data) throw std::bad_alloc();
  if (align == kHugePage) madvise(b.data, size, MADV_HUGEPAGE);
  b.size = size;
  return b.data;
}

void scratch_trim() {
  for (Buffer& b : buffers)
    if (b.size > kKeep) b.release();
}

}  // namespace fastnn
