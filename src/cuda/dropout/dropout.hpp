// Dropout, with the CPU's mask for the same seed: see common/philox.hpp.
#pragma once
#include <cstdint>

#include "common/dtype.hpp"

namespace fastnn::cuda {

constexpr int kDropoutDims = 8;

// Strides in elements, 0 allowed in x; float32, bfloat16 or float16. y may be x.
struct Dropout {
  DType type = DType::f32;
  int dims = 0;
  int64_t shape[kDropoutDims] = {}, x_strides[kDropoutDims] = {}, y_strides[kDropoutDims] = {};
  const void* x = nullptr;
  void* y = nullptr;
  const uint64_t* seed = nullptr;  // on the device
  double p = 0;                    // 0 to 1
};
void dropout(Dropout d, void* stream);

}  // namespace fastnn::cuda
