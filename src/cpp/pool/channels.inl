// Channels that lie together: vectors go across them.
#pragma once
#include "pool/lanes.inl"

namespace fastnn::FASTNN_TARGET {

// `vectors` of them, or `lanes` of one.
template <class T, int mode, int vectors>
static FASTNN_INLINE void window_of_channels(const PoolPlan& p, const T* x, T* out, char* codes,
                                             int64_t code_place, const int64_t* at, int lanes) {
  using V = typename Compute<T>::V;
  using C = typename V::T;
  const PoolWindows &wz = p.axis[0], &wy = p.axis[1], &wx = p.axis[2];
  const int64_t oz = at[0], oy = at[1], ox = at[2];
  const int64_t kz = wz.first[oz], ky = wy.first[oy], kx = wx.first[ox];
  const T* corner = x + (wz.begin[oz] + kz * wz.dilation) * p.x[2] +
                    (wy.begin[oy] + ky * wy.dilation) * p.x[3] +
                    (wx.begin[ox] + kx * wx.dilation) * p.x[4];
  const int64_t step_z = wz.dilation * p.x[2], step_y = wy.dilation * p.x[3],
                step_x = wx.dilation * p.x[4];
  V value[vectors], code[vectors];
  for (int u = 0; u < vectors; u++) {
    value[u] = mode == kSum ? V::zero() : V::set1(C(kLowest));
    code[u] = V::set1(C((kz * wy.kernel + ky) * wx.kernel + kx));
  }
  for (int64_t i = 0; i < wz.count[oz]; i++) {
    for (int64_t j = 0; j < wy.count[oy]; j++) {
      const T* from = corner + i * step_z + j * step_y;
      C number = C(((kz + i) * wy.kernel + ky + j) * wx.kernel + kx);
      V part[vectors];
      if constexpr (mode == kSum)
        for (int u = 0; u < vectors; u++) part[u] = V::zero();
      for (int64_t k = 0; k < wx.count[ox]; k++, from += step_x, number += 1) {
        for (int u = 0; u < vectors; u++) {
          const V v = load_lanes<V>(from + u * V::width, lanes);
          if constexpr (mode == kSum)
            part[u] = part[u] + v;
          else
            take<mode>(value[u], code[u], v, V::set1(number));
        }
      }
      if constexpr (mode == kSum)
        for (int u = 0; u < vectors; u++) value[u] = value[u] + part[u];
    }
  }
  const V by =
      V::set1(p.divisor != 0 ? C(p.divisor) : C(wz.divisor[oz] * wy.divisor[oy] * wx.divisor[ox]));
  for (int u = 0; u < vectors; u++) {
    if constexpr (mode == kSum) value[u] = value[u] / by;
    store_lanes(out + u * V::width, value[u], lanes);
    if constexpr (mode == kMaxCodes)
      put_codes(codes, p.wide_codes, code_place + u * V::width, code[u], lanes);
  }
}

template <class T, int mode>
static void forward_channels(const PoolPlan& p, char* x_, char* out_, char* codes, int64_t row,
                             int64_t channels) {
  constexpr int w = Compute<T>::V::width;
  const T* x = reinterpret_cast<const T*>(x_);
  T* out = reinterpret_cast<T*>(out_);
  int64_t at[3] = {row / p.axis[1].out, row % p.axis[1].out, 0};
  for (; at[2] < p.axis[2].out; at[2]++) {
    T* to = out + at[0] * p.out[2] + at[1] * p.out[3] + at[2] * p.out[4];
    const int64_t code = at[0] * p.code[2] + at[1] * p.code[3] + at[2] * p.code[4];
    int64_t c = 0;
    for (; c + 4 * w <= channels; c += 4 * w)
      window_of_channels<T, mode, 4>(p, x + c, to + c, codes, code + c, at, w);
    for (; c + w <= channels; c += w)
      window_of_channels<T, mode, 1>(p, x + c, to + c, codes, code + c, at, w);
    if (c < channels)
      window_of_channels<T, mode, 1>(p, x + c, to + c, codes, code + c, at, int(channels - c));
  }
}

template <class T, bool coded, int vectors>
static FASTNN_INLINE void element_of_channels(const PoolPlan& p, T* x, const T* out,
                                              const char* codes, int64_t c, const int64_t* at,
                                              int lanes) {
  using V = typename Compute<T>::V;
  using C = typename V::T;
  const PoolWindows &wz = p.axis[0], &wy = p.axis[1], &wx = p.axis[2];
  V sum[vectors];
  for (int u = 0; u < vectors; u++) sum[u] = V::zero();
  for (int64_t i = wz.back_begin[at[0]]; i < wz.back_begin[at[0] + 1]; i++) {
    const PoolTap tz = wz.back[i];
    for (int64_t j = wy.back_begin[at[1]]; j < wy.back_begin[at[1] + 1]; j++) {
      const PoolTap ty = wy.back[j];
      for (int64_t k = wx.back_begin[at[2]]; k < wx.back_begin[at[2] + 1]; k++) {
        const PoolTap tx = wx.back[k];
        const T* g = out + c + tz.o * p.out[2] + ty.o * p.out[3] + tx.o * p.out[4];
        if constexpr (coded) {
          const int64_t place = c + tz.o * p.code[2] + ty.o * p.code[3] + tx.o * p.code[4];
          const V number = V::set1(C((tz.k * wy.kernel + ty.k) * wx.kernel + tx.k));
          for (int u = 0; u < vectors; u++) {
            const auto hit =
                eq(get_codes<V>(codes, p.wide_codes, place + u * V::width, lanes), number);
            sum[u] = select(hit, sum[u] + load_lanes<V>(g + u * V::width, lanes), sum[u]);
          }
        } else {
          const V by =
              V::set1(p.divisor != 0 ? C(p.divisor)
                                     : C(wz.divisor[tz.o] * wy.divisor[ty.o] * wx.divisor[tx.o]));
          for (int u = 0; u < vectors; u++)
            sum[u] = sum[u] + load_lanes<V>(g + u * V::width, lanes) / by;
        }
      }
    }
  }
  for (int u = 0; u < vectors; u++) {
    T* to = x + c + u * V::width;
    if (p.around_caches && lanes == V::width && uintptr_t(to) % (sizeof(T) * V::width) == 0)
      stream(to, sum[u]);
    else
      store_lanes(to, sum[u], lanes);
  }
}

template <class T, bool coded>
static void backward_channels(const PoolPlan& p, char* x_, char* out_, char* codes, int64_t row,
                              int64_t channels) {
  constexpr int w = Compute<T>::V::width;
  T* x = reinterpret_cast<T*>(x_);
  const T* out = reinterpret_cast<const T*>(out_);
  int64_t at[3] = {row / p.axis[1].in, row % p.axis[1].in, 0};
  for (; at[2] < p.axis[2].in; at[2]++) {
    T* to = x + at[0] * p.x[2] + at[1] * p.x[3] + at[2] * p.x[4];
    int64_t c = 0;
    for (; c + 4 * w <= channels; c += 4 * w)
      element_of_channels<T, coded, 4>(p, to, out, codes, c, at, w);
    for (; c + w <= channels; c += w) element_of_channels<T, coded, 1>(p, to, out, codes, c, at, w);
    if (c < channels) element_of_channels<T, coded, 1>(p, to, out, codes, c, at, int(channels - c));
  }
}

}  // namespace fastnn::FASTNN_TARGET
