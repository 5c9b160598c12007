// Cross entropy of the logits x weightᵀ + bias, which are never held whole.
#pragma once
#include <cstdint>

#include "gemm/gemm.hpp"
#include "softmax/cross_entropy.hpp"

namespace fastnn {

// The gradients are summed over the rows in float32 (float64 for float64), whatever the dtype.
struct LinearCrossEntropy {
  DType type;
  int64_t rows, classes, features;
  Matrix x, weight;  // rows x features, classes x features
  const char* bias = nullptr;
  int64_t bias_stride = 1;
  const int64_t* index;
  const void* class_weight = nullptr;  // as CrossEntropy::weight
  int64_t ignore_index = -100;
  double smoothing = 0;
  Precision precision = Precision::highest;
  bool batch_invariant = false;

  double* loss;                   // one a row
  const double* scale = nullptr;  // of each row's gradient; null: no gradients
  // What is wanted of the gradients. All are written; contiguous, of the type
  // that is summed in.
  void *grad_x = nullptr, *grad_weight = nullptr, *grad_bias = nullptr;
};
// Throws std::bad_alloc. The indices have been checked.
void linear_cross_entropy(const LinearCrossEntropy& call);

}  // namespace fastnn
