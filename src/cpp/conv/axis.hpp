// One dimension of a correlation, as the depthwise loops see it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "common/integers.hpp"

namespace fastnn {

// Position o meets, by tap i, index o * step + first + i * delta.
struct Axis {
  int64_t in, out, step, taps, first, delta;
  int64_t lowest() const { return first + std::min<int64_t>(0, (taps - 1) * delta); }
  int64_t tap(int64_t i) const { return i * delta - std::min<int64_t>(0, (taps - 1) * delta); }
  int64_t reach() const { return (taps - 1) * std::abs(delta); }  // between the outermost taps
  bool sees(int64_t o, int64_t i) const {
    const int64_t at = o * step + first + i * delta;
    return at >= 0 && at < in;
  }
  // Positions whose tap i is inside.
  int64_t begin(int64_t i) const {
    return std::clamp<int64_t>(ceil_div_signed(-(first + i * delta), step), 0, out);
  }
  int64_t end(int64_t i) const {
    return std::clamp<int64_t>(ceil_div_signed(in - (first + i * delta), step), begin(i), out);
  }
};

}  // namespace fastnn
