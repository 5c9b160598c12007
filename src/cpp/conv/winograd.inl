// The transformations of F(2 x 2, 3 x 3) over one instruction set's vectors; see winograd.cpp.
// Included by kernels.inl.
#pragma once
#include "isa/vec.hpp"

namespace fastnn::FASTNN_TARGET {

// A panel of filters, side by side, and the tiles whose sums stay in registers together with the
// sums of those.
constexpr int kWinogradPanel = 2 * VecF32::width;
constexpr int kWinogradRows = FASTNN_TARGET_ID == 2 ? 7 : 6;

// u = B^T d B for a tile whose inputs' channels are side by side: pixel (r, q) of d at
// pixels[4 * r + q]. Position k of u goes to u + k * position: kWinogradSum channels, the next ones
// `group` further, with zeros behind the last. The magnitudes of each pixel's channels are summed
// to sums[4 * r + q].
static void winograd_input(const float* const* pixels, int64_t channels, float* u, int64_t group,
                           int64_t position, float* sums) {
  VecF32 sum[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) sum[i] = VecF32::zero();
  for (int64_t c = 0; c < (channels + kWinogradSum - 1) / kWinogradSum * kWinogradSum;
       c += VecF32::width) {
    const int n = int(smaller(VecF32::width, channels - c > 0 ? channels - c : 0));
    VecF32 t[4][4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; q++) {
      VecF32 d[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) {
        d[r] = load_some<VecF32>(pixels[4 * r + q] + c, n);
        sum[4 * r + q] = sum[4 * r + q] + abs(d[r]);
      }
      t[0][q] = d[0] - d[2];
      t[1][q] = d[1] + d[2];
      t[2][q] = d[2] - d[1];
      t[3][q] = d[1] - d[3];
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
      float* to = u + 4 * r * position + c / kWinogradSum * group + c % kWinogradSum;
      (t[r][0] - t[r][2]).store(to);
      (t[r][1] + t[r][2]).store(to + position);
      (t[r][2] - t[r][1]).store(to + 2 * position);
      (t[r][1] - t[r][3]).store(to + 3 * position);
    }
  }
  for (int i = 0; i < 16; i++) sums[i] = reduce_add(sum[i]);
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

// m = u v for one position of ROWS neighbouring tiles and a panel of filters; `channels` is a
// multiple of kWinogradSum. Sums of kWinogradSum products, sums of kWinogradGroup channels of
// those, and sums of these: the first two are in registers.
template <int ROWS>
static void winograd_tiles(const float* u, int64_t u_group, const float* v, int64_t channels,
                           float* m) {
  for (int64_t c0 = 0; c0 < channels; c0 += kWinogradGroup) {
    const int64_t end = smaller(channels, c0 + kWinogradGroup);
    VecF32 group[ROWS][2];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) group[i][0] = group[i][1] = VecF32::zero();
    for (int64_t c = c0; c < end; c += kWinogradSum, u += u_group) {
      VecF32 sum[ROWS][2];
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; i++) sum[i][0] = sum[i][1] = VecF32::zero();
#pragma GCC unroll 4
      for (int k = 0; k < kWinogradSum; k++, v += kWinogradPanel) {
        const VecF32 v0 = VecF32::load(v), v1 = VecF32::load(v + VecF32::width);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
          const VecF32 a = VecF32::set1(u[i * kWinogradSum + k]);
          sum[i][0] = fma(a, v0, sum[i][0]);
          sum[i][1] = fma(a, v1, sum[i][1]);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; i++) {
        group[i][0] = group[i][0] + sum[i][0];
        group[i][1] = group[i][1] + sum[i][1];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
      float* to = m + i * kWinogradPanel;
      if (c0) {
        group[i][0] = VecF32::load(to) + group[i][0];
        group[i][1] = VecF32::load(to + VecF32::width) + group[i][1];
      }
      group[i][0].store(to);
      group[i][1].store(to + VecF32::width);
    }
  }
}

// The same for any number of tiles, in parts as even as can be.
static void winograd_product(const float* u, int64_t u_group, int64_t tiles, const float* v,
                             int64_t channels, float* m) {
  using Tiles = void (*)(const float*, int64_t, const float*, int64_t, float*);
  static constexpr Tiles of[] = {nullptr,           winograd_tiles<1>, winograd_tiles<2>,
                                 winograd_tiles<3>, winograd_tiles<4>, winograd_tiles<5>,
                                 winograd_tiles<6>,
#if FASTNN_TARGET_ID == 2
                                 winograd_tiles<7>
#endif
  };
  for (int64_t parts = (tiles + kWinogradRows - 1) / kWinogradRows; parts > 0; parts--) {
    const int64_t rows = (tiles + parts - 1) / parts;
    of[rows](u, u_group, v, channels, m);
    u += rows * kWinogradSum, m += rows * kWinogradPanel, tiles -= rows;
  }
}

// y = A^T m A for neighbouring tiles and a panel of filters: position k of m of tile i at
// m + k * position + i * kWinogradPanel; row r of the results, pixel by pixel, from y + r * y_row
// on. True where all results are finite.
static bool winograd_output(const float* m, int64_t position, int64_t tiles, float* y,
                            int64_t y_row) {
  VecF32 check = VecF32::zero();
  for (int64_t i = 0; i < tiles; i++, m += kWinogradPanel, y += 2 * kWinogradPanel)
    for (int l = 0; l < kWinogradPanel; l += VecF32::width) {
      VecF32 t[2][4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) {
        const VecF32 m0 = VecF32::load(m + k * position + l),
                     m1 = VecF32::load(m + (4 + k) * position + l),
                     m2 = VecF32::load(m + (8 + k) * position + l),
                     m3 = VecF32::load(m + (12 + k) * position + l);
        const VecF32 plus = m1 + m2, minus = m1 - m2;
        t[0][k] = m0 + plus;
        t[1][k] = minus - m3;
      }
#pragma GCC unroll 2
      for (int r = 0; r < 2; r++) {
        const VecF32 even = t[r][0] + (t[r][1] + t[r][2]), odd = (t[r][1] - t[r][2]) - t[r][3];
        check = fma(even, VecF32::zero(), check);
        check = fma(odd, VecF32::zero(), check);
        even.store(y + r * y_row + l);
        odd.store(y + r * y_row + kWinogradPanel + l);
      }
    }
  return reduce_add(check) == 0;
}

}  // namespace fastnn::FASTNN_TARGET
