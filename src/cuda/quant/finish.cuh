// From a tile's sums to the rows of a quantized linear layer: four neighbours a thread, written at
// once where all exist.
#pragma once
#include "cuda/gemm/epilogue.cuh"
#include "cuda/gemm/mainloop.cuh"

namespace fastnn::cuda {

// activation(x + bias) of `count` neighbours of a row of n contiguous numbers.
template <int each>
__device__ __forceinline__ void finish_row(DType type, void* out, int64_t n, int64_t row,
                                           int64_t column, const void* bias, DType bias_type,
                                           int activation, float (&x)[each], int count) {
  if (bias)
#pragma unroll
    for (int e = 0; e < each; e++)
      if (e < count) x[e] = __fadd_rn(x[e], read(bias_type, bias, column + e));
  activate_all(activation, x);
  const int64_t at = row * n + column;
  if constexpr (each > 1) {
    const int bytes = each * (type == DType::f32 ? 4 : 2);
    const auto address = reinterpret_cast<uintptr_t>(out) + uintptr_t(at * bytes / each);
    if (count == each && address % (bytes < 16 ? bytes : 16) == 0)
      return write_all(type, out, at, x);
  }
#pragma unroll
  for (int e = 0; e < each; e++)
    if (e < count) write(type, out, at + e, x[e]);
}

// f(row, column, sums, count) for each four neighbours of the block's tile that are among m rows
// and n columns, of which `count` exist.
template <class S, class Sum, class F>
__device__ __forceinline__ void for_fours(const Sum* staged, int64_t first_row,
                                          int64_t first_column, int64_t m, int64_t n, F f) {
  for (int i = int(threadIdx.x); i < S::kM * S::kN / 4; i += S::kThreads) {
    const int row = i / (S::kN / 4), column = i % (S::kN / 4) * 4;
    if (first_row + row >= m || first_column + column >= n) continue;
    Sum sums[4];
#pragma unroll
    for (int e = 0; e < 4; e++) sums[e] = staged[staged_at<S>(row, column) + e];
    const int64_t left = n - first_column - column;
    f(first_row + row, first_column + column, sums, left < 4 ? int(left) : 4);
  }
}

}  // namespace fastnn::cuda
