// Batch normalization of strided arrays (N, C, ...): statistics, normalization and their gradients,
// with an added residual and relu in the same passes.
#pragma once
#include <cstdint>

#include "common/dtype.hpp"

namespace fastnn {

constexpr int kMaxNormDims = 64;  // torch's own limit
constexpr int kNormFloatTypes = 4;

// Strides count elements. `data` is null where there is no such operand.
struct NormOperand {
  void* data = nullptr;
  const int64_t* strides = nullptr;
};

// One number a channel, of any floating-point type.
struct PerChannel {
  void* data = nullptr;
  DType type = DType::f32;
  int64_t stride = 0;
};

struct BatchNormForward {
  DType type;  // of x, residual and out
  int dims;
  const int64_t* shape;
  NormOperand x, residual, out;
  PerChannel weight, bias;
  PerChannel given_mean, given_var;  // null: the statistics are those of x
  double *mean, *var;  // what was normalized with, the variance biased: always written
  double eps;
  bool relu;
};
// out = relu((x - mean) / sqrt(var + eps) * weight + bias + residual)
void batch_norm(const BatchNormForward& call);

struct BatchNormBackward {
  DType type;  // of grad, x, out, grad_x and grad_residual
  int dims;
  const int64_t* shape;
  NormOperand grad, x;
  NormOperand out;  // the forward's, where that ended in relu
  NormOperand grad_x, grad_residual;
  PerChannel weight;
  const double *mean, *var;
  bool training;  // the statistics depend on x
  double eps;
  double *grad_weight, *grad_bias;
};
void batch_norm_backward(const BatchNormBackward& call);

// running = (1 - momentum) * running + momentum * statistic * factor, in float64, rounded once.
void update_running(const PerChannel& running, int64_t channels, const double* statistic,
                    double factor, double momentum);
// Numbers in float64, which lie together, to another type.
void narrow(const double* from, int64_t n, void* to, DType type);

// What a kernel works on: rows, in each of them channels, of n elements each. `row`, `channel` and
// `inner` are strides in elements.
struct NormBlock {
  static constexpr int kMost = 5;  // operands
  static constexpr int64_t kMostChannels = 64;
  int64_t rows, channels, n;
  char* at[kMost];
  int64_t row[kMost], channel[kMost], inner[kMost];
  // Elements from a place to the same place of the next channels, which is fetched while this one
  // is written; 0 fetches nothing new.
  int64_t ahead = 0;
  bool around_caches = false;  // results will have left the caches before anyone reads them
};

// The kernels of one instruction set, indexed by [dtype], then by [dense: all inner strides are 1].
// `plane`: a block has at most kMostChannels, and n elements of each in a row; `across`: element i
// of each row belongs to channel i, and `channels` is 1. What is given for channels is an array of
// one number each. Coefficients are float, or double for float64.
struct BatchNormKernels {
  // Operand 0 is x. Merges the block's mean and sum of squared deviations from it into those of
  // `before` elements.
  using Stats = void (*)(const NormBlock& block, int64_t before, double* mean, double* squares);
  // x, residual, out. out = relu((x - coef[0]) * coef[1] + coef[2] + residual)
  using Apply = void (*)(const NormBlock& block, const void* const* coef, bool residual, bool relu);
  // grad, x, out. sums[0] += grad, sums[1] += grad * (x - center); relu: where out > 0.
  using Reduce = void (*)(const NormBlock& block, const void* center, bool relu, double* sum_grad,
                          double* sum_grad_x);
  // grad, x, out, grad_x, grad_residual. grad_x = grad * coef[1] + (x - coef[0]) * coef[2] +
  // coef[3], the last two terms only if training.
  using Backward = void (*)(const NormBlock& block, const void* const* coef, bool training,
                            bool residual, bool relu);
  struct Family {
    Stats stats;
    Apply apply;
    Reduce reduce;
    Backward backward;
  };
  Family plane[kNormFloatTypes][2];
  Family across[kNormFloatTypes][2];
  void (*widen[kNormFloatTypes])(const void* x, int64_t stride, int64_t n, double* out);
  void (*narrow[kNormFloatTypes])(const double* from, int64_t n, void* to, int64_t stride);
  // Means and sums of squares of `chunks` sets of elements, `stride` apart, become one: for n
  // channels. counts: the elements of a channel in each set.
  void (*combine)(int64_t chunks, const double* counts, const double* means, const double* squares,
                  int64_t stride, int64_t n, double* mean, double* square);
  void (*end_stream)();  // after the last block around the caches
};
const BatchNormKernels& portable_batch_norm();
const BatchNormKernels& avx2_batch_norm();
const BatchNormKernels& avx512_batch_norm();

}  // namespace fastnn
