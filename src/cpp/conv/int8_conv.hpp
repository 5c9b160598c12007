// Convolution of 8-bit images with 8-bit filters, in exact int32 sums:
//
//   sum[n, m, o] = sum over c, t of w[m, c, t] x[n, c, o * stride - padding + t * dilation]
//
// with x = `outside` beyond its bounds, where a quantized image has its zero point; and of each sum
// what Requantize makes of it.
#pragma once
#include "conv/conv.hpp"
#include "quant/requantize.hpp"

namespace fastnn {

struct Int8Conv {
  Tensor5 x, w, y;          // uint8, int8, and:
  DType type = DType::f32;  // float32, bfloat16, uint8 or int8
  int64_t stride[kSpatial] = {1, 1, 1}, padding[kSpatial] = {}, dilation[kSpatial] = {1, 1, 1};
  int64_t groups = 1;
  int outside = 0;
  Requantize requantize;           // its columns are output channels
  const char* residual = nullptr;  // with the strides of y
  Prepared* prepared = nullptr;    // of these filters
};

// x's and y's channels are neighbours. Sums of up to kInt8Depth products are exact.
constexpr int64_t kInt8Depth = INT32_MAX / (255 * 128);
void int8_conv(const Int8Conv& c);

}  // namespace fastnn
