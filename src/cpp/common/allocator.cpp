#include "common/allocator.hpp"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <list>
#include <mutex>
#include <new>

namespace fastnn {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kLarge = size_t(1) << 20;  // below, malloc is quick and its memory warm
constexpr size_t kAlignment = 64;

// Size classes an eighth of a power of two apart, whole huge pages: at most 1/8 is lost (more only
// below 16 MB, where a huge page is the least step).
size_t size_class(size_t bytes) {
  size_t step = kHugePage;
  while (bytes / 16 >= step) step *= 2;
  if (bytes > SIZE_MAX - step) throw std::bad_alloc();
  return (bytes + step - 1) / step * step;
}

void* map(size_t size) {
  // One huge page more than needed, so that an aligned start is inside.
  if (size > SIZE_MAX - kHugePage) return nullptr;
  void* raw =
      mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  const uintptr_t start = reinterpret_cast<uintptr_t>(raw);
  const uintptr_t aligned = (start + kHugePage - 1) / kHugePage * kHugePage;
  if (aligned > start) munmap(raw, aligned - start);
  const uintptr_t end = aligned + size, raw_end = start + size + kHugePage;
  if (raw_end > end) munmap(reinterpret_cast<void*>(end), raw_end - end);
#ifdef MADV_HUGEPAGE
  madvise(reinterpret_cast<void*>(aligned), size, MADV_HUGEPAGE);  // a wish: failure costs speed
#endif
  return reinterpret_cast<void*>(aligned);
}

class Cache {
 public:
  Cache() {
    const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGE_SIZE);
    const size_t most = size_t(4) << 30;
    const size_t quarter = pages > 0 && page > 0 ? size_t(pages) / 4 * size_t(page) : most;
    limit_ = quarter < most ? quarter : most;
  }

  // A free block of this capacity, or one at most an eighth larger; else null.
  Block take(size_t capacity) {
    const std::lock_guard<std::mutex> lock(mutex);
    auto best = free_.end();
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      if (it->capacity < capacity || it->capacity > capacity + capacity / 8) continue;
      if (best == free_.end() || it->capacity < best->capacity) best = it;
      if (best->capacity == capacity) break;
    }
    if (best == free_.end()) return {nullptr, 0};
    const Block b = *best;
    free_.erase(best);
    cached_ -= b.capacity;
    live_ += b.capacity;
    hits_++;
    return b;
  }

  void count_miss(size_t capacity) {
    const std::lock_guard<std::mutex> lock(mutex);
    live_ += capacity;
    misses_++;
  }
  void count_small(size_t capacity, bool born) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (born)
      live_ += capacity;
    else
      live_ -= capacity;
  }

  void give(Block b) noexcept {
    std::list<Block> unwanted;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      live_ -= b.capacity;
      try {
        free_.push_front(b);  // most recently used first: the warmest
        cached_ += b.capacity;
      } catch (...) {
        munmap(b.data, b.capacity);
        return;
      }
      shrink(limit_, unwanted);
    }
    unmap(unwanted);
  }

  void shrink_to(size_t bytes) noexcept {
    std::list<Block> unwanted;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      shrink(bytes, unwanted);
    }
    unmap(unwanted);
  }

  void set_limit(size_t bytes) noexcept {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      limit_ = bytes;
    }
    shrink_to(bytes);
  }

  AllocatorStats stats() {
    const std::lock_guard<std::mutex> lock(mutex);
    return {live_, cached_, limit_, hits_, misses_};
  }

  std::mutex mutex;

 private:
  // Splicing moves nodes: nothing is allocated and nothing is unmapped under the lock.
  void shrink(size_t bytes, std::list<Block>& unwanted) noexcept {
    while (cached_ > bytes) {
      cached_ -= free_.back().capacity;
      unwanted.splice(unwanted.begin(), free_, --free_.end());
    }
  }
  static void unmap(const std::list<Block>& blocks) noexcept {
    for (const Block& b : blocks) munmap(b.data, b.capacity);
  }

  std::list<Block> free_;
  size_t cached_ = 0, live_ = 0, limit_;
  uint64_t hits_ = 0, misses_ = 0;
};

// Never destroyed: tensors may die after this library's static objects would have.
Cache& cache() {
  static Cache* instance = [] {
    auto* c = new Cache;
    // The lock is free in the child of a fork, whatever the parent's other threads were doing.
    pthread_atfork([] { cache().mutex.lock(); }, [] { cache().mutex.unlock(); },
                   [] { cache().mutex.unlock(); });
    return c;
  }();
  return *instance;
}

}  // namespace

Block allocate(size_t bytes) {
  if (bytes < kLarge) {
    const size_t capacity = (bytes / kAlignment + 1) * kAlignment;
    void* p = std::aligned_alloc(kAlignment, capacity);
    if (!p) {
      empty_cache();
      p = std::aligned_alloc(kAlignment, capacity);
      if (!p) throw std::bad_alloc();
    }
    cache().count_small(capacity, true);
    return {p, capacity};
  }
  const size_t capacity = size_class(bytes);
  const Block cached = cache().take(capacity);
  if (cached.data) return cached;
  void* p = map(capacity);
  if (!p) {
    empty_cache();
    p = map(capacity);
    if (!p) throw std::bad_alloc();
  }
  cache().count_miss(capacity);
  return {p, capacity};
}

void deallocate(Block block) noexcept {
  if (block.capacity <= kLarge) {
    cache().count_small(block.capacity, false);
    std::free(block.data);
    return;
  }
  cache().give(block);
}

void empty_cache() noexcept { cache().shrink_to(0); }
void set_cache_limit(size_t bytes) noexcept { cache().set_limit(bytes); }
AllocatorStats allocator_stats() noexcept { return cache().stats(); }

}  // namespace fastnn
