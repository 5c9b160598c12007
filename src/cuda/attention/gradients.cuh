// The weights of the backward's sums.
#pragma once
#include "cuda/attention/scores.cuh"

namespace fastnn::cuda {

// Log sum and delta of each query: of a thread's two rows in registers, or, `by_keys`, of all
// `columns` of a block in shared memory.
template <bool by_keys, int columns>
struct QuerySums {
  static constexpr int kBytes = by_keys ? 2 * columns * int(sizeof(float)) : 0;
  const float* shared;
  float log_sums[2] = {}, deltas[2] = {};

  __device__ __forceinline__ QuerySums(const AttentionBackward& a, const float* delta,
                                       const float* shared, const Head& head, int64_t row)
      : shared(shared) {
    if constexpr (!by_keys) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int64_t i = row + row_of(2 * half);
        if (i >= a.q_length) continue;
        const int64_t at = (head.batch * a.heads + head.head) * a.q_length + i;
        log_sums[half] = static_cast<const float*>(a.log_sum)[at], deltas[half] = delta[at];
      }
    }
  }
  // Begins to copy those of a block of queries.
  __device__ static __forceinline__ void copy(float* to, const AttentionBackward& a,
                                              const float* delta, int64_t batch, int64_t head,
                                              int64_t column) {
    if (!by_keys || threadIdx.x >= columns) return;
    const int64_t i = column + threadIdx.x;
    const int64_t at = (batch * a.heads + head) * a.q_length + at_most(i, a.q_length - 1);
    const int bytes = i < a.q_length ? 4 : 0;
    ptx::cp_async<4>(to + threadIdx.x, static_cast<const float*>(a.log_sum) + at, bytes);
    ptx::cp_async<4>(to + columns + threadIdx.x, delta + at, bytes);
  }
  __device__ __forceinline__ float log_sum(int e, int column) const {
    return by_keys ? shared[column + column_of(e)] : log_sums[e / 2];
  }
  __device__ __forceinline__ float delta(int e, int column) const {
    return by_keys ? shared[columns + column + column_of(e)] : deltas[e / 2];
  }
};

// From the products x yᵀ and x' y'ᵀ of a warp's 16 rows, from first + warp_row on, and the columns
// of a block from `from` on to the weights of the sums: P (less what is dropped) and dS.
template <class Element, bool by_keys, int columns, int blocks>
__device__ __forceinline__ void weigh(float (&p)[1][blocks][4], float (&ds)[1][blocks][4],
                                      const Scores<by_keys>& scores, const AttentionBackward& a,
                                      const Head& head, const QuerySums<by_keys, columns>& sums,
                                      int64_t first, int warp_row, int64_t block, int from) {
  const int64_t row = first + warp_row, column = block + from;
  auto weights = [&](float& product, float& other, float score, int e, int at, float keeps) {
    const float probability = exp_of_difference<Element>(score, sums.log_sum(e, from + at));
    other = probability * (other * keeps - sums.delta(e, from + at));
    product = probability * keeps;
  };
  if (scores.biased() || scores.threshold || a.grad_scores.data) {
    const Limits seen = scores.limits(row, column, 8 * blocks);
    each_block(p, ds, [&](float (&of_p)[4], float (&of_ds)[4], int at) {
      float keeps[4] = {1, 1, 1, 1};
      if (scores.threshold) scores.keep(keeps, row, column + at);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int64_t x = row + row_of(e), y = column + at + column_of(e);
        if (!seen.sees(e, at)) {
          of_p[e] = of_ds[e] = 0;
          continue;
        }
        weights(of_p[e], of_ds[e], scores.of(of_p[e], x, y), e, at, keeps[e]);
        if (!by_keys && a.grad_scores.data)
          reinterpret_cast<float*>(
              a.grad_scores.data)[offset(a.grad_scores, head.batch, head.head) +
                                  x * a.grad_scores.strides[2] + y * a.grad_scores.strides[3]] =
              of_ds[e];
      }
    });
    return;
  }
#pragma unroll
  for (int j = 0; j < blocks; j++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      weights(p[0][j][e], ds[0][j][e], p[0][j][e] * scores.scale, e, 8 * j, 1);
  if (scores.whole(first, column, 8 * blocks)) return;
  const Limits seen = scores.limits(row, column, 8 * blocks);
#pragma unroll
  for (int j = 0; j < blocks; j++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (!seen.sees(e, 8 * j)) p[0][j][e] = ds[0][j][e] = 0;
}

}  // namespace fastnn::cuda
