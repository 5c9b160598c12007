// Filters as the algorithms want them, kept between calls by one who knows that they do not change.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include "common/dtype.hpp"
#include "common/huge_pages.hpp"
#include "gemm/gemm.hpp"

namespace fastnn {

// Thread-safe; what it has given stays valid as long as it lives. Once it has what a way of
// computing reads, that way needs the filters themselves no more, and they may be gone.
class Prepared {
 public:
  // Before so many elements of the filters themselves are read.
  static void want(const void* filters, int64_t count) {
    if (!filters && count)
      throw OperandGone("the filters are gone, and were not prepared for this");
  }
  // The memory that `make` filled the first time for this way of computing, kernel and detail.
  template <class Make>
  const char* get(const char* way, const void* kernel, int64_t detail, int64_t part, size_t bytes,
                  Make make) {
    return find(way, kernel, detail, part,
                [&](Entry& e) {
                  constexpr size_t beyond = 4096;  // where the last tiles may look ahead
                  e.memory.reset(static_cast<char*>(paged_memory(bytes + beyond)));
                  make(e.memory.get());
                  bytes_ += int64_t(bytes);
                })
        .memory.get();
  }
  // The operand B of a product, likewise.
  template <class Make>
  const PackedOperand* operand(const void* kernel, int64_t part, Make make) {
    return find("operand", kernel, 0, part,
                [&](Entry& e) {
                  e.operand = make();
                  bytes_ += int64_t(e.operand->bytes);
                })
        .operand.get();
  }
  int64_t bytes() const { return bytes_; }

  // The filters' layout, for calls without them; noted, once, by whoever calls with them.
  static constexpr int kMostDims = 5;
  DType type = DType::f32;
  int dims = 0;  // 0: nobody has
  int64_t shape[kMostDims] = {}, strides[kMostDims] = {};

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  struct Entry {
    const char* way;
    const void* kernel;
    int64_t detail, part;
    std::unique_ptr<char, Free> memory;
    std::unique_ptr<PackedOperand> operand;
  };
  template <class Make>
  const Entry& find(const char* way, const void* kernel, int64_t detail, int64_t part, Make make) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& e : entries_)
      if (e->way == way && e->kernel == kernel && e->detail == detail && e->part == part) return *e;
    auto e = std::make_unique<Entry>();
    e->way = way, e->kernel = kernel, e->detail = detail, e->part = part;
    make(*e);
    entries_.push_back(std::move(e));
    return *entries_.back();
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<Entry>> entries_;
  int64_t bytes_ = 0;
};

}  // namespace fastnn
