// Winograd's transformations and products over one instruction set's vectors; see winograd.cpp.
// Included by kernels.inl.
#pragma once
#include "isa/vec.hpp"

namespace fastnn::FASTNN_TARGET {

// One dimension of a tile: 2 results from `span` inputs d by filters g of `taps`, each `step` after
// the other, with `products` multiplications instead of 2 taps:
//   results(inputs(d) * filters(g)).
// The gradient by the filters for one y by the results is, with the transposes of the outer two,
//   gather(inputs(d) * spread(y)).
// Three taps, F(2, 3):
struct Three {
  static constexpr int taps = 3, step = 1, span = 4, products = 4;
  FASTNN_INLINE static void inputs(const VecF32* d, VecF32* t) {
    t[0] = d[0] - d[2];
    t[1] = d[1] + d[2];
    t[2] = d[2] - d[1];
    t[3] = d[1] - d[3];
  }
  FASTNN_INLINE static void filters(const VecF32* g, VecF32* t) {
    const VecF32 half = VecF32::set1(0.5f), ends = half * (g[0] + g[2]), middle = half * g[1];
    t[0] = g[0];
    t[1] = ends + middle;
    t[2] = ends - middle;
    t[3] = g[2];
  }
  FASTNN_INLINE static void results(const VecF32* m, VecF32* y) {
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = (m[1] - m[2]) - m[3];
  }
  FASTNN_INLINE static void spread(const VecF32* y, VecF32* m) {
    m[0] = y[0];
    m[1] = y[0] + y[1];
    m[2] = y[0] - y[1];
    m[3] = neg(y[1]);
  }
  FASTNN_INLINE static void gather(const VecF32* t, VecF32* g) {
    const VecF32 half = VecF32::set1(0.5f), ends = half * (t[1] + t[2]);
    g[0] = t[0] + ends;
    g[1] = half * (t[1] - t[2]);
    g[2] = ends + t[3];
  }
};
// Two taps, F(2, 2), which the others are put together from.
struct Two {
  static constexpr int products = 3;
  FASTNN_INLINE static void inputs(VecF32 d0, VecF32 d1, VecF32 d2, VecF32* t) {
    t[0] = d0 - d1;
    t[1] = d1;
    t[2] = d1 - d2;
  }
  FASTNN_INLINE static void filters(VecF32 g0, VecF32 g1, VecF32* t) {
    t[0] = g0;
    t[1] = g0 + g1;
    t[2] = g1;
  }
  FASTNN_INLINE static void results(const VecF32* m, VecF32* y) {
    y[0] = m[0] + m[1];
    y[1] = m[1] - m[2];
  }
  FASTNN_INLINE static void spread(const VecF32* y, VecF32* m) {
    m[0] = y[0];
    m[1] = y[0] + y[1];
    m[2] = neg(y[1]);
  }
  FASTNN_INLINE static void gather(const VecF32* t, VecF32& g0, VecF32& g1) {
    g0 = t[0] + t[1];
    g1 = t[1] + t[2];
  }
};
// Three taps at every second input: the outer two, and the middle one, which meets two inputs.
struct ThreeByTwo {
  static constexpr int taps = 3, step = 2, span = 5, products = Two::products + 2;
  FASTNN_INLINE static void inputs(const VecF32* d, VecF32* t) {
    Two::inputs(d[0], d[2], d[4], t);
    t[3] = d[1];
    t[4] = d[3];
  }
  FASTNN_INLINE static void filters(const VecF32* g, VecF32* t) {
    Two::filters(g[0], g[2], t);
    t[3] = t[4] = g[1];
  }
  FASTNN_INLINE static void results(const VecF32* m, VecF32* y) {
    Two::results(m, y);
    y[0] = y[0] + m[3];
    y[1] = y[1] + m[4];
  }
  FASTNN_INLINE static void spread(const VecF32* y, VecF32* m) {
    Two::spread(y, m);
    m[3] = y[0];
    m[4] = y[1];
  }
  FASTNN_INLINE static void gather(const VecF32* t, VecF32* g) {
    Two::gather(t, g[0], g[2]);
    g[1] = t[3] + t[4];
  }
};
// Five taps: the first three and the last two.
struct Five {
  static constexpr int taps = 5, step = 1, span = 6, products = Three::products + Two::products;
  FASTNN_INLINE static void inputs(const VecF32* d, VecF32* t) {
    Three::inputs(d, t);
    Two::inputs(d[3], d[4], d[5], t + Three::products);
  }
  FASTNN_INLINE static void filters(const VecF32* g, VecF32* t) {
    Three::filters(g, t);
    Two::filters(g[3], g[4], t + Three::products);
  }
  FASTNN_INLINE static void results(const VecF32* m, VecF32* y) {
    VecF32 last[2];
    Three::results(m, y);
    Two::results(m + Three::products, last);
    y[0] = y[0] + last[0];
    y[1] = y[1] + last[1];
  }
  FASTNN_INLINE static void spread(const VecF32* y, VecF32* m) {
    Three::spread(y, m);
    Two::spread(y, m + Three::products);
  }
  FASTNN_INLINE static void gather(const VecF32* t, VecF32* g) {
    Three::gather(t, g);
    Two::gather(t + Three::products, g[3], g[4]);
  }
};

// A panel of filters, side by side, and the tiles whose sums stay in registers together with the
// sums of those.
constexpr int kWinogradPanel = 2 * VecF32::width;
static_assert(kWinogradPanel <= kMostWinogradFilters);
constexpr int kWinogradRows = FASTNN_TARGET_ID == 2 ? 7 : 6;

using WinogradLine = void (*)(const VecF32*, VecF32*);

// B^T d B, or another transformation of both dimensions from S to P numbers, of a tile whose
// channels are side by side: pixel (r, q) at pixels[S * r + q]. Position k goes to
// to + k * position: kWinogradSum channels, the next ones `group` further, with zeros behind the
// last. The magnitudes of each pixel's channels are summed to sums[S * r + q].
template <int S, int P, WinogradLine line>
static void winograd_transform(const float* const* pixels, int64_t channels, float* to,
                               int64_t group, int64_t position, float* sums) {
  VecF32 sum[S * S];
#pragma GCC unroll 36
  for (int i = 0; i < S * S; i++) sum[i] = VecF32::zero();
  for (int64_t c = 0; c < (channels + kWinogradSum - 1) / kWinogradSum * kWinogradSum;
       c += VecF32::width) {
    const int n = int(smaller(VecF32::width, channels - c > 0 ? channels - c : 0));
    VecF32 columns[P][S];
#pragma GCC unroll 6
    for (int q = 0; q < S; q++) {
      VecF32 d[S], t[P];
#pragma GCC unroll 6
      for (int r = 0; r < S; r++) {
        d[r] = load_some<VecF32>(pixels[S * r + q] + c, n);
        sum[S * r + q] = sum[S * r + q] + abs(d[r]);
      }
      line(d, t);
#pragma GCC unroll 7
      for (int r = 0; r < P; r++) columns[r][q] = t[r];
    }
    float* at = to + c / kWinogradSum * group + c % kWinogradSum;
#pragma GCC unroll 7
    for (int r = 0; r < P; r++) {
      VecF32 t[P];
      line(columns[r], t);
#pragma GCC unroll 7
      for (int k = 0; k < P; k++, at += position) t[k].store(at);
    }
  }
  for (int i = 0; i < S * S; i++) sums[i] = reduce_add(sum[i]);
}

// v = G g G^T for neighbouring filters, whole vectors of them: tap t of filter l at g[t * ld + l].
template <class D>
static void winograd_filter(const float* g, int64_t ld, float* v, int64_t position, int filters) {
  constexpr int T = D::taps, P = D::products;
  for (int l = 0; l < filters; l += VecF32::width) {
    VecF32 columns[P][T];
#pragma GCC unroll 5
    for (int q = 0; q < T; q++) {
      VecF32 tap[T], t[P];
#pragma GCC unroll 5
      for (int r = 0; r < T; r++) tap[r] = VecF32::load(g + (r * T + q) * ld + l);
      D::filters(tap, t);
#pragma GCC unroll 7
      for (int r = 0; r < P; r++) columns[r][q] = t[r];
    }
    float* to = v + l;
#pragma GCC unroll 7
    for (int r = 0; r < P; r++) {
      VecF32 t[P];
      D::filters(columns[r], t);
#pragma GCC unroll 7
      for (int k = 0; k < P; k++, to += position) t[k].store(to);
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
template <class D>
static bool winograd_output(const float* m, int64_t position, int64_t tiles, float* y,
                            int64_t y_row) {
  constexpr int P = D::products;
  VecF32 check = VecF32::zero();
  for (int64_t i = 0; i < tiles; i++, m += kWinogradPanel, y += 2 * kWinogradPanel)
    for (int l = 0; l < kWinogradPanel; l += VecF32::width) {
      VecF32 rows[2][P];
#pragma GCC unroll 7
      for (int k = 0; k < P; k++) {
        VecF32 column[P], t[2];
#pragma GCC unroll 7
        for (int r = 0; r < P; r++) column[r] = VecF32::load(m + (P * r + k) * position + l);
        D::results(column, t);
        rows[0][k] = t[0];
        rows[1][k] = t[1];
      }
#pragma GCC unroll 2
      for (int r = 0; r < 2; r++) {
        VecF32 t[2];
        D::results(rows[r], t);
#pragma GCC unroll 2
        for (int q = 0; q < 2; q++) {
          check = fma(t[q], VecF32::zero(), check);
          t[q].store(y + r * y_row + q * kWinogradPanel + l);
        }
      }
    }
  return reduce_add(check) == 0;
}

// For one position, ROWS channels and a panel of filters: m = the sum over tiles of u z, or
// m += that. Channel i of tile t of u is at u[t * kWinogradSum + i], and so are the panel's two
// vectors of the results' gradients at z0 and z1. The sums are as short as winograd_tiles's.
template <int ROWS>
static void winograd_sums(const float* u, const float* z0, const float* z1, int64_t tiles, float* m,
                          bool add) {
  for (int64_t t0 = 0; t0 < tiles; t0 += kWinogradGroup) {
    const int64_t end = smaller(tiles, t0 + kWinogradGroup);
    VecF32 group[ROWS][2];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) group[i][0] = group[i][1] = VecF32::zero();
    for (int64_t t = t0; t < end;) {
      VecF32 sum[ROWS][2];
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; i++) sum[i][0] = sum[i][1] = VecF32::zero();
      for (const int64_t last = smaller(end, t + kWinogradSum); t < last; t++) {
        const VecF32 v0 = VecF32::load(z0 + t * kWinogradSum),
                     v1 = VecF32::load(z1 + t * kWinogradSum);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
          const VecF32 a = VecF32::set1(u[t * kWinogradSum + i]);
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
    for (int i = 0; i < ROWS; i++) {
      float* to = m + i * kWinogradPanel;
      if (add || t0) {
        group[i][0] = VecF32::load(to) + group[i][0];
        group[i][1] = VecF32::load(to + VecF32::width) + group[i][1];
      }
      group[i][0].store(to);
      group[i][1].store(to + VecF32::width);
    }
  }
}

// The same for kWinogradSum channels; the filters of z lie as its channels do, `z_group` apart.
static void winograd_weight_product(const float* u, const float* z, int64_t z_group, int64_t filter,
                                    int64_t tiles, float* m, bool add) {
  const auto vector = [&](int64_t f) { return z + f / kWinogradSum * z_group + f % kWinogradSum; };
  const float *z0 = vector(filter), *z1 = vector(filter + VecF32::width);
  static_assert(kWinogradSum == 16);
  winograd_sums<6>(u, z0, z1, tiles, m, add);
  winograd_sums<5>(u + 6, z0, z1, tiles, m + 6 * kWinogradPanel, add);
  winograd_sums<5>(u + 11, z0, z1, tiles, m + 11 * kWinogradPanel, add);
}

// g = G^T m G for a panel of filters: position k of m at m + k * position, tap t of g at
// g + t * kWinogradPanel. True where all are finite.
template <class D>
static bool winograd_gather(const float* m, int64_t position, float* g) {
  constexpr int T = D::taps, P = D::products;
  VecF32 check = VecF32::zero();
  for (int l = 0; l < kWinogradPanel; l += VecF32::width) {
    VecF32 rows[T][P];
#pragma GCC unroll 7
    for (int k = 0; k < P; k++) {
      VecF32 column[P], t[T];
#pragma GCC unroll 7
      for (int r = 0; r < P; r++) column[r] = VecF32::load(m + (P * r + k) * position + l);
      D::gather(column, t);
#pragma GCC unroll 5
      for (int r = 0; r < T; r++) rows[r][k] = t[r];
    }
#pragma GCC unroll 5
    for (int r = 0; r < T; r++) {
      VecF32 t[T];
      D::gather(rows[r], t);
#pragma GCC unroll 5
      for (int q = 0; q < T; q++) {
        check = fma(t[q], VecF32::zero(), check);
        t[q].store(g + (T * r + q) * kWinogradPanel + l);
      }
    }
  }
  return reduce_add(check) == 0;
}

template <class D>
constexpr WinogradKernels winograd_kernels = {D::taps,
                                              D::step,
                                              D::span,
                                              D::products,
                                              kWinogradPanel,
                                              winograd_transform<D::span, D::products, D::inputs>,
                                              winograd_filter<D>,
                                              winograd_product,
                                              winograd_output<D>,
                                              winograd_transform<2, D::products, D::spread>,
                                              winograd_weight_product,
                                              winograd_gather<D>};

}  // namespace fastnn::FASTNN_TARGET
