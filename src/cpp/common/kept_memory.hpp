// Memory for what is kept between calls and read in each of them: packed weights and filters.
#pragma once
#include <cstddef>
#include <memory>

namespace fastnn {

// Uninitialised; aligned to 4096 bytes. Throws std::bad_alloc.
//
// Pieces lie one after the other in slabs of huge pages. A model's weights are more than the TLB
// has entries for in small pages, and each of them is mostly smaller than a huge page: with pages
// of its own for each weight, products of 128 rows in bfloat16 took a fourth longer. A slab goes
// with the last of its pieces; huge pages that lie within one go with it.
class KeptMemory {
 public:
  KeptMemory() = default;
  explicit KeptMemory(size_t bytes);
  KeptMemory(KeptMemory&&) = default;
  KeptMemory& operator=(KeptMemory&&) = default;
  char* get() const { return data_.get(); }

 private:
  std::shared_ptr<char> data_;
};

}  // namespace fastnn
