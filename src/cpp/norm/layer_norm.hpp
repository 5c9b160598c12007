// Normalization of rows: layer norm, and rms norm, which does not take the mean off first.
#pragma once
#include <cstdint>

#include "common/dtype.hpp"
#include "norm/batch_norm.hpp"

namespace fastnn {

struct RowNormForward {
  DType type;  // of x and out
  int dims;
  int row_dims;  // the last dimensions, which make up a row
  const int64_t* shape;
  NormOperand x, out;
  PerChannel weight, bias;  // one number an element of a row
  double eps;
  bool centered;  // layer norm
};
// out = (x - mean) / sqrt(var + eps) * weight + bias for each row; where it is not centered, mean
// is 0 and var the mean of the squares.
void row_norm(const RowNormForward& call);

struct RowNormBackward {
  DType type;  // of grad, x and grad_x
  int dims, row_dims;
  const int64_t* shape;
  NormOperand grad, x, grad_x;
  PerChannel weight;
  double eps;
  bool centered;
  double *grad_weight, *grad_bias;  // null where not wanted
};
void row_norm_backward(const RowNormBackward& call);

// What a kernel works on: rows whose elements are neighbours. Numbers for the columns are float, or
// double for float64, and null where there are none.
struct RowBlock {
  static constexpr int64_t kRows = 16, kAhead = 4;
  int64_t rows, n;
  // Behind these, what will be read next, or the last again.
  const char* x[kRows + kAhead];
  const char* grad[kRows + kAhead];
  char* out[kRows];  // or the gradient by x
  const void *weight, *bias;
  double eps;
  bool around_caches;  // results will have left the caches before anyone reads them
};

// What a row's gradient is computed with: x^ = (x - center) * scale + shift, and grad_x = (grad *
// weight - mean + x^ * along + rest) * scale. In float, or in double for float64.
template <class S>
struct RowTerms {
  S center, scale, shift, mean, along, rest;
};
constexpr int64_t kRowTerms = 6;

// The kernels of one instruction set, indexed by [dtype].
struct RowNormKernels {
  void (*forward[kNormFloatTypes])(const RowBlock& block, bool centered);
  // Of each row; terms: an array of RowTerms.
  void (*terms[kNormFloatTypes])(const RowBlock& block, bool centered, void* terms);
  // The gradient by x, and those by weight and bias, which are added to.
  void (*backward[kNormFloatTypes])(const RowBlock& block, const void* terms, void* sum_weight,
                                    void* sum_bias);
  // Column sums in the kernels' type added to those in float64, and cleared.
  void (*flush[kNormFloatTypes])(void* sums, int64_t n, double* to);
  // To the type that is computed in.
  void (*convert[kNormFloatTypes][kNormFloatTypes])(const void* from, int64_t stride, int64_t n,
                                                    void* to);
  void (*end_stream)();
};
const RowNormKernels& portable_row_norm();
const RowNormKernels& avx2_row_norm();
const RowNormKernels& avx512_row_norm();

}  // namespace fastnn
