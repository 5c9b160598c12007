// Activations and their gradients on strided arrays.
#pragma once
#include <cstdint>

#include "common/activation.hpp"
#include "common/dtype.hpp"

namespace fastnn {

constexpr int kMaxElementwiseDims = 64;  // torch's own limit
constexpr int kFloatTypes = 4;           // DType f32, f64, bf16, f16

// Strides count elements. 0 is allowed in inputs.
struct Operand {
  void* data;
  const int64_t* strides;
};

// out = f(x); out may be x. kind: 1 to 9; exp and erf for float32 and float64 only.
void unary(int kind, DType type, int dims, const int64_t* shape, Operand x, Operand out);

// out = grad * f', from the output of relu, relu6, sigmoid and tanh, from the input of the others.
// out may be either operand.
void activation_backward(int kind, DType type, int dims, const int64_t* shape, Operand grad,
                         Operand saved, Operand out);

// x[i] = f(x[i]) for n neighbours, on the calling thread: the end of what other families compute.
void activate_row(int kind, DType type, void* x, int64_t n);

// The largest error of float32 `kind` on the active instruction set against the portable float64
// function, in units in the last place of the exact result, over the `count` floats whose bit
// patterns start at `first`, every `step`-th. A wrong infinity or NaN counts as infinite.
struct UlpError {
  double error;
  float at;
};
UlpError largest_ulp_error(int kind, uint32_t first, uint64_t count, uint64_t step);

// The kernels of one instruction set, one run of n elements each, indexed [dtype][kind].
struct ElementwiseKernels {
  // stream: write around the caches
  using Unary = void (*)(const void* x, int64_t x_stride, void* out, int64_t out_stride, int64_t n,
                         bool stream);
  using Backward = void (*)(const void* grad, int64_t grad_stride, const void* saved,
                            int64_t saved_stride, void* out, int64_t out_stride, int64_t n,
                            bool stream);
  Unary unary[kFloatTypes][kUnaryKinds];
  Backward backward[kFloatTypes][kActivations];
};
const ElementwiseKernels& portable_elementwise();
const ElementwiseKernels& avx2_elementwise();
const ElementwiseKernels& avx512_elementwise();

}  // namespace fastnn
