#include "common/kept_memory.hpp"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>

#include "common/huge_pages.hpp"

namespace fastnn {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kSlab = size_t(32) << 20;   // of addresses; of memory only what is used
constexpr size_t kSmall = size_t(64) << 10;  // not worth the first huge page of a slab

constexpr size_t rounded(size_t n, size_t to) { return (n + to - 1) / to * to; }

struct Slab {
  char* begin;
  size_t size, used = 0;
  explicit Slab(size_t bytes) : begin(static_cast<char*>(map_huge_pages(bytes))), size(bytes) {
    if (!begin) throw std::bad_alloc();
  }
  Slab(const Slab&) = delete;
  ~Slab() { munmap(begin, size); }
};

// Never destroyed: weights may die after this library's static objects would have.
struct Slabs {
  std::mutex mutex;
  std::weak_ptr<Slab> last;
};
Slabs& slabs() {
  static Slabs* instance = [] {
    auto* s = new Slabs;
    // The lock is free in the child of a fork, whatever the parent's other threads were doing.
    pthread_atfork([] { slabs().mutex.lock(); }, [] { slabs().mutex.unlock(); },
                   [] { slabs().mutex.unlock(); });
    return s;
  }();
  return *instance;
}

void give_back(Slab& slab, char* piece, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(piece);
  const uintptr_t begin = rounded(address, kHugePage),
                  end = (address + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
  const std::lock_guard<std::mutex> lock(slabs().mutex);
  if (piece + bytes == slab.begin + slab.used) slab.used -= bytes;
}

}  // namespace

KeptMemory::KeptMemory(size_t bytes) {
  if (bytes > SIZE_MAX / 2) throw std::bad_alloc();
  if (bytes < kSmall) {
    data_ = {static_cast<char*>(paged_memory(bytes)), std::free};
    return;
  }
  bytes = rounded(bytes, kPage);
  std::shared_ptr<Slab> slab;
  char* piece;
  {
    Slabs& all = slabs();
    const std::lock_guard<std::mutex> lock(all.mutex);
    slab = all.last.lock();
    if (!slab || slab->size - slab->used < bytes) {
      slab = std::make_shared<Slab>(std::max(kSlab, rounded(bytes, kHugePage)));
      all.last = slab;
    }
    piece = slab->begin + slab->used;
    slab->used += bytes;
  }
  data_ = {piece, [slab, bytes](char* p) { give_back(*slab, p, bytes); }};
}

}  // namespace fastnn
