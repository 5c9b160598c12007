// From a sum to an element of C.
#pragma once
#include "cuda/elementwise/activation.cuh"
#include "cuda/gemm/gemm.hpp"
#include "cuda/ptx.cuh"

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

// 8, 16 or 32 bytes, whose address is a multiple of 8 or 16.
template <int words>
__device__ __forceinline__ void store_words(void* to, const uint32_t (&w)[words]) {
  static_assert(words == 2 || words % 4 == 0);
  if constexpr (words == 2) *static_cast<uint2*>(to) = make_uint2(w[0], w[1]);
#pragma unroll
  for (int i = 0; i + 4 <= words; i += 4)
    static_cast<uint4*>(to)[i / 4] = make_uint4(w[i], w[i + 1], w[i + 2], w[i + 3]);
}

// n neighbours, whose address is a multiple of their size, or of 16 where that is less.
template <int n>
__device__ __forceinline__ void write_all(DType type, void* data, int64_t at, const float (&x)[n]) {
  if (type == DType::f32) {
    uint32_t words[n];
#pragma unroll
    for (int e = 0; e < n; e++) words[e] = __float_as_uint(x[e]);
    store_words(static_cast<float*>(data) + at, words);
  } else {
    uint32_t words[n / 2];
#pragma unroll
    for (int e = 0; e < n; e += 2)
      words[e / 2] =
          type == DType::bf16 ? ptx::pack_bf16(x[e], x[e + 1]) : ptx::pack_f16(x[e], x[e + 1]);
    store_words(static_cast<__half*>(data) + at, words);
  }
}

// Whether n neighbours from element `at` on may be written at once.
template <int n>
__device__ __forceinline__ bool at_once(const Gemm& g, int64_t at, int count) {
  const int size = g.out == DType::bf16 || g.out == DType::f16 ? 2 : 4;
  const auto address = reinterpret_cast<uintptr_t>(g.c.data) + at * size;
  return count == n && g.c.column == 1 && address % (n * size < 16 ? n * size : 16) == 0;
}

// `count` neighbours of one row of C, of their sums, n of them where all exist; the first is
// element `to` of C, and `residual` of the residual.
template <class Sum, int n>
__device__ void finish_at(const Gemm& g, int64_t to, int64_t residual, int64_t row, int64_t column,
                          const Sum (&sums)[n], int count) {
  void* c = const_cast<void*>(g.c.data);
  if (g.out == DType::s32) {
    uint32_t words[n];
#pragma unroll
    for (int e = 0; e < n; e++) words[e] = uint32_t(int(sums[e]));
    if (at_once<n>(g, to, count)) return store_words(static_cast<int*>(c) + to, words);
#pragma unroll
    for (int e = 0; e < n; e++)
      if (e < count) static_cast<int*>(c)[to + e * g.c.column] = int(words[e]);
    return;
  }
  float x[n];
#pragma unroll
  for (int e = 0; e < n; e++) x[e] = float(sums[e]) * g.alpha;
  if (g.row_scale) {
    const float scale = g.row_scale[row * g.row_scale_step];
#pragma unroll
    for (int e = 0; e < n; e++) x[e] *= scale;
  }
  if (g.col_scale) {
#pragma unroll
    for (int e = 0; e < n; e++)
      if (e < count) x[e] *= g.col_scale[(column + e) * g.col_scale_step];
  }
  if (g.bias_axis != BiasAxis::none) {
#pragma unroll
    for (int e = 0; e < n; e++)
      if (e < count)
        x[e] += read(g.bias_type, g.bias,
                     (g.bias_axis == BiasAxis::row ? row : column + e) * g.bias_stride);
  }
  if (g.residual.data) {
#pragma unroll
    for (int e = 0; e < n; e++)
      if (e < count)
        x[e] += g.beta * read(g.out, g.residual.data, residual + e * g.residual.column);
  }
  activate_all(g.activation, x);
  if (at_once<n>(g, to, count)) return write_all(g.out, c, to, x);
#pragma unroll
  for (int e = 0; e < n; e++)
    if (e < count) write(g.out, c, to + e * g.c.column, x[e]);
}

template <class Sum, int n>
__device__ void finish(const Gemm& g, const Placed& at, int64_t row, int64_t column,
                       const Sum (&sums)[n], int count) {
  finish_at(g, at.c + row * g.c.row + column * g.c.column,
            at.residual + row * g.residual.row + column * g.residual.column, row, column, sums,
            count);
}

}  // namespace fastnn::cuda
