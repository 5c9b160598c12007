// From a type's number to the type.
#pragma once
#include <stdexcept>
#include <string>

#include "common/dtype.hpp"
#include "cuda/device.cuh"

namespace fastnn::cuda {

// Calls f with a value of the element's type.
template <class F>
void with_float_type(const char* op, DType type, F f) {
  switch (type) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(__nv_bfloat16{});
    case DType::f16:
      return f(__half{});
    default:
      throw std::invalid_argument(std::string(op) + ": no CUDA kernel for " + dtype_name(type));
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastnn::cuda
