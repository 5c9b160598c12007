// The int8 linear layer on a GPU: y = activation(scale_x[m] scale_w[n] (sum_k q[m, k] w[n, k] -
// zero[m] sum_k w[n, k]) + bias[n]), float32 in this order, rounded once, as quant/int8_linear.hpp.
// q is quantized beforehand (quantize.hpp).
#pragma once
#include <cstdint>

#include "common/dtype.hpp"

namespace fastnn::cuda {

struct Int8Linear {
  int64_t m = 0, n = 0, k = 0;
  const uint8_t* q = nullptr;
  int64_t q_row = 0;  // its rows are dense
  const float* x_scale = nullptr;
  const int32_t* x_zero = nullptr;
  int64_t x_step = 0;  // from a row's scale and zero point to the next row's: 1, or 0
  const int8_t* w = nullptr;
  int64_t w_row = 0, w_column = 0;
  const int32_t* w_sums = nullptr;  // of the weight's rows; few_rows() needs none
  const float* w_scale = nullptr;
  int64_t w_step = 0;
  const void* bias = nullptr;  // n neighbours, or null
  DType bias_type = DType::f32;
  int activation = 0;
  void* y = nullptr;  // (m, n), contiguous
  DType type = DType::f32;
};

// Whether the rows are so few, and lie so, that no sums of the weight's rows are needed.
bool few_rows(const Int8Linear& call);
void int8_linear(const Int8Linear& call, void* stream);

void row_sums(const int8_t* w, int64_t n, int64_t k, int64_t w_row, int64_t w_column, int32_t* sums,
              void* stream);

}  // namespace fastnn::cuda
