// Batch norm and group norm of (N, C, ...), and their gradients.
#pragma once
#include <cstdint>

#include "common/dtype.hpp"

namespace fastnn::cuda {

constexpr int kNormDims = 8, kNormOperands = 5;  // of what the bindings take

// One number a channel, float32 or 16 bits; null: none are given.
struct PerChannel {
  void* data = nullptr;
  DType type = DType::f32;
  int64_t stride = 0;
};

// Strides in elements; null: there is none.
struct NormOperand {
  void* data = nullptr;
  const int64_t* strides = nullptr;
};

// Two numbers of a piece of a unit: mean and sum of squared deviations, or sums of a gradient and
// of its products.
struct alignas(16) Pair {
  double a, b;
};
// Of each channel (of an image). Forward: (x - center) * scale + shift; backward: grad * scale +
// (x - center) * by_x + shift.
struct alignas(16) Coefficients {
  float center, scale, shift, by_x;
};

struct NormCall {
  DType type = DType::f32;  // of the operands: float32, bfloat16 or float16
  int dims = 0;
  const int64_t* shape = nullptr;
  int64_t groups = 0;  // of group norm; 0: batch norm
  // forward: x, residual, out; backward: grad, x, out (of the forward, where that ended in relu),
  // grad_x, grad_residual. Results are dense, contiguous or channels-last.
  NormOperand operands[kNormOperands];
  PerChannel weight, bias;
  PerChannel given_mean, given_var;  // null: the statistics are those of x
  // Of each channel, or (N, groups). The forward writes them, the variance biased.
  double *mean = nullptr, *var = nullptr;
  double eps = 0;
  bool relu = false;
  bool training = true;  // in the backward: the statistics depend on x
  double *by_weight = nullptr, *by_bias = nullptr;
  void* workspace = nullptr;  // of *_workspace() bytes
};

int64_t norm_workspace(const NormCall& call);
int64_t norm_backward_workspace(const NormCall& call);
void norm(const NormCall& call, void* stream);
void norm_backward(const NormCall& call, void* stream);

// running = (1 - momentum) * running + momentum * statistic * factor, in float64, rounded once.
void update_running(const PerChannel& running_mean, const PerChannel& running_var, int64_t channels,
                    const double* mean, const double* var, double factor, double momentum,
                    void* stream);

}  // namespace fastnn::cuda
