// Cross entropy of strided logits (N, C, ...) with class indices or probabilities, and its gradient
// by the logits.
//
// With q the weights of a position's classes, q_c = w_c ((1 - smoothing) t_c + smoothing / C),
// where t is the target's probability, or 1 at its index: loss = sum q_c (lse - x_c), where lse =
// log sum exp(x); with mass = sum q_c the gradient is mass softmax(x) - q (Szegedy et al.,
// arXiv:1512.00567).
#pragma once
#include <cstdint>

#include "common/dtype.hpp"
#include "softmax/softmax.hpp"

namespace fastnn {

enum class Reduction : int { none = 0, mean = 1, sum = 2 };

struct CrossEntropy {
  DType type;  // of the logits, the probabilities and the gradient
  int dims;
  const int64_t* shape;  // the classes are dimension 1; one position: (1, C)
  SoftmaxOperand x;
  // One of the two. Indices lie in the order of the positions.
  const int64_t* index = nullptr;
  SoftmaxOperand probabilities;
  const void* weight = nullptr;  // of C numbers of the type that is computed in, or null: 1
  int64_t ignore_index = -100;
  double smoothing = 0;
  Reduction reduction = Reduction::mean;

  int64_t classes() const { return shape[1]; }
  int64_t positions() const {
    int64_t n = 1;
    for (int d = 0; d < dims; d++)
      if (d != 1) n *= shape[d];
    return n;
  }
};

// Throws std::out_of_range where an index is neither a class nor ignored. What a mean is divided
// by.
double check_targets(const CrossEntropy& call);

// `loss`, `lse` and `mass` are arrays of one number a position.
void cross_entropy(const CrossEntropy& call, double* loss, double* lse, double* mass);
// The sum of all losses, or their mean.
double reduce_losses(const CrossEntropy& call, const double* loss, double total);
// grad_x = scale (mass softmax(x) - q) for the `scale` of each position. It may be x. Throws as
// check_targets does.
void cross_entropy_backward(const CrossEntropy& call, const double* lse, const double* mass,
                            const double* scale, SoftmaxOperand grad_x);
// Both for a matrix of logits whose rows are neighbours, the gradient in place of the logits: each
// row is gone over while it lies in the cache.
void cross_entropy_in_place(const CrossEntropy& call, double* loss, double* lse, double* mass,
                            const double* scale);

// The kernels of one instruction set, indexed by [dtype].
struct CrossEntropyKernels {
  // `positions` positions of n classes; rows: x_step is 1, columns: x_position is 1, with up to
  // SoftmaxKernels::kMostColumns positions. Strides in elements.
  struct Block {
    const void* x;
    int64_t x_step, x_position;
    const void* probabilities = nullptr;
    int64_t p_step = 0, p_position = 0;
    int64_t positions, n;
    const void* weight = nullptr;
  };
  // The sum of exp(x - most), sum w (most - x), and of the probabilities p sum w p (most - x + log
  // exps) and sum w p.
  struct Sums {
    double most, exps, below, p_below, p;
  };
  using Reduce = void (*)(const Block& block, bool smooth, Sums* sums);
  // What a position's gradient is made of: softs softmax(x) - w (flat + hard t).
  struct Factors {
    double lse, softs, flat, hard;
    int64_t index;  // the class where t is 1; -1: none
  };
  using Gradient = void (*)(const Block& block, const Factors* factors, void* out, int64_t out_step,
                            int64_t out_position);
  struct Family {
    Reduce rows, columns;
    Gradient gradient_rows, gradient_columns;
    double (*read)(const void* x);
  };
  Family family[kSoftmaxFloatTypes];
};
const CrossEntropyKernels& portable_cross_entropy();
const CrossEntropyKernels& avx2_cross_entropy();
const CrossEntropyKernels& avx512_cross_entropy();

}  // namespace fastnn
