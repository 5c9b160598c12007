// Correlation with few results a position: each input position's products with the whole filter are
// one column of a matrix product, and are added to the results they belong to (col2im, a line at a
// time). Gathering instead would fill three rows of a tile with patches of all of the input.
#pragma once
#include "conv/conv.hpp"

namespace fastnn {

//   out[n, m, o] = epilogue(sum over k, t, i with i * step + first + t * delta = o of
//                           w[k, m, t] in[n, k, i])
struct Scatter {
  const Conv& c;  // for its type, precision and epilogue
  Tensor5 in, out;
  const char* w;
  int64_t w_in, w_out;  // strides of k and m
  const int64_t* w_tap;
  int64_t taps[kSpatial] = {}, step[kSpatial] = {}, first[kSpatial] = {}, delta[kSpatial] = {};
  int64_t channel = 0;   // of c's bias and residual at which `out` begins
  const Tensor5& whole;  // the result that the residual belongs to
};

// Whether it is for these numbers of channels and taps, and there is a kernel; lines are of one
// plane each.
bool scatter_pays(const Scatter& s);
void run_scatter(const Scatter& s, int threads);

}  // namespace fastnn
