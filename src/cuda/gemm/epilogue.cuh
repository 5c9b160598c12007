// From a sum to an element of C.
#pragma once
#include "cuda/elementwise/activation.cuh"
#include "cuda/gemm/gemm.hpp"

namespace fastnn::cuda {

__device__ inline float read(DType type, const void* data, int64_t at) {
  switch (type) {
    case DType::bf16:
      return to_float(static_cast<const __nv_bfloat16*>(data)[at]);
    case DType::f16:
      return to_float(static_cast<const __half*>(data)[at]);
    default:
      return static_cast<const float*>(data)[at];
  }
}

__device__ inline void write(DType type, void* data, int64_t at, float value) {
  switch (type) {
    case DType::bf16:
      static_cast<__nv_bfloat16*>(data)[at] = from_float<__nv_bfloat16>(value);
      break;
    case DType::f16:
      static_cast<__half*>(data)[at] = from_float<__half>(value);
      break;
    default:
      static_cast<float*>(data)[at] = value;
  }
}

// One batch's operands: what Gemm has, with the batch's offsets added.
struct Placed {
  const char *a, *b;
  int64_t c, residual;  // elements from the first
};

__device__ inline Placed at_batch(const Gemm& g, int64_t batch, int size) {
  int64_t a = 0, b = 0, c = 0, residual = 0;
  for (int d = g.batch_dims - 1; d >= 0; d--) {
    const int64_t i = batch % g.batch[d];
    batch /= g.batch[d];
    a += i * g.a.batch[d], b += i * g.b.batch[d], c += i * g.c.batch[d];
    residual += i * g.residual.batch[d];
  }
  return {static_cast<const char*>(g.a.data) + a * size,
          static_cast<const char*>(g.b.data) + b * size, c, residual};
}

// `count` neighbours of one row of C, of their sums; the first is element `to` of C, and `residual`
// of the residual.
template <class Sum>
__device__ void finish_at(const Gemm& g, int64_t to, int64_t residual, int64_t row, int64_t column,
                          const Sum (&sums)[4], int count) {
  void* c = const_cast<void*>(g.c.data);
  if (g.out == DType::s32) {
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (e < count) static_cast<int*>(c)[to + e * g.c.column] = int(sums[e]);
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; e++) {
    if (e >= count) break;
    float x = float(sums[e]) * g.alpha;
    if (g.row_scale) x *= g.row_scale[row];
    if (g.col_scale) x *= g.col_scale[column + e];
    if (g.bias_axis != BiasAxis::none)
      x += read(g.bias_type, g.bias,
                (g.bias_axis == BiasAxis::row ? row : column + e) * g.bias_stride);
    if (g.residual.data)
      x += g.beta * read(g.out, g.residual.data, residual + e * g.residual.column);
    write(g.out, c, to + e * g.c.column, activate(g.activation, x));
  }
}

template <class Sum>
__device__ void finish(const Gemm& g, const Placed& at, int64_t row, int64_t column,
                       const Sum (&sums)[4], int count) {
  finish_at(g, at.c + row * g.c.row + column * g.c.column,
            at.residual + row * g.residual.row + column * g.residual.column, row, column, sums,
            count);
}

}  // namespace fastnn::cuda
