// Channels that lie together: vectors go across them.
#pragma once
#include "pool/lanes.inl"

namespace fastnn::FASTNN_TARGET {

// `vectors` of them, or `lanes` of one. Without `careful` maxima are taken as if there was no NaN,
// in fewer instructions; false, and nothing is written, where there may be one after all: where the
// sum of all that was seen is NaN.
template <class T, int mode, int vectors, bool careful>
static FASTNN_INLINE bool window_of_channels(const PoolPlan& p, const T* x, T* out, char* codes,
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
  // part: the sum of a row, or of everything seen.
  V value[vectors], code[vectors], part[vectors];
  for (int u = 0; u < vectors; u++) {
    value[u] = mode == kSum ? V::zero() : V::set1(C(kLowest));
    code[u] = V::set1(C((kz * wy.kernel + ky) * wx.kernel + kx));
    part[u] = V::zero();
  }
  for (int64_t i = 0; i < wz.count[oz]; i++) {
    for (int64_t j = 0; j < wy.count[oy]; j++) {
      const T* from = corner + i * step_z + j * step_y;
      C number = C(((kz + i) * wy.kernel + ky + j) * wx.kernel + kx);
      for (int64_t k = 0; k < wx.count[ox]; k++, from += step_x, number += 1) {
        const V its_code = V::set1(number);
        for (int u = 0; u < vectors; u++) {
          const V v = load_lanes<V>(from + u * V::width, lanes);
          if constexpr (mode == kSum) {
            part[u] = part[u] + v;
          } else if constexpr (careful) {
            take<mode>(value[u], code[u], v, its_code);
          } else {
            if constexpr (mode == kMaxCodes) code[u] = select(lt(value[u], v), its_code, code[u]);
            value[u] = max(v, value[u]);
            part[u] = part[u] + v;
          }
        }
      }
      if constexpr (mode == kSum) {
        for (int u = 0; u < vectors; u++) {
          value[u] = value[u] + part[u];
          part[u] = V::zero();
        }
      }
    }
  }
  if constexpr (mode != kSum && !careful) {
    for (int u = 1; u < vectors; u++) part[0] = part[0] + part[u];
    if (has_nan(part[0])) return false;
  }
  const V by =
      V::set1(p.divisor != 0 ? C(p.divisor) : C(wz.divisor[oz] * wy.divisor[oy] * wx.divisor[ox]));
  for (int u = 0; u < vectors; u++) {
    if constexpr (mode == kSum) value[u] = value[u] / by;
    store_lanes(out + u * V::width, value[u], lanes);
    if constexpr (mode == kMaxCodes)
      put_codes(codes, p.wide_codes, code_place + u * V::width, code[u], lanes);
  }
  return true;
}
template <class T, int mode, int vectors>
static __attribute__((noinline)) void window_with_nan(const PoolPlan& p, const T* x, T* out,
                                                      char* codes, int64_t code_place,
                                                      const int64_t* at, int lanes) {
  window_of_channels<T, mode, vectors, true>(p, x, out, codes, code_place, at, lanes);
}

// Asks for the rows that the next row of outputs reads below this one's, a window's width at a
// time: the hardware does not foresee runs as short as one element's channels, several rows at a
// time.
template <class T>
class NextRow {
 public:
  NextRow(const PoolPlan& p, const T* x, const int64_t* at, int64_t channels)
      : columns_(p.axis[2]), step_y_(p.x[3]), step_x_(p.x[4]), channels_(channels) {
    const PoolWindows &wz = p.axis[0], &wy = p.axis[1];
    if (!p.fetch || at[1] + 1 == wy.out) return;
    const int64_t below = wy.after(at[1]);
    rows_ = wy.after(at[1] + 1) - below;
    from_ = x + wz.from(at[0]) * p.x[2] + below * step_y_;
  }
  FASTNN_INLINE void fetch(int64_t o) {
    constexpr int64_t line = 64 / sizeof(T);
    if (rows_ <= 0) return;
    for (const int64_t end = columns_.after(o); column_ < end; column_++)
      for (int64_t y = 0; y < rows_; y++)
        for (int64_t c = 0; c < channels_; c += line)
          __builtin_prefetch(from_ + y * step_y_ + column_ * step_x_ + c, 0, 2);
  }

