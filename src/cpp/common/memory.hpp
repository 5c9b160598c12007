// Working memory from the caching allocator.
#pragma once
#include <algorithm>
#include <utility>

#include "common/allocator.hpp"

namespace fastnn {

// Uninitialised; aligned to 64 bytes. Throws std::bad_alloc.
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes) : block_(allocate(std::max<size_t>(bytes, 64))) {}
  Memory(Memory&& other) noexcept : block_(std::exchange(other.block_, Block{})) {}
  Memory& operator=(Memory&& other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }
  ~Memory() {
    if (block_.data) deallocate(block_);
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(block_.data);
  }

 private:
  Block block_{};
};

}  // namespace fastnn
