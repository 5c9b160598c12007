// From the sums that wgmma leaves in registers to C.
#pragma once
#include <algorithm>
#include <type_traits>

#include "cuda/gemm/plain_sum.cuh"
#include "cuda/gemm/tiles.cuh"
#include "cuda/warpgroups.cuh"

namespace fastnn::cuda {

// Eight neighbours, aligned to 16 bytes.
template <class T>
__device__ __forceinline__ void read_eight(const T* from, float (&x)[8]) {
  T eight[8];
#pragma unroll
  for (int i = 0; i < int(sizeof(eight)) / kPieceBytes; i++) {
    const uint4 piece = reinterpret_cast<const uint4*>(from)[i];
    memcpy(eight + i * kPieceBytes / sizeof(T), &piece, kPieceBytes);
  }
#pragma unroll
  for (int e = 0; e < 8; e++) x[e] = to_float(eight[e]);
}

// x * scale + bias of eight neighbours of a row, as simple<scaled> has found them to lie.
__device__ __forceinline__ void scale_eight(const Gemm& g, int64_t row, int64_t column,
                                            float (&x)[8]) {
  const float by_row = g.row_scale ? g.row_scale[row * g.row_scale_step] : 1.0f;
  float by_column[8], bias[8] = {};
#pragma unroll
  for (int e = 0; e < 8; e++) by_column[e] = g.col_scale && !g.col_scale_step ? *g.col_scale : 1;
  if (g.col_scale && g.col_scale_step) read_eight(g.col_scale + column, by_column);
  if (g.bias_axis == BiasAxis::column) {
    if (g.bias_type == DType::f32)
      read_eight(static_cast<const float*>(g.bias) + column, bias);
    else if (g.bias_type == DType::bf16)
      read_eight(static_cast<const __nv_bfloat16*>(g.bias) + column, bias);
    else
      read_eight(static_cast<const __half*>(g.bias) + column, bias);
  }
#pragma unroll
  for (int e = 0; e < 8; e++) x[e] = x[e] * by_row * by_column[e] + bias[e];
}

// Eight neighbours in C, alpha times their sums; `scaled`: and scales, and a bias.
template <bool scaled, class Sum>
__device__ __forceinline__ void write_eight(const Gemm& g, int64_t to, int64_t row, int64_t column,
                                            const Sum (&sums)[8]) {
  void* c = const_cast<void*>(g.c.data);
  if constexpr (std::is_same_v<Sum, int>)
    if (g.out == DType::s32) {
      uint32_t words[8];
#pragma unroll
      for (int e = 0; e < 8; e++) words[e] = uint32_t(sums[e]);
      return store_words(static_cast<int*>(c) + to, words);
    }
  float x[8];
#pragma unroll
  for (int e = 0; e < 8; e++) x[e] = float(sums[e]) * g.alpha;
  if constexpr (scaled) scale_eight(g, row, column, x);
  write_all(g.out, c, to, x);
}

// From a warp's 16 rows of sums to C. `simple`: C is alpha times the sums (`scaled`: and scales,
// and a bias), and so aligned that it is written 16 bytes at a time; that is unrolled, as registers
// have no index. For all the rest the sums move down by 16 registers at a time instead, past one
// copy of much code.
template <bool split, bool scaled, int count, class Sum>
__device__ __forceinline__ void write_rows(const Gemm& g, const Placed& at, Sum (&sums)[count],
                                           int64_t first_row, int64_t first_column, bool simple) {
  constexpr float kMost = 3.402823466e38f;
  const int lane = int(threadIdx.x) % 32;
  const int64_t row = first_row + lane / 4;
  if constexpr (split) {
    bool finite = true;
#pragma unroll
    for (int i = 0; i < count; i++) finite = finite && fabsf(float(sums[i])) <= kMost;
    simple = simple && __all_sync(~0u, finite);
  }
  if (simple) {
#pragma unroll
    for (int j = 0; j < count / 4; j += 4)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        Sum eight[8];
#pragma unroll
        for (int i = 0; i < 8; i++) eight[i] = sums[4 * (j + i / 2) + 2 * half + i % 2];
        gather_columns(eight);
        const int64_t column = first_column + 8 * (j + lane % 4);
        if (row + 8 * half < g.m && column < g.n)
          write_eight<scaled>(g, at.c + (row + 8 * half) * g.c.row + column, row + 8 * half, column,
                              eight);
      }
    return;
  }
#pragma unroll 1
  for (int j = 0; j < count / 4; j += 4) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Sum eight[8];
#pragma unroll
      for (int i = 0; i < 8; i++) eight[i] = sums[4 * (i / 2) + 2 * half + i % 2];
      gather_columns(eight);
      const int64_t column = first_column + 8 * (j + lane % 4);
      const int64_t left = row + 8 * half < g.m ? g.n - column : 0;
      if constexpr (split) {
        // Parts of an infinity, or of a number whose products leave float32's range on the way,
        // multiply to NaN where float32 has a number or an infinity.
#pragma unroll
        for (int e = 0; e < 8; e++)
          if (e < left && !(fabsf(eight[e]) <= kMost))
            eight[e] = plain_sum<float>(g, at, row + 8 * half, column + e);
      }
      if (left > 0) finish(g, at, row + 8 * half, column, eight, left < 8 ? int(left) : 8);
    }
#pragma unroll
    for (int i = 0; i + 16 < count; i++) sums[i] = sums[i + 16];
  }
}

// Whether C is alpha times the sums (`scaled`: and scales, and a bias of its columns) and all of it
// lies in pieces of eight that are whole and aligned.
template <bool scaled>
bool is_simple(const Gemm& g) {
  const int64_t piece = g.out == DType::bf16 || g.out == DType::f16 ? 16 : 32;
  if (g.c.column != 1 || g.n % 8 || g.c.row % 8 ||
      reinterpret_cast<uintptr_t>(g.c.data) % std::min<int64_t>(piece, 16))
    return false;
  for (int d = 0; d < g.batch_dims; d++)
    if (g.batch[d] > 1 && g.c.batch[d] % 8) return false;
  if (g.residual.data || g.activation != kNone) return false;
  if constexpr (scaled) {
    auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kPieceBytes == 0; };
    return g.bias_axis != BiasAxis::row && (!g.col_scale_step || aligned(g.col_scale)) &&
           (g.bias_axis == BiasAxis::none || (g.bias_stride == 1 && aligned(g.bias)));
  }
  return !g.row_scale && !g.col_scale && g.bias_axis == BiasAxis::none;
}

}  // namespace fastnn::cuda
