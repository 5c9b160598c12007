// Convolution in up to three dimensions, and its two gradients.
//
//   y[n, m, o] = sum over c, t of w[m, c, t] x[n, c, o * stride - padding + t * dilation]
//
// with o and t over the spatial dimensions, and x zero outside of its bounds. Channels are in
// `groups`, each of which sees its own share of them. One and two dimensions are three of which
// the first have size 1.
#pragma once
#include <cstdint>

#include "common/dtype.hpp"
#include "gemm/gemm.hpp"

namespace fastnn {

constexpr int kSpatial = 3;

// (N, C, D, H, W), or a weight (M, C / groups, D, H, W), with any strides, in elements.
struct Tensor5 {
  char* data = nullptr;
  int64_t size[2 + kSpatial] = {};
  int64_t stride[2 + kSpatial] = {};

  int64_t spatial() const { return size[2] * size[3] * size[4]; }
  int64_t count() const { return size[0] * size[1] * spatial(); }
};

struct Conv {
  Tensor5 x, w, y;  // of one type; sizes that belong together were checked
  DType type = DType::f32;
  int64_t stride[kSpatial] = {1, 1, 1}, padding[kSpatial] = {}, dilation[kSpatial] = {1, 1, 1};
  int64_t groups = 1;
  Precision precision = Precision::highest;
  bool batch_invariant = false;
  // The epilogue of conv_forward (of y) and conv_input (of x): activation(... + bias + residual).
  const char* bias = nullptr;      // one an output channel, contiguous, of `type`
  const char* residual = nullptr;  // with the sizes and strides of the result
  int activation = 0;
  // For conv_forward: where what is made of the filters is kept for other calls with the same ones.
  // w.data may be null then: OperandGone is thrown where the filters are needed nevertheless,
  // before anything is written onto a residual.
  Prepared* prepared = nullptr;
};

// What c's epilogue does to the columns or rows of g, whose result is part of `out` from a channel
// on.
void set_epilogue(Gemm& g, const Conv& c, const Tensor5& out, int64_t first_channel);

void conv_forward(const Conv& c);  // y from x and w
// Whether conv_forward may write y where the residual is: whether each of its elements is read
// once.
bool conv_takes_its_own_residual(const Conv& c);
// x from y and w: the gradient by the input, and the transposed convolution.
void conv_input(const Conv& c);
void conv_weight(const Conv& c);  // w from x and y: the gradient by the weight

// out[c] = the sum of y[n, c, o] over n and o, with c contiguous in `out`.
void channel_sum(const Tensor5& y, DType type, void* out);

}  // namespace fastnn
