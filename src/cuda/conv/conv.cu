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

// The step from a pixel to the next, if there is one: the same between any two neighbours.
bool pixel_step(const Tensor5& t, int64_t& step) {
  step = 1;
  int64_t count = 1;
  for (int d = 4; d >= 2; d--) {
    if (t.size[d] == 1) continue;
    if (count == 1)
      step = t.stride[d];
    else if (t.stride[d] != step * count)
      return false;
    count *= t.size[d];
  }
  return true;
}

// Whether an operand with these two strides, of which one is that of neighbours, and a third one
// between images can be copied in pieces.
bool in_pieces(const void* data, int64_t one, int64_t other, int64_t images, DType type) {
  const int64_t each = type == DType::f32 ? 4 : 8;
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && images % each == 0 &&
         ((one == 1 && other % each == 0) || (other == 1 && one % each == 0));
}

// Filters of one tap that see every pixel: a matrix product as it is, in either layout, where
// operands can be copied in pieces as they lie.
bool as_product(const Conv& c, bool transposed, const Allocate& allocate, Gemm& g) {
  const Tensor5 &image = transposed ? c.y : c.x, &out = transposed ? c.x : c.y;
  if (c.groups != 1 || c.w.spatial() != 1) return false;
  for (int d = 0; d < kSpatial; d++)
    if (c.stride[d] != 1 || c.padding[d] != 0) return false;
  const int64_t channels = image.size[1], pixels = image.spatial(), images = image.size[0];
  int64_t from, to;
  if (!pixel_step(image, from) || !pixel_step(out, to) ||
      !in_pieces(image.data, from, image.stride[1], images > 1 ? image.stride[0] : 0, c.type) ||
      !in_pieces(c.w.data, c.w.stride[0], c.w.stride[1], 0, c.type))
    return false;
  g.k = channels;
  g.a.data = image.data, g.a.row = from, g.a.column = image.stride[1];
  g.b.data = c.w.data;
  g.b.row = c.w.stride[transposed ? 0 : 1], g.b.column = c.w.stride[transposed ? 1 : 0];
  g.c.row = g.residual.row = to;
  if (images == 1 || (image.stride[0] == pixels * from && out.stride[0] == pixels * to)) {
    g.m = images * pixels;
  } else {
    g.m = pixels, g.batch_dims = 1, g.batch[0] = images;
    g.a.batch[0] = image.stride[0], g.c.batch[0] = g.residual.batch[0] = out.stride[0];
  }
  g.batch_invariant = c.batch_invariant;
  const int64_t batches = g.batch_dims ? images : 1;
  g.workspace_bytes = gemm_workspace(g.a_type, g.parts, batches, g.m, g.n, g.k, c.batch_invariant);
  if (g.workspace_bytes) g.workspace = allocate(size_t(g.workspace_bytes));
  return true;
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
  Gemm g = epilogue_of(c, out);
  if (as_product(c, transposed, allocate, g)) return gemm(g, stream);
  const Pixels filters = pixels(c.w, 1, false);
  const Pixels image = pixels(transposed ? c.y : c.x, c.groups, false);
  implicit_product({g, &c, transposed, image, filters}, stream);
}

}  // namespace fastnn::cuda
