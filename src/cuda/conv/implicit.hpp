// The products of a convolution as matrix products whose operands are gathered from images.
#pragma once
#include "cuda/conv/pixels.hpp"
#include "cuda/gemm/gemm.hpp"

namespace fastnn::cuda {

// y from x, or x from y (`transposed`): image is the operand, filters is w's, both in pixels. The
// result is of g.out, at g.c.data; of g count n (channels of a group), type, parts, epilogue and
// the strides of channels.
struct Implicit {
  Gemm g;
  const Conv* sizes = nullptr;
  bool transposed = false;
  Pixels image, filters;
};
void implicit_product(const Implicit& p, void* stream);

// w from x and y, whose pixels are one stride apart. Of g count n and m (channels of x and y in a
// group), types, parts and where w lies.
void implicit_weight(const Gemm& g, const Conv& sizes, const Pixels& x, const Pixels& y,
                     const Allocate& allocate, void* stream);

}  // namespace fastnn::cuda
