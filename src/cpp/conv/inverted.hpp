// An inverted residual: a convolution to many channels, a depthwise 3 x 3 one, and a pointwise one
// to few, in one pass. What lies in between, several times the input and the result, stays in a
// core's cache.
#pragma once
#include "conv/conv.hpp"

namespace fastnn {

struct Inverted {
  struct Layer {
    Tensor5 w;
    const char* bias = nullptr;  // one an output channel, contiguous
    int activation = 0;
    Prepared* prepared = nullptr;  // of these filters, which may be gone: see Conv
  };
  Tensor5 x, y;  // sizes that belong together were checked, the filters' too
  DType type = DType::f32;
  Precision precision = Precision::highest;
  Layer expand;  // of no filters: there is none, and the depthwise one is of the input
  int64_t expand_stride[2] = {1, 1}, expand_padding[2] = {};  // of rows and columns
  Layer depthwise, project;
  int64_t stride = 1;              // of the depthwise one, in both directions; padding 1
  const char* residual = nullptr;  // added before the last activation, with y's strides

  bool expands() const { return expand.w.size[0] != 0; }
};

// Whether there are kernels for it. It does not depend on where anything lies.
bool takes_inverted_residual(const Inverted& c);
// False, with nothing done, where there are none: the layers are then to be called one by one.
bool inverted_residual(const Inverted& c);

}  // namespace fastnn
