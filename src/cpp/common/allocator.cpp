#include "common/allocator.hpp"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <new>

#include "common/huge_pages.hpp"

namespace fastnn {
namespace {

constexpr size_t kLarge = size_t(1) << 20;  // below, malloc is quick and its memory warm
constexpr size_t kAlignment = 64;

// Whole huge pages.
size_t rounded(size_t bytes) {
  if (bytes > SIZE_MAX - kHugePage) throw std::bad_alloc();
  return (bytes + kHugePage - 1) / kHugePage * kHugePage;
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

  // A block of this capacity from the smallest free range that has it (of equal ones the warmest),
  // of which the rest stays free; else null.
  Block take(size_t capacity) {
    const std::lock_guard<std::mutex> lock(mutex);
    auto best = free_.end();
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      if (it->second.size < capacity) continue;
      if (best == free_.end() || it->second.size < best->second.size ||
          (it->second.size == best->second.size && it->second.used > best->second.used))
        best = it;
    }
    if (best == free_.end()) return {nullptr, 0};
    auto node = free_.extract(best);
    const Block b = {node.key(), capacity};
    node.key() += capacity, node.mapped().size -= capacity;
    if (node.mapped().size) free_.insert(std::move(node));
    cached_ -= capacity;
    live_ += capacity;
    hits_++;
    return b;
  }

  // Before fresh memory is asked for: as much of what is free, but in pieces too small, goes back,
  // so that the process never holds much more than its tensors needed at once.
  void make_room(size_t capacity) noexcept {
    Ranges unwanted;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      shrink(cached_ > capacity ? cached_ - capacity : 0, unwanted);
    }
    unmap(unwanted);
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
    Ranges unwanted;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      live_ -= b.capacity;
      try {
        insert(static_cast<char*>(b.data), b.capacity);
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
    Ranges unwanted;
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
  struct Free {
    size_t size;
    uint64_t used;  // when the last of it was given back
  };
  using Ranges = std::map<char*, Free>;

  // A free range, as one with those beside it: the system does not mind where mappings begin.
  void insert(char* data, size_t size) {
    auto it = free_.emplace(data, Free{size, ++clock_}).first;
    if (const auto next = std::next(it); next != free_.end() && data + size == next->first) {
      it->second.size += next->second.size;
      free_.erase(next);
    }
    if (it == free_.begin()) return;
    const auto before = std::prev(it);
    if (before->first + before->second.size != data) return;
    before->second.size += it->second.size;
    before->second.used = it->second.used;
    free_.erase(it);
  }

  // The least recently used ranges go first. Nodes are moved: nothing is allocated and nothing is
  // unmapped under the lock.
  void shrink(size_t bytes, Ranges& unwanted) noexcept {
    while (cached_ > bytes) {
      auto oldest = free_.begin();
      for (auto it = free_.begin(); it != free_.end(); ++it)
        if (it->second.used < oldest->second.used) oldest = it;
      cached_ -= oldest->second.size;
      unwanted.insert(free_.extract(oldest));
    }
  }
  static void unmap(const Ranges& ranges) noexcept {
    for (const auto& [data, range] : ranges) munmap(data, range.size);
  }

  Ranges free_;
  size_t cached_ = 0, live_ = 0, limit_;
  uint64_t hits_ = 0, misses_ = 0, clock_ = 0;
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
  const size_t capacity = rounded(bytes);
  const Block cached = cache().take(capacity);
  if (cached.data) return cached;
  cache().make_room(capacity);
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
