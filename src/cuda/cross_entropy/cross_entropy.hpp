// Cross entropy of logits of any strides, and its gradient.
#pragma once
#include "cuda/reduce/rows.hpp"

namespace fastnn::cuda {

// Of the classes of a position, w_c the weights: q_c = w_c ((1 - smoothing) t_c + smoothing / C),
// where t are the target's probabilities, or 1 at its index; lse = log sum exp(x). The loss is the
// sum of q_c (lse - x_c), 0 where the index is ignore_index. An index that is no class is an
// assertion of the device, as in torch. Positions are numbered as the rows are.
struct CrossEntropy {
  Rows rows;  // x; then in the backward the gradient; then, without `index`, the probabilities
  DType type = DType::f32;         // of these
  const int64_t* index = nullptr;  // of each position
  const float* weight = nullptr;   // of each class; null: 1
  int64_t ignore_index = -100;
  float smoothing = 0;
  double *lse = nullptr, *mass = nullptr;  // of each position: lse, and the sum of q
};

// Writes lse and mass, and the losses: float64 to `losses`, or, where that is null, `type` to out.
void cross_entropy(const CrossEntropy& call, double* losses, void* out, void* stream);

// The gradient by x: (mass e^(x - lse) - q) grad[position * grad_step], over *total where that is
// not null. x may be overwritten.
void cross_entropy_backward(const CrossEntropy& call, const float* grad, int64_t grad_step,
                            const double* total, void* stream);

// *total: the sum of the weights of all positions' classes, what a mean is divided by. *out: the
// sum of the losses, over the total with `mean`; in an order that the number of positions gives.
struct LossSum {
  const double* losses = nullptr;
  int64_t positions = 0;
  const int64_t* index = nullptr;  // null: probabilities, each position counts 1
  const float* weight = nullptr;
  int64_t ignore_index = -100;
  bool mean = false;
  void* out = nullptr;
  DType type = DType::f32;
  double* total = nullptr;
  double* workspace = nullptr;  // of loss_sum_workspace() numbers
};
int64_t loss_sum_workspace(int64_t positions);
void loss_sum(const LossSum& call, void* stream);

}  // namespace fastnn::cuda
