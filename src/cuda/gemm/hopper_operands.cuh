// From strides to what tensor maps of A and B say, and to how many batches there are.
#pragma once
#include <utility>

#include "cuda/gemm/gemm.hpp"
#include "cuda/gemm/hopper_tiles.cuh"
#include "cuda/types.cuh"

namespace fastnn::cuda {

// The batches as up to three dimensions, innermost first, in each of which both operands have a
// stride (0: they are shared).
struct Batches {
  int dims = 0;
  int64_t size[3] = {1, 1, 1}, a[3] = {}, b[3] = {};
};

inline bool group_batches(const Gemm& g, Batches& out) {
  for (int d = g.batch_dims - 1; d >= 0; d--) {
    if (g.batch[d] == 1) continue;
    const int last = out.dims - 1;
    if (last >= 0 && g.a.batch[d] == out.a[last] * out.size[last] &&
        g.b.batch[d] == out.b[last] * out.size[last]) {
      out.size[last] *= g.batch[d];
      continue;
    }
    if (out.dims == 3) return false;
    out.size[out.dims] = g.batch[d], out.a[out.dims] = g.a.batch[d];
    out.b[out.dims++] = g.b.batch[d];
  }
  return true;
}

struct Lying {
  TensorLayout layout;
  bool across = false;
  int step[3] = {};  // see Work
};

// How an operand lies, whose extent is M or N; false where no map can say so.
inline bool describe(const void* data, int64_t extent, int64_t extent_stride, int64_t k,
                     int64_t k_stride, const Batches& batches, const int64_t (&strides)[3],
                     int size, int box, bool batch_invariant, Lying& out) {
  const bool along = k_stride == 1 || k == 1;
  out.across = !along;
  if (!along && (extent_stride != 1 && extent != 1)) return false;
  if (!along && size != 2) return false;  // wgmma takes only 16-bit elements across
  TensorLayout& t = out.layout;
  t.data = data, t.element_bytes = size, t.swizzle = Swizzle::bytes128;
  t.dims = batches.dims > 1 ? 5 : 3;
  const int depth = kRowOfK / size;
  t.sizes[0] = along ? k : extent, t.sizes[1] = along ? extent : k;
  t.box[0] = depth, t.box[1] = along ? box : depth;
  // A dimension of one element may have any stride: one that the map takes. But a row alone is not
  // to go another way than the same row among others.
  const int64_t least = ceil_div(t.sizes[0] * size, 16) * 16;
  t.strides[1] =
      t.sizes[1] == 1 && !batch_invariant ? least : (along ? extent_stride : k_stride) * size;
  for (int d = 0; d < 3; d++) {
    out.step[d] = strides[d] != 0;
    t.sizes[2 + d] = out.step[d] ? batches.size[d] : 1, t.box[2 + d] = 1;
    t.strides[2 + d] = out.step[d] ? strides[d] * size : least;
  }
  return t.strides[1] >= t.sizes[0] * size && why_no_tensor_map(t) == nullptr;
}

inline bool is_shared(const Gemm& g, const Operand& x) {
  for (int d = 0; d < g.batch_dims; d++)
    if (g.batch[d] > 1 && x.batch[d] != 0) return false;
  return true;
}

inline int64_t batches_of(const Gemm& g) {
  int64_t batches = 1;
  for (int d = 0; d < g.batch_dims; d++) batches *= g.batch[d];
  return batches;
}

inline Operand turned(Operand x) {
  std::swap(x.row, x.column);
  return x;
}

// C transposed is B transposed times A transposed: where C's columns are contiguous, so that what
// neighbouring threads write is.
inline Gemm turned(const Gemm& g) {
  Gemm t = g;
  t.m = g.n, t.n = g.m;
  t.a = turned(g.b), t.b = turned(g.a), t.c = turned(g.c), t.residual = turned(g.residual);
  t.row_scale = g.col_scale, t.col_scale = g.row_scale;
  t.row_scale_step = g.col_scale_step, t.col_scale_step = g.row_scale_step;
  if (is_float8(g.a_type)) t.a_type = g.b_type, t.b_type = g.a_type;
  if (g.bias_axis != BiasAxis::none)
    t.bias_axis = g.bias_axis == BiasAxis::row ? BiasAxis::column : BiasAxis::row;
  return t;
}

}  // namespace fastnn::cuda
