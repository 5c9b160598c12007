// Columns of float32, each sorted once: what every exact search of splits starts from.
#pragma once
#include <cstdint>
#include <mutex>
#include <vector>

#include "common/allocator.hpp"

namespace fastnn {

// A matrix of float32. Strides count elements.
struct FloatMatrix {
  const float* data;
  int64_t rows, columns, row_stride, column_stride;
};

// Memory of the caching allocator, given back at the end of its life.
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes) : block_(allocate(bytes ? bytes : 1)) {}
  Memory(Memory&& other) noexcept : block_(other.block_) { other.block_.data = nullptr; }
  Memory& operator=(Memory&& other) noexcept {
    const Block mine = block_;
    block_ = other.block_, other.block_ = mine;
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
  Block block_{nullptr, 0};
};

// Column f's values lie at values + f * rows in ascending order, with NaN last and -0 as +0, and
// the rows they come from at order + f * rows; equal values lie in the order of their rows.
struct Presort {
  int64_t rows = 0, columns = 0;
  Memory memory;
  float* values = nullptr;
  uint32_t* order = nullptr;
  std::vector<int64_t> missing;  // NaN in each column

  // At most 2^31 - 1 rows. Throws std::bad_alloc.
  Presort(const FloatMatrix& x, int threads);

  // The other way round: row r of column f is number by_column[f * rows + r] in its order.
  // by_row[r * columns + f] holds that with its value, for nodes of few rows (null where it would
  // be too large).
  struct Entry {
    uint32_t rank;
    float value;
  };
  struct Ranks {
    Memory memory;
    const uint32_t* by_column = nullptr;
    const Entry* by_row = nullptr;
  };
  // Made when it is first asked for; any thread may ask.
  const Ranks& ranks(int threads) const;

 private:
  mutable std::once_flag ranked_;
  mutable Ranks ranks_;
};

// Threads that are worth their start for `elements` that cost `picoseconds` each.
int threads_worth(double elements, double picoseconds, int most);

}  // namespace fastnn
