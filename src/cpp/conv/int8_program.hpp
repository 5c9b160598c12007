// Convolutions and maximum poolings of 8-bit images, one after the other in one call: what is
// between the layers of a small network costs as much as some of the layers.
#pragma once
#include <vector>

#include "conv/int8_conv.hpp"
#include "pool/int8_max.hpp"

namespace fastnn {

class Int8Program {
 public:
  // Where an image lies: so many bytes behind one of the addresses that a call gets. The result is
  // what stands for it in a step in place of its address, and is never null.
  uintptr_t place(int64_t base, int64_t offset);
  void add(const Int8Conv& c) { steps_.push_back({true, c, {}}); }
  void add(const Int8MaxPool& p) { steps_.push_back({false, {}, p}); }
  int64_t bases() const { return bases_; }
  // Throws what the steps throw, and std::invalid_argument for a place that there is not.
  void run(const std::vector<uintptr_t>& bases) const;

 private:
  struct Place {
    int64_t base, offset;
  };
  struct Step {
    bool convolves;
    Int8Conv conv;
    Int8MaxPool pool;
  };
  std::vector<Place> places_;
  std::vector<Step> steps_;
  int64_t bases_ = 0;
};

}  // namespace fastnn
