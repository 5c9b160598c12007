// The sums of a matrix's columns: a bias's gradient.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/dtype.hpp"

namespace fastnn::cuda {

struct ColumnSum {
  const void* x = nullptr;  // rows x columns
  int64_t rows = 0, columns = 0, row_stride = 0, column_stride = 0;
  void* out = nullptr;  // columns, contiguous, of x's type
  DType type = DType::f32;
  float* workspace = nullptr;  // of column_sum_workspace() floats
};

// Floats, 0 where none is needed. By shape alone, like the order of the sums.
int64_t column_sum_workspace(int64_t rows, int64_t columns);
void column_sum(const ColumnSum& s, void* stream);

}  // namespace fastnn::cuda
