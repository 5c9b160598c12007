// Marsaglia's xorshift (https://www.jstatsoft.org/v08/i14/paper), as scikit-learn's splitters draw
// from it.
#pragma once
#include <cstdint>

namespace fastnn {

class Draws {
 public:
  explicit Draws(uint32_t seed) : state_(seed) {}
  int64_t integer(int64_t low, int64_t high) {
    return low + int64_t(next() % uint64_t(high - low));
  }
  double uniform(double low, double high) {
    return (high - low) * double(next()) / double(kMost) + low;
  }

 private:
  static constexpr uint32_t kMost = 2147483647u;
  uint32_t next() {
    if (state_ == 0) state_ = 1;
    state_ ^= state_ << 13;
    state_ ^= state_ >> 17;
    state_ ^= state_ << 5;
    return state_ % (kMost + 1);
  }
  uint32_t state_;
};

}  // namespace fastnn
