// Which way each product of a convolution goes.
#include "cuda/conv/conv.hpp"

#include <algorithm>
#include "cuda/conv/depthwise.hpp"
#include "cuda/conv/implicit.hpp"
#include "cuda/gemm/gemm.hpp"

#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int64_t kMostPixels = int64_t(1) << 31, kMostBlocks = 65535;

// Kernels count pixels and channels in 32 bits, and blocks of a launch are limited.
void check_sizes(const Conv& c) {
  int64_t phases = 1;
  for (int d = 0; d < kSpatial; d++) phases *= c.stride[d];
  int64_t reach = 0;  // of a filter, with the padding
  for (int d = 0; d < kSpatial; d++)
    reach = std::max(reach, c.padding[d] + c.dilation[d] * c.w.size[2 + d] + c.x.size[2 + d]);
  if (c.x.size[0] * c.x.spatial() >= kMostPixels || c.y.size[0] * c.y.spatial() >= kMostPixels ||
      c.w.count() >= kMostPixels || reach >= kMostPixels / 4)
    throw std::invalid_argument("conv: x, w, y: expected fewer than 2^31 pixels and weights");
  if ((c.groups > kMostBlocks && !is_depthwise(c)) || phases > kMostBlocks)
    throw std::invalid_argument(
        "conv: groups, stride: expected at most 65535 (strides multiplied)");
}

Gemm epilogue_of(const Conv& c, const Tensor5& out) {
  Gemm g;
  g.n = out.size[1] / c.groups;
  g.a_type = g.out = g.bias_type = c.type;
  g.parts = 3 - int(c.precision);
  g.c.data = out.data, g.c.column = out.stride[1];
  g.residual.data = c.residual, g.residual.column = out.stride[1];
  g.beta = 1;
  g.bias = c.bias;
  if (c.bias) g.bias_axis = BiasAxis::column;
  g.activation = c.activation;
  return g;
}

}  // namespace

void conv(Product which, const Conv& c, const Allocate& allocate, void* stream) {
  check_sizes(c);
  const Tensor5& out = which == Product::forward ? c.y : which == Product::input ? c.x : c.w;
  if (out.count() == 0) return;
  const auto pixels = [&](const Tensor5& t, int64_t groups, bool even) {
    return in_pixels(t, groups, c.type, even, allocate, stream);
  };
  const bool transposed = which == Product::input;
  if (is_depthwise(c))
    return which == Product::weight ? depthwise_weight(c, allocate, stream)
                                    : depthwise(c, transposed, allocate, stream);
  if (which == Product::weight) {
    Gemm g;
    g.m = c.w.size[0] / c.groups, g.n = c.w.size[1];
    g.a_type = g.out = c.type, g.parts = 3 - int(c.precision);
    g.c.data = c.w.data, g.c.column = c.w.stride[1];
    const Pixels x = pixels(c.x, c.groups, false), y = pixels(c.y, c.groups, true);
    return implicit_weight(g, c, x, y, allocate, stream);
  }
  const Pixels filters = pixels(c.w, 1, false);
  const Pixels image = pixels(transposed ? c.y : c.x, c.groups, false);
  implicit_product({epilogue_of(c, out), &c, transposed, image, filters}, stream);
}

}  // namespace fastnn::cuda
