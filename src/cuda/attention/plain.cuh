// float32 without parts. Those of an infinity multiply to NaN, and those of large numbers may leave
// float32's range where their sum does not; so what meets an element that is larger than
// kMostInParts is multiplied one by one, in few instructions, not fast.
#pragma once
#include "cuda/attention/scores.cuh"

namespace fastnn::cuda {

// Of two numbers up to here not even the sum of 2^7 products is infinite.
constexpr float kMostInParts = 0x1p60f;

// Whether any of what this thread copied to a tile is larger: itself it sees that before others do.
template <class Tile>
__device__ __forceinline__ bool any_large(const char* tile) {
  bool large = false;
  if constexpr (sizeof(typename Tile::Type) == 4) {
#pragma unroll
    for (int i = 0; i < Tile::kEachThreads; i++) {
      const float4 v = *reinterpret_cast<const float4*>(Tile::own_piece(tile, i));
      large |= !(fabsf(v.x) <= kMostInParts && fabsf(v.y) <= kMostInParts &&
                 fabsf(v.z) <= kMostInParts && fabsf(v.w) <= kMostInParts);
    }
  }
  return large;
}

template <class Tile, int chunks>
__device__ __forceinline__ bool any_large_row(const char* tiles) {
  bool large = false;
#pragma unroll
  for (int c = 0; c < chunks; c++) large |= any_large<Tile>(tiles + c * Tile::kBytes);
  return large;
}

// Everyone waits for everyone; whether any says so, where that matters.
template <class Element>
__device__ __forceinline__ bool sync_or(bool any) {
  if constexpr (sizeof(Element) == 4) return __syncthreads_or(any);
  __syncthreads();
  return false;
}

// As Mode::step, in one row of fragments.
template <class A, class B, int columns>
__device__ __forceinline__ void plain_step(float (&sums)[1][columns][4], const char* a,
                                           const char* b, int first_row, int first_column) {
  each_block(sums, [&](float (&four)[4], int column) {
#pragma unroll 1
    for (int k = 0; k < A::kDepth; k++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        four[e] = fmaf(A::element(a, first_row + row_of(e), k),
                       B::element(b, first_column + column + column_of(e), k), four[e]);
  });
}

// As Mode::step_of_results.
template <class B, int columns>
__device__ __forceinline__ void plain_step_of_results(float (&sums)[1][columns][4],
                                                      const float (&x)[4], const float (&next)[4],
                                                      const char* tiles, int first) {
  each_block(sums, [&](float (&four)[4], int column) {
#pragma unroll 1
    for (int k = 0; k < 16; k++) {
      const int lane = int(threadIdx.x) % 32 / 4 * 4 + k % 8 / 2;
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const float even = k < 8 ? x[e] : next[e], odd = k < 8 ? x[e + 1] : next[e + 1];
        const float left = __shfl_sync(0xffffffffu, k % 2 ? odd : even, lane);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int at = column + column_of(i);
          four[e + i] =
              fmaf(left, B::element(tiles + at / B::kDepth * B::kBytes, first + k, at % B::kDepth),
                   four[e + i]);
        }
      }
    }
  });
}

// Either, as `plain` says, which whole blocks of threads agree on.
template <class Mode, class A, class B, int columns>
__device__ __forceinline__ void step(bool plain, float (&sums)[1][columns][4], const char* a,
                                     const char* b, int first_row, int first_column) {
  if constexpr (sizeof(typename Mode::Element) == 4)
    if (plain) return plain_step<A, B>(sums, a, b, first_row, first_column);
  Mode::template step<A, B>(sums, a, b, first_row, first_column);
}
template <class Mode, class B, int columns>
__device__ __forceinline__ void step_of_results(bool plain, float (&sums)[1][columns][4],
                                                const float (&x)[4], const float (&next)[4],
                                                const char* tiles, int first) {
  if constexpr (sizeof(typename Mode::Element) == 4)
    if (plain) return plain_step_of_results<B>(sums, x, next, tiles, first);
  Mode::template step_of_results<B>(sums[0], x, next, tiles, first);
}

}  // namespace fastnn::cuda
