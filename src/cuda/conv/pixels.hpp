// Images and filters as the kernels read them: the channels of a pixel together, in pieces of 16
// bytes.
#pragma once
#include "cuda/conv/conv.hpp"

namespace fastnn::cuda {

struct Pixels {
  const char* data = nullptr;
  int64_t image = 0, step[kSpatial] = {};  // strides in elements: of images, or filters, and pixels
  int64_t group = 0;                       // from a group's channels to the next one's
  int channels = 0;                        // of a group, zeros at the end included
};

// `t` as it lies where its channels can be read in pieces, else copied, with zeros behind the
// channels of each group that do not fill a piece. even: all pixels of all images have to be one
// stride apart.
Pixels in_pixels(const Tensor5& t, int64_t groups, DType type, bool even, const Allocate& allocate,
                 void* stream);

}  // namespace fastnn::cuda
