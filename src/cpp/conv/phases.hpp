// The gradient of a convolution by its input, as convolutions of the output's gradient: one for
// each remainder of the position to the stride.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastnn {

// The taps that a position of the input meets, by its remainder to the stride: those of one
// remainder are evenly apart, and so are the outputs that they meet.
struct Phase {
  int64_t first_tap, taps;  // first_tap + i * tap_step
  int64_t first, delta;     // of the output that tap i meets at position 0
  int64_t positions;        // of the input
};
struct Phases {
  int64_t tap_step;
  std::vector<Phase> of;
};
inline Phases phases_of(int64_t in, int64_t taps, int64_t stride, int64_t padding,
                        int64_t dilation) {
  Phases r{1, {}};
  while (r.tap_step * dilation % stride != 0) r.tap_step++;
  for (int64_t rest = 0; rest < std::min(stride, in); rest++) {
    Phase f{0, 0, 0, 0, (in - rest + stride - 1) / stride};
    for (int64_t t = 0; t < std::min(taps, r.tap_step); t++)
      if ((rest + padding - t * dilation) % stride == 0) {
        f.first_tap = t;
        f.taps = (taps - t + r.tap_step - 1) / r.tap_step;
        f.first = (rest + padding - t * dilation) / stride;
        f.delta = -(r.tap_step * dilation / stride);
        break;
      }
    r.of.push_back(f);
  }
  return r;
}

}  // namespace fastnn