 private:
  const PoolWindows& columns_;
  const int64_t step_y_, step_x_, channels_;
  const T* from_ = nullptr;
  int64_t rows_ = 0, column_ = 0;
};

template <class T, int mode>
static void forward_channels(const PoolPlan& p, char* x_, char* out_, char* codes, int64_t row,
                             int64_t channels) {
  constexpr int w = Compute<T>::V::width;
  const T* x = reinterpret_cast<const T*>(x_);
  T* out = reinterpret_cast<T*>(out_);
  int64_t at[3] = {row / p.axis[1].out, row % p.axis[1].out, 0};
  NextRow<T> next(p, x, at, channels);
  for (; at[2] < p.axis[2].out; at[2]++) {
    T* to = out + at[0] * p.out[2] + at[1] * p.out[3] + at[2] * p.out[4];
    const int64_t code = at[0] * p.code[2] + at[1] * p.code[3] + at[2] * p.code[4];
    next.fetch(at[2]);
    int64_t c = 0;
    for (; c + 4 * w <= channels; c += 4 * w)
      if (!window_of_channels<T, mode, 4, false>(p, x + c, to + c, codes, code + c, at, w))
        window_with_nan<T, mode, 4>(p, x + c, to + c, codes, code + c, at, w);
    for (; c < channels; c += w) {
      const int lanes = int(channels - c < w ? channels - c : w);
      if (!window_of_channels<T, mode, 1, false>(p, x + c, to + c, codes, code + c, at, lanes))
        window_with_nan<T, mode, 1>(p, x + c, to + c, codes, code + c, at, lanes);
    }
  }
}

// A row of outputs that read one row of the input.
struct Reader {
  int64_t out, code;  // where it begins
  int64_t number;     // of its tap 0 along the width
  double divisor;
};

// All of one row, in their order; looked up once for all its elements as far as there is room.
class Readers {
 public:
  Readers(const PoolPlan& p, int64_t row) : p_(p), z_(row / p.axis[1].in), y_(row % p.axis[1].in) {
    const PoolWindows &wz = p.axis[0], &wy = p.axis[1];
    of_y_ = wy.back_begin[y_ + 1] - wy.back_begin[y_];
    count = (wz.back_begin[z_ + 1] - wz.back_begin[z_]) * of_y_;
    for (int64_t n = 0; n < count && n < kKept; n++) kept_[n] = find(n);
  }
  FASTNN_INLINE Reader operator[](int64_t n) const { return n < kKept ? kept_[n] : find(n); }
  int64_t count;

 private:
  static constexpr int64_t kKept = 16;
  FASTNN_INLINE Reader find(int64_t n) const {
    const PoolWindows &wz = p_.axis[0], &wy = p_.axis[1];
    const PoolTap tz = wz.back[wz.back_begin[z_] + n / of_y_];
    const PoolTap ty = wy.back[wy.back_begin[y_] + n % of_y_];
    return {tz.o * p_.out[2] + ty.o * p_.out[3], tz.o * p_.code[2] + ty.o * p_.code[3],
            (tz.k * wy.kernel + ty.k) * p_.axis[2].kernel, wz.divisor[tz.o] * wy.divisor[ty.o]};
  }

  const PoolPlan& p_;
  int64_t z_, y_, of_y_;
  Reader kept_[kKept];
};

template <class T, bool coded, int vectors>
static FASTNN_INLINE void element_of_channels(const PoolPlan& p, const Readers& readers, T* x,
                                              const T* out, const char* codes, int64_t c,
                                              int64_t at_x, int lanes) {
  using V = typename Compute<T>::V;
  using C = typename V::T;
  const PoolWindows& wx = p.axis[2];
  const int64_t count = readers.count, begin = wx.back_begin[at_x], end = wx.back_begin[at_x + 1];
  const int64_t step = p.out[4], code_step = p.code[4];
  V sum[vectors];
  for (int u = 0; u < vectors; u++) sum[u] = V::zero();
  for (int64_t n = 0; n < count; n++) {
    const Reader row = readers[n];
    for (int64_t k = begin; k < end; k++) {
      const PoolTap tx = wx.back[k];
      const T* g = out + c + row.out + tx.o * step;
      if constexpr (coded) {
        typename V::Mask hit[vectors];
        find_code<vectors, V>(codes, p.wide_codes, c + row.code + tx.o * code_step,
                              row.number + tx.k, lanes, hit);
        for (int u = 0; u < vectors; u++)
          sum[u] = select(hit[u], sum[u] + load_lanes<V>(g + u * V::width, lanes), sum[u]);
      } else {
        const V by = V::set1(p.divisor != 0 ? C(p.divisor) : C(row.divisor * wx.divisor[tx.o]));
        for (int u = 0; u < vectors; u++)
          sum[u] = sum[u] + load_lanes<V>(g + u * V::width, lanes) / by;
      }
    }
  }
  T* to = x + c;
  if (p.around_caches && lanes == V::width && uintptr_t(to) % (sizeof(T) * V::width) == 0)
    for (int u = 0; u < vectors; u++) stream(to + u * V::width, sum[u]);
  else
    for (int u = 0; u < vectors; u++) store_lanes(to + u * V::width, sum[u], lanes);
}

template <class T, bool coded>
static void backward_channels(const PoolPlan& p, char* x_, char* out_, char* codes, int64_t row,
                              int64_t channels) {
  constexpr int w = Compute<T>::V::width;
  const T* out = reinterpret_cast<const T*>(out_);
  T* to = reinterpret_cast<T*>(x_) + row / p.axis[1].in * p.x[2] + row % p.axis[1].in * p.x[3];
  const Readers readers(p, row);
  for (int64_t i = 0; i < p.axis[2].in; i++, to += p.x[4]) {
    int64_t c = 0;
    for (; c + 4 * w <= channels; c += 4 * w)
      element_of_channels<T, coded, 4>(p, readers, to, out, codes, c, i, w);
    for (; c + w <= channels; c += w)
      element_of_channels<T, coded, 1>(p, readers, to, out, codes, c, i, w);
    if (c < channels)
      element_of_channels<T, coded, 1>(p, readers, to, out, codes, c, i, int(channels - c));
  }
}

}  // namespace fastnn::FASTNN_TARGET
