// Layer norm and rms norm of rows, and their gradients.
#pragma once
#include "cuda/reduce/rows.hpp"

namespace fastnn::cuda {

struct RowNorm {
  Rows rows;                          // x and out; grad, x and grad_x
  DType type = DType::f32;            // float32, bfloat16 or float16
  const void* weight = nullptr;       // n neighbours, or null: 1
  const void* bias = nullptr;         // null: 0
  DType parameter_type = DType::f32;  // type or float32
  double eps = 0;
  bool centered = true;  // layer norm
  // Of the backward; null: not wanted. n numbers each.
  double *by_weight = nullptr, *by_bias = nullptr;
  float* workspace = nullptr;  // of row_norm_workspace() floats where one of them is
};

int64_t row_norm_workspace(int64_t rows, int64_t n);
void row_norm(const RowNorm& norm, void* stream);
void row_norm_backward(const RowNorm& norm, void* stream);

}  // namespace fastnn::cuda
