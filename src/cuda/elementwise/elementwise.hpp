// Activations and their gradients, element by element, of tensors of any strides.
#pragma once
#include <cstdint>

#include "common/dtype.hpp"

namespace fastnn::cuda {

constexpr int kMaxDims = 8;

// Strides in elements; float32, bfloat16 or float16.
struct Elementwise {
  int dims = 0;
  int64_t shape[kMaxDims] = {};
  DType type = DType::f32;
  int kind = 0;  // common/activation.hpp
  const void *x = nullptr, *saved = nullptr;
  void* y = nullptr;
  int64_t x_strides[kMaxDims] = {}, saved_strides[kMaxDims] = {}, y_strides[kMaxDims] = {};
};

// y = activation(x); y may be x.
void activation(Elementwise e, void* stream);
// y = x times the derivative at `saved`, which is the output where saves_output(kind), else the
// input.
void activation_backward(Elementwise e, void* stream);

}  // namespace fastnn::cuda
