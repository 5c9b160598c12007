// The convolution of 8-bit images, requantized, as quant/requantize.hpp has it; scales and zero
// points lie on the device, where they are read.
#pragma once
#include "cuda/conv/conv.hpp"

namespace fastnn::cuda {

struct Int8Conv {
  Conv sizes;  // x uint8 or, `is_signed`, int8; w int8; y of `type`, whose channels are neighbours
  bool is_signed = false;
  DType type = DType::f32;  // or bf16, u8, s8
  const float *x_scale = nullptr, *w_scale = nullptr;
  const float* y_scale = nullptr;  // null: 1
  int64_t w_step = 0;              // from a filter's scale to the next one's: 1, or 0
  const int32_t *x_zero = nullptr, *y_zero = nullptr;
  const float* bias = nullptr;      // of each filter, or null
  const void* residual = nullptr;   // with y's strides, or null
  DType residual_type = DType::u8;  // or s8
  const float* residual_scale = nullptr;
  const int32_t* residual_zero = nullptr;
  bool relu = false, relu6 = false;  // with relu6 both
};

void int8_conv(const Int8Conv& call, const Allocate& allocate, void* stream);

}  // namespace fastnn::cuda
