#include "common/scratch.hpp"

#include <cstdlib>

#include "common/huge_pages.hpp"

namespace fastnn {

namespace {
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
  const size_t align = bytes >= kHugePage ? kHugePage : 64;
  const size_t size = (bytes + bytes / 4 + align - 1) / align * align;
  b.data = paged_memory(size);
  b.size = size;
  return b.data;
}

void scratch_trim() {
  for (Buffer& b : buffers)
    if (b.size > kKeep) b.release();
}

}  // namespace fastnn
