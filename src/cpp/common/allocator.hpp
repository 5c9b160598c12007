// A caching allocator for large results.
//
// Fresh memory costs more than most kernels: the system hands it out page by page, zeroed, at a few
// GB/s. What tensors give back is kept here, mapped and warm, and cut up for the next results.
// Large blocks are 2 MB aligned and ask for huge pages.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastnn {

struct Block {
  void* data;
  size_t capacity;  // what was reserved, at least what was asked for
};

// At least `bytes` of uninitialised memory, 64-byte aligned. Throws std::bad_alloc, after it gave
// the cache back to the system and tried again.
Block allocate(size_t bytes);
// Gives a block back, from any thread, with or without the GIL, at any time. Never throws.
void deallocate(Block block) noexcept;

// Returns the cached blocks to the system.
void empty_cache() noexcept;
// The most bytes that are kept for reuse; the least recently used blocks go first. 0 keeps none.
// At first: a quarter of the machine's memory, at most 4 GiB.
void set_cache_limit(size_t bytes) noexcept;

struct AllocatorStats {
  uint64_t bytes_live;    // reserved by tensors that are alive
  uint64_t bytes_cached;  // kept for reuse
  uint64_t cache_limit;
  uint64_t hits, misses;  // large allocations served from the cache, and from the system
};
AllocatorStats allocator_stats() noexcept;

}  // namespace fastnn
