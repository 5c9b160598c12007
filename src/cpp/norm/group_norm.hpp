// Group normalization of strided arrays (N, C, ...): each image's channels in groups, of which each
// has statistics of its own. Instance norm is that with groups of one channel.
#pragma once
#include <cstdint>

#include "common/dtype.hpp"
#include "norm/batch_norm.hpp"

namespace fastnn {

struct GroupNormForward {
  DType type;  // of x and out
  int dims;
  const int64_t* shape;
  int64_t groups;  // divides the channels
  NormOperand x, out;
  PerChannel weight, bias;
  double *mean, *var;  // (N, groups), the variance biased: always written
  double eps;
};
// out = (x - mean) / sqrt(var + eps) * weight + bias
void group_norm(const GroupNormForward& call);

struct GroupNormBackward {
  DType type;  // of grad, x and grad_x
  int dims;
  const int64_t* shape;
  int64_t groups;
  NormOperand grad, x, grad_x;
  PerChannel weight;
  const double *mean, *var;
  double eps;
  double *grad_weight, *grad_bias;  // one a channel
};
void group_norm_backward(const GroupNormBackward& call);

}  // namespace fastnn
