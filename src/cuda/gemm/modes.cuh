// How one step of a tile is multiplied, for each type of element. kGroup: after so many tiles of K
// the sums are added to others and begin anew; 0: never.
#pragma once
#include "cuda/gemm/tiles.cuh"

namespace fastnn::cuda {

// sums[i][j] += A's rows 16 i times B's columns 8 j, over one tile's 64 bytes of K.
template <class Multiply>
struct Fragments {
  // sums[j] += a 16 x 16 matrix, as mma.sync leaves its results in two times four registers, times
  // rows `first` to `first` + 15 of B, which lies in tiles of 64 bytes of its columns.
  template <class B, int columns>
  __device__ static __forceinline__ void step_of_results(float (&sums)[columns][4],
                                                         const float (&x)[4],
                                                         const float (&next)[4], const char* tiles,
                                                         int first) {
    const uint32_t left[4] = {Multiply::pack(x[0], x[1]), Multiply::pack(x[2], x[3]),
                              Multiply::pack(next[0], next[1]), Multiply::pack(next[2], next[3])};
#pragma unroll
    for (int j = 0; j < columns; j += 2) {
      uint32_t right[4];
      B::b_of_rows(right, tiles + j / 4 * B::kBytes, first, j % 4);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint32_t pair[2] = {right[2 * half], right[2 * half + 1]};
        Multiply::of(sums[j + half], left, pair);
      }
    }
  }

  template <class A, class B, int rows, int columns, class Sum>
  __device__ static __forceinline__ void step(Sum (&sums)[rows][columns][4], const char* a,
                                              const char* b, int first_row, int first_column) {
#pragma unroll
    for (int s = 0; s < kRowBytes / 32; s++) {
      uint32_t left[rows][4], right[columns / 2][4];
#pragma unroll
      for (int i = 0; i < rows; i++) A::a_fragment(left[i], a, first_row + 16 * i, s);
#pragma unroll
      for (int j = 0; j < columns / 2; j++) B::b_fragments(right[j], b, first_column + 16 * j, s);
#pragma unroll
      for (int i = 0; i < rows; i++)
#pragma unroll
        for (int j = 0; j < columns; j++) {
          const uint32_t pair[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
          Multiply::of(sums[i][j], left[i], pair);
        }
    }
  }
};

struct MultiplyBf16 {
  __device__ static __forceinline__ uint32_t pack(float low, float high) {
    return ptx::pack_bf16(low, high);
  }
  __device__ static __forceinline__ void of(float (&d)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
    ptx::mma_m16n8k16_bf16(d, a, b);
  }
};
struct MultiplyF16 {
  __device__ static __forceinline__ uint32_t pack(float low, float high) {
    return ptx::pack_f16(low, high);
  }
  __device__ static __forceinline__ void of(float (&d)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
    ptx::mma_m16n8k16_f16(d, a, b);
  }
};
struct MultiplyS8 {
  __device__ static __forceinline__ void of(int (&d)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
    ptx::mma_m16n8k32_s8(d, a, b);
  }
};
struct MultiplyU8 {
  __device__ static __forceinline__ void of(int (&d)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
    ptx::mma_m16n8k32_u8_s8(d, a, b);
  }
};

struct Bf16 : Fragments<MultiplyBf16> {
  static constexpr int kGroup = 0;
  using Element = __nv_bfloat16;
  using Sum = float;
};
struct F16 : Fragments<MultiplyF16> {
  static constexpr int kGroup = 0;
  using Element = __half;
  using Sum = float;
};
struct S8 : Fragments<MultiplyS8> {
  static constexpr int kGroup = 0;
  using Element = int8_t;
  using Sum = int;
};
struct U8 : Fragments<MultiplyU8> {
  static constexpr int kGroup = 0;  // times s8
  using Element = int8_t;           // as which bytes are copied
  using Sum = int;
};

// float32 as a sum of `parts` bfloat16, each what the ones before it leave, rounded; three hold all
// 24 bits. Of the products those are computed whose parts i, j have i + j < parts: the others are
// below float32's own error. Sums begin anew in every tile, because the tensor cores cut where
// float32 rounds, and after kGroup tiles: a long chain would drift.
template <int parts>
struct SplitF32 {
  using Element = float;
  using Sum = float;
  static constexpr int kGroup = parts == 3 ? 32 : 0;

