// softmax and log_softmax of strided arrays along one dimension, and their gradients.
#pragma once
#include <cstdint>

#include "common/dtype.hpp"

namespace fastnn {

constexpr int kMaxSoftmaxDims = 64;  // torch's own limit
constexpr int kSoftmaxFloatTypes = 4;

// Strides count elements.
struct SoftmaxOperand {
  void* data = nullptr;
  const int64_t* strides = nullptr;
};

struct SoftmaxCall {
  DType type;
  bool log;
  int dims;
  const int64_t* shape;
  int dim;  // the one that the results sum up to 1 along
};
// out = exp(x - max) / sum exp(x - max), or its logarithm. out may be x.
void softmax(const SoftmaxCall& call, SoftmaxOperand x, SoftmaxOperand out);
// From the result `saved`: grad_x = saved * (grad - sum grad * saved), of the logarithm grad -
// exp(saved) * sum grad. grad_x may be either operand.
void softmax_backward(const SoftmaxCall& call, SoftmaxOperand grad, SoftmaxOperand saved,
                      SoftmaxOperand grad_x);

// The kernels of one instruction set, indexed by [dtype], then by [log].
struct SoftmaxKernels {
  static constexpr int64_t kMostColumns = 256, kPitch = 16;
  // `rows` rows of n neighbours each; a row's stride in elements. `work` holds n numbers of the
  // type that is computed in.
  struct Rows {
    const void* x[2];  // the input, or grad and saved
    int64_t x_row[2];
    void* out;
    int64_t out_row, rows, n;
    void* work;
    bool around_caches;
  };
  // `columns` neighbours, up to kMostColumns; along n elements which are `step` apart. `work` holds
  // n times the columns, rounded up to kPitch.
  struct Columns {
    const void* x[2];
    int64_t step[2];
    void* out;
    int64_t out_step, columns, n;
    void* work;
  };
  struct Family {
    void (*rows)(const Rows&);
    void (*rows_backward)(const Rows&);
    void (*columns)(const Columns&);
    void (*columns_backward)(const Columns&);
  };
  Family family[kSoftmaxFloatTypes][2];
  void (*end_stream)();  // after the last row around the caches
};
const SoftmaxKernels& portable_softmax();
const SoftmaxKernels& avx2_softmax();
const SoftmaxKernels& avx512_softmax();

}  // namespace fastnn
