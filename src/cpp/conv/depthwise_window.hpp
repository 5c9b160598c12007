// Depthwise correlation with 3 x 3 filters whose channels are neighbours, tile by tile: what a
// tile's positions see in common is loaded once.
#pragma once
#include "conv/axis.hpp"
#include "conv/conv.hpp"
#include "conv/kernels.hpp"

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

// A few rows of positions, wherever the rows of the input that they see lie.
struct WindowRows {
  const DepthwiseKernels* kernels;
  int64_t size, step;  // of an element; of the filter, in both directions
  int64_t first;       // the column that position 0 sees first; those outside are `zeros`
  int64_t in_columns, out_columns, channels;
  int64_t in_step;            // from a column to the next, in bytes
  int64_t out_row, out_step;  // in elements
  const void* filter[9];
  const char* zeros;  // one a channel
  const char* bias;
  int activation;
  bool ahead;  // whether the input has to be asked for
};
// `rows`, at most kernels->window_rows of them, to `out`, from the rows of `in`, null if outside.
void run_window_rows(const WindowRows& j, const char* const* in, int rows, char* out);

}  // namespace fastnn