  // out[p][0] holds x[0] and x[1], out[p][1] the others. `cut`: the first part is cut instead of
  // rounded, so that no finite number has an infinite one.
  template <bool cut = false>
  __device__ static __forceinline__ void split(uint32_t (&out)[parts][2], float (&x)[4]) {
#pragma unroll
    for (int p = 0; p < parts; p++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint32_t two = cut && p == 0 ? (__float_as_uint(x[2 * half]) >> 16) |
                                                 (__float_as_uint(x[2 * half + 1]) & 0xFFFF0000u)
                                           : ptx::pack_bf16(x[2 * half], x[2 * half + 1]);
        out[p][half] = two;
        x[2 * half] -= __uint_as_float(two << 16);
        x[2 * half + 1] -= __uint_as_float(two & 0xFFFF0000u);
      }
  }

  // Of the first parts the product is a sum of its own, which no other cuts; of the others the
  // smallest come first.
  __device__ static __forceinline__ void products(float (&first)[4], float (&others)[4],
                                                  const uint32_t (&upper)[parts][2],
                                                  const uint32_t (&lower)[parts][2],
                                                  const uint32_t (&right)[parts][2]) {
#pragma unroll
    for (int e = 0; e < 4; e++) first[e] = others[e] = 0;
#pragma unroll
    for (int order = parts - 1; order >= 0; order--)
#pragma unroll
      for (int p = order; p >= 0; p--) {
        const uint32_t left[4] = {upper[p][0], lower[p][0], upper[p][1], lower[p][1]};
        ptx::mma_m16n8k16_bf16(order ? others : first, left, right[order - p]);
      }
  }
  // sum += the product.
  __device__ static __forceinline__ void multiply(float (&sum)[4],
                                                  const uint32_t (&upper)[parts][2],
                                                  const uint32_t (&lower)[parts][2],
                                                  const uint32_t (&right)[parts][2]) {
    float first[4], others[4];
    products(first, others, upper, lower, right);
#pragma unroll
    for (int e = 0; e < 4; e++) sum[e] += first[e] + others[e];
  }

  template <class A, class B, int rows, int columns>
  __device__ static __forceinline__ void step(float (&sums)[rows][columns][4], const char* a,
                                              const char* b, int first_row, int first_column) {
    const int group = int(threadIdx.x) % 32 / 4;
    uint32_t right[columns][parts][2];
#pragma unroll
    for (int j = 0; j < columns; j++) {
      float x[4];
      B::four(x, b, first_column + 8 * j + group);
      split(right[j], x);
    }
#pragma unroll
    for (int i = 0; i < rows; i++) {
      uint32_t upper[parts][2], lower[parts][2];
      float x[4];
      A::four(x, a, first_row + 16 * i + group);
      split(upper, x);
      A::four(x, a, first_row + 16 * i + group + 8);
      split(lower, x);
#pragma unroll
      for (int j = 0; j < columns; j++) {
        multiply(sums[i][j], upper, lower, right[j]);
      }
    }
  }

  template <class B, int columns>
  __device__ static __forceinline__ void step_of_results(float (&sums)[columns][4],
                                                         const float (&x)[4],
                                                         const float (&next)[4], const char* tiles,
                                                         int first) {
    const int group = int(threadIdx.x) % 32 / 4;
    float above[4] = {x[0], x[1], next[0], next[1]}, below[4] = {x[2], x[3], next[2], next[3]};
    uint32_t upper[parts][2], lower[parts][2];
    split(upper, above), split(lower, below);
#pragma unroll
    for (int j = 0; j < columns; j++) {
      float column[4];
      uint32_t right[parts][2];
      B::four_of_rows(column, tiles + j / 2 * B::kBytes, first, j % 2 * 8 + group);
      split(right, column);
      multiply(sums[j], upper, lower, right);
    }
  }
};

}  // namespace fastnn::cuda
