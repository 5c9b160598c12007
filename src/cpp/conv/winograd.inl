// The transformations of F(2 x 2, 3 x 3) over one instruction set's vectors; see winograd.cpp.
// Included by kernels.inl.
#pragma once
#include "isa/vec.hpp"

namespace fastnn::FASTNN_TARGET {

// u = B^T d B for neighbouring tiles of some channels. Row r of channel c of d has its even columns
// from even + c * channel + r * row on and its odd ones from `odd` likewise; tile i starts at
// column 2 i. Up to a vector beyond the last column is read. The magnitudes of the columns, one
// more than tiles, are added to `sums`: (row, even or odd, column).
static void winograd_input(const float* even, const float* odd, int64_t row, int64_t channel,
                           int64_t channels, float* u, int64_t u_channel, int64_t position,
                           int64_t tiles, float* sums, int64_t sums_row) {
  for (int64_t i = 0; i <= tiles; i += VecF32::width) {
    const int n = int(smaller(VecF32::width, tiles - i)),
              columns = int(smaller(VecF32::width, tiles + 1 - i));
    VecF32 even_sum[4], odd_sum[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) even_sum[r] = odd_sum[r] = VecF32::zero();
    for (int64_t c = 0; c < channels; c++) {
      VecF32 t[4][4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) {
        const float *e = even + c * channel + r * row + i, *o = odd + c * channel + r * row + i;
        const VecF32 d0 = VecF32::load(e), d1 = VecF32::load(o), d2 = VecF32::load(e + 1),
                     d3 = VecF32::load(o + 1);
        t[r][0] = d0 - d2;
        t[r][1] = d1 + d2;
        t[r][2] = d2 - d1;
        t[r][3] = d1 - d3;
        even_sum[r] = even_sum[r] + abs(d0);
        odd_sum[r] = odd_sum[r] + abs(d1);
      }
      float* to = u + c * u_channel + i;
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) {
        store_some(to + k * position, t[0][k] - t[2][k], n);
        store_some(to + (4 + k) * position, t[1][k] + t[2][k], n);
        store_some(to + (8 + k) * position, t[2][k] - t[1][k], n);
        store_some(to + (12 + k) * position, t[1][k] - t[3][k], n);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
      float *se = sums + 2 * r * sums_row + i, *so = se + sums_row;
      store_some(se, load_some<VecF32>(se, columns) + even_sum[r], columns);
      store_some(so, load_some<VecF32>(so, columns) + odd_sum[r], columns);
    }
  }
}

// v = G g G^T for neighbouring filters: tap t of filter l at g[t * ld + l].
static void winograd_filter(const float* g, int64_t ld, float* v, int64_t position, int filters) {
  const VecF32 half = VecF32::set1(0.5f);
  for (int l = 0; l < filters; l += VecF32::width) {
    const int n = int(smaller(VecF32::width, filters - l));
    VecF32 t[4][3];
#pragma GCC unroll 3
    for (int k = 0; k < 3; k++) {
      const VecF32 g0 = load_some<VecF32>(g + k * ld + l, n),
                   g1 = load_some<VecF32>(g + (3 + k) * ld + l, n),
                   g2 = load_some<VecF32>(g + (6 + k) * ld + l, n);
      const VecF32 ends = half * (g0 + g2), middle = half * g1;
      t[0][k] = g0;
      t[1][k] = ends + middle;
      t[2][k] = ends - middle;
      t[3][k] = g2;
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
      const VecF32 ends = half * (t[r][0] + t[r][2]), middle = half * t[r][1];
      float* to = v + 4 * r * position + l;
      store_some(to, t[r][0], n);
      store_some(to + position, ends + middle, n);
      store_some(to + 2 * position, ends - middle, n);
      store_some(to + 3 * position, t[r][2], n);
    }
  }
}

#if FASTNN_TARGET_ID == 2
FASTNN_INLINE void store_interleaved(float* p, VecF32 even, VecF32 odd) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high =
      _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  _mm512_storeu_ps(p, _mm512_permutex2var_ps(even.r, low, odd.r));
  _mm512_storeu_ps(p + 16, _mm512_permutex2var_ps(even.r, high, odd.r));
}
#else
FASTNN_INLINE void store_interleaved(float* p, VecF32 even, VecF32 odd) {
  float e[VecF32::width], o[VecF32::width];
  even.store(e);
  odd.store(o);
  for (int i = 0; i < VecF32::width; i++) p[2 * i] = e[i], p[2 * i + 1] = o[i];
}
#endif

// y = A^T m A for `rows` channels of neighbouring tiles: m of channel c and position k at
// m + k * position + c * row. Row r of the results of channel c goes to y + (c * 2 + r) * y_row,
// the tiles' columns one after the other. `tiles` is a multiple of the vector. True where all
// results are finite.
static bool winograd_output(const float* m, int64_t position, int64_t row, float* y, int64_t y_row,
                            int rows, int64_t tiles) {
  VecF32 check = VecF32::zero();
  for (int c = 0; c < rows; c++, m += row, y += 2 * y_row)
    for (int64_t i = 0; i < tiles; i += VecF32::width) {
      VecF32 t[2][4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) {
        const VecF32 m0 = VecF32::load(m + k * position + i),
                     m1 = VecF32::load(m + (4 + k) * position + i),
                     m2 = VecF32::load(m + (8 + k) * position + i),
                     m3 = VecF32::load(m + (12 + k) * position + i);
        const VecF32 plus = m1 + m2, minus = m1 - m2;
        t[0][k] = m0 + plus;
        t[1][k] = minus - m3;
      }
#pragma GCC unroll 2
      for (int r = 0; r < 2; r++) {
        const VecF32 even = t[r][0] + (t[r][1] + t[r][2]), odd = (t[r][1] - t[r][2]) - t[r][3];
        check = fma(even, VecF32::zero(), check);
        check = fma(odd, VecF32::zero(), check);
        store_interleaved(y + r * y_row + 2 * i, even, odd);
      }
    }
  return reduce_add(check) == 0;
}

}  // namespace fastnn::FASTNN_TARGET
