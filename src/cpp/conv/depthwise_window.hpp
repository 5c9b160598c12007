// Depthwise correlation with 3 x 3 filters whose channels are neighbours, tile by tile: what a
// tile's positions see in common is loaded once.
#pragma once
#include "conv/axis.hpp"
#include "conv/conv.hpp"

namespace fastnn {

struct WindowJob {
  const Conv& c;  // for its type, bias and activation
  const Tensor5& in;
  const Tensor5& out;
  const Axis* axis;
  const char* filters;          // of the first tap, one a channel,
  int64_t tap_row, tap_column;  // and how far the next ones are, in elements
};

// Whether these are 3 x 3 neighbours in a plane, at step 1 or 2, and the channels a vector at
// least.
bool window_fits(const Axis* axis, int64_t channels, DType type);
void run_window(const WindowJob& j, int threads);

}  // namespace fastnn
