// Floats of eight bits without tensor cores for them: each becomes a float16, exactly, on its way
// from shared memory to mma.sync.
#pragma once
#include "cuda/gemm/tiles.cuh"

namespace fastnn::cuda {

// e4m3 has the exponent bias 7 and is read as float16, whose is 15: it comes out as so many times
// less, which multiplies the sums in the end.
constexpr float kE4M3Factor = 256;

template <bool e4m3>
struct Float8Pairs {
  // Of four neighbours the first and the third, and the second and the fourth: in which order K
  // comes does not matter as long as A and B agree.
  __device__ static __forceinline__ void widen(uint32_t (&pairs)[2], uint32_t four) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t upper = i ? four : four << 8;
      if constexpr (!e4m3) {
        pairs[i] = upper & 0xFF00FF00u;  // a float16 without its lower byte
      } else {
        const uint32_t two = (upper & 0x80008000u) | ((upper & 0x7F007F00u) >> 1);
        // All ones are NaN, and nothing else is: the only number, 1.875 here, that 36000 times as
        // much is infinite; and infinity times 0 is NaN.
        const uint32_t large = ptx::fma_f16x2(two, 0x78657865u, 0);
        pairs[i] = ptx::fma_f16x2(large, 0, two);
      }
    }
  }
};

template <bool a_e4m3, bool b_e4m3>
struct Float8 {
  static constexpr int kGroup = 0;
  using Element = uint8_t;
  using Sum = float;

  template <class A, class B, int rows, int columns>
  __device__ static __forceinline__ void step(float (&sums)[rows][columns][4], const char* a,
                                              const char* b, int first_row, int first_column) {
#pragma unroll
    for (int s = 0; s < kRowBytes / 32; s++) {
      uint32_t left[rows][4], right[columns / 2][4];
#pragma unroll
      for (int i = 0; i < rows; i++) A::a_fragment(left[i], a, first_row + 16 * i, s);
#pragma unroll
      for (int j = 0; j < columns / 2; j++) B::b_fragments(right[j], b, first_column + 16 * j, s);
      // 16 bytes of K at a time.
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint32_t wide[columns][2];
#pragma unroll
        for (int j = 0; j < columns; j++)
          Float8Pairs<b_e4m3>::widen(wide[j], right[j / 2][j % 2 * 2 + half]);
#pragma unroll
        for (int i = 0; i < rows; i++) {
          uint32_t upper[2], lower[2];
          Float8Pairs<a_e4m3>::widen(upper, left[i][2 * half]);
          Float8Pairs<a_e4m3>::widen(lower, left[i][2 * half + 1]);
          const uint32_t fragment[4] = {upper[0], lower[0], upper[1], lower[1]};
#pragma unroll
          for (int j = 0; j < columns; j++) ptx::mma_m16n8k16_f16(sums[i][j], fragment, wide[j]);
        }
      }
    }
  }
};

}  // namespace fastnn::cuda
