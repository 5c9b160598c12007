// Depthwise convolution over one instruction set's vectors: one filter a channel, no sum over
// channels. Included by kernels.inl.
#pragma once
#include "conv/kernels.hpp"
#include "isa/vec.hpp"

namespace fastnn::FASTNN_TARGET {

// The vector and the number in which elements of type T are computed.
template <class T>
struct In {
  using V = VecF32;
  using Acc = float;
};
template <>
struct In<double> {
  using V = VecF64;
  using Acc = double;
};

template <class V, class T>
FASTNN_INLINE V load_some(const T* p, int n) {
  return n == V::width ? V::load(p) : V::load_partial(p, n);
}
template <class T, class V>
FASTNN_INLINE void store_some(T* p, V v, int n) {
  n == V::width ? v.store(p) : v.store_partial(p, n);
}
// A load that is used more than once: without this the compiler repeats it at each use.
template <class V>
FASTNN_INLINE V once(V v) {
#if FASTNN_TARGET_ID >= 1
  asm("" : "+v"(v.r));
#endif
  return v;
}
FASTNN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// U vectors at once, so that their sums do not wait for each other; TAPS of 0 is any number.
template <class T, int TAPS, int U>
FASTNN_INLINE void row_block(const T* x, const int64_t* offset, const typename In<T>::Acc* w,
                             int taps, typename In<T>::Acc start, T* out, int64_t i, int last) {
  using V = typename In<T>::V;
  V sum[U];
#pragma GCC unroll 4
  for (int u = 0; u < U; u++) sum[u] = V::set1(start);
  const int count = TAPS ? TAPS : taps;
#pragma GCC unroll 9
  for (int t = 0; t < count; t++) {
    const V wt = V::set1(w[t]);
    const T* p = x + offset[t] + i;
#pragma GCC unroll 4
    for (int u = 0; u < U; u++)
      sum[u] = fma(wt, u + 1 < U ? V::load(p + u * V::width) : load_some<V>(p + u * V::width, last),
                   sum[u]);
  }
#pragma GCC unroll 4
  for (int u = 0; u < U; u++)
    u + 1 < U ? sum[u].store(out + i + u * V::width)
              : store_some(out + i + u * V::width, sum[u], last);
}

template <class T, int TAPS>
static void row_of(const T* x, const int64_t* offset, const typename In<T>::Acc* w, int taps,
                   typename In<T>::Acc start, T* out, int64_t n) {
  constexpr int W = In<T>::V::width;
  int64_t i = 0;
  for (; n - i > 3 * W; i += 4 * W)
    row_block<T, TAPS, 4>(x, offset, w, taps, start, out, i, int(smaller(W, n - i - 3 * W)));
  if (n - i > 2 * W)
    row_block<T, TAPS, 3>(x, offset, w, taps, start, out, i, int(smaller(W, n - i - 2 * W)));
  else if (n - i > W)
    row_block<T, TAPS, 2>(x, offset, w, taps, start, out, i, int(smaller(W, n - i - W)));
  else if (n > i)
    row_block<T, TAPS, 1>(x, offset, w, taps, start, out, i, int(n - i));
}

// R rows of a 3 x 3 filter at once: what is loaded of a row of x serves up to three of them.
template <class T, int R>
FASTNN_INLINE void three_by_three(const T* x, int64_t x_row, const typename In<T>::Acc* w,
                                  typename In<T>::Acc start, T* out, int64_t out_row, int64_t n) {
  using V = typename In<T>::V;
  V wv[9];
#pragma GCC unroll 9
  for (int t = 0; t < 9; t++) wv[t] = V::set1(w[t]);
  for (int64_t i = 0; i < n; i += V::width) {
    const int lanes = int(smaller(V::width, n - i));
    V sum[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) sum[r] = V::set1(start);
#pragma GCC unroll 6
    for (int in = 0; in < R + 2; in++) {
      const T* p = x + in * x_row + i;
#pragma GCC unroll 3
      for (int k = 0; k < 3; k++) {
        const V v = once(load_some<V>(p + k, lanes));
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
          if (in - r >= 0 && in - r < 3) sum[r] = fma(wv[(in - r) * 3 + k], v, sum[r]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) store_some(out + r * out_row + i, sum[r], lanes);
  }
}

// The filter by rows and columns if the offsets are those of 3 x 3 neighbours.
template <class Acc>
FASTNN_INLINE bool is_three_by_three(const int64_t* offset, const Acc* w, int taps, int64_t x_row,
                                     int64_t& base, Acc* ordered) {
  if (taps != 9 || x_row < 3) return false;
  base = offset[0] < offset[8] ? offset[0] : offset[8];
  for (int t = 0; t < 9; t++) {
    const int64_t d = offset[t] - base, i = d / x_row, j = d % x_row;
    if (d < 0 || i > 2 || j > 2) return false;
    ordered[i * 3 + j] = w[t];
  }
  return true;
}

template <class T>
static void depthwise_rows(const void* x_, int64_t x_row, const int64_t* offset, const void* w_,
                           int taps, double start_, void* out_, int64_t out_row, int64_t rows,
                           int64_t n) {
  using Acc = typename In<T>::Acc;
  const auto* w = static_cast<const Acc*>(w_);
  const T* x = static_cast<const T*>(x_);
  T* out = static_cast<T*>(out_);
  const Acc start = Acc(start_);
  int64_t base, r = 0;
  Acc ordered[9];
  if (is_three_by_three(offset, w, taps, x_row, base, ordered)) {
    const T* from = x + base;
    for (; r + 4 <= rows; r += 4)
      three_by_three<T, 4>(from + r * x_row, x_row, ordered, start, out + r * out_row, out_row, n);
    for (; r + 2 <= rows; r += 2)
      three_by_three<T, 2>(from + r * x_row, x_row, ordered, start, out + r * out_row, out_row, n);
    for (; r < rows; r++)
      three_by_three<T, 1>(from + r * x_row, x_row, ordered, start, out + r * out_row, out_row, n);
    return;
  }
  for (; r < rows; r++) {
    if (taps == 9)
      row_of<T, 9>(x + r * x_row, offset, w, taps, start, out + r * out_row, n);
    else
      row_of<T, 0>(x + r * x_row, offset, w, taps, start, out + r * out_row, n);
  }
}

// Channels side by side: P positions of U vectors of channels, so that a filter is loaded for
// several positions.
template <class T, int P, int U>
FASTNN_INLINE void position_block(const T* x, int64_t x_step, const int64_t* offset, const T* w,
                                  int64_t w_row, const int* tap, int taps, const T* start, T* out,
                                  int64_t out_step, int last) {
  using V = typename In<T>::V;
  V sum[P][U];
#pragma GCC unroll 4
  for (int u = 0; u < U; u++) {
    const int n = u + 1 < U ? V::width : last;
    const V v = start ? load_some<V>(start + u * V::width, n) : V::zero();
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) sum[p][u] = v;
  }
  for (int t = 0; t < taps; t++) {
    const T *xp = x + offset[t], *wp = w + tap[t] * w_row;
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) {
      const int n = u + 1 < U ? V::width : last;
      const V wv = once(load_some<V>(wp + u * V::width, n));
#pragma GCC unroll 4
      for (int p = 0; p < P; p++)
        sum[p][u] = fma(wv, load_some<V>(xp + p * x_step + u * V::width, n), sum[p][u]);
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < P; p++)
#pragma GCC unroll 4
    for (int u = 0; u < U; u++)
      store_some(out + p * out_step + u * V::width, sum[p][u], u + 1 < U ? V::width : last);
}

template <class T, int P>
FASTNN_INLINE void positions_of(const T* x, int64_t x_step, const int64_t* offset, const T* w,
                                int64_t w_row, const int* tap, int taps, const T* start, T* out,
                                int64_t out_step, int64_t channels) {
  constexpr int W = In<T>::V::width;
  int64_t c = 0;
  for (; channels - c > W; c += 2 * W)
    position_block<T, P, 2>(x + c, x_step, offset, w + c, w_row, tap, taps,
                            start ? start + c : nullptr, out + c, out_step,
                            int(smaller(W, channels - c - W)));
  if (c < channels)
    position_block<T, P, 1>(x + c, x_step, offset, w + c, w_row, tap, taps,
                            start ? start + c : nullptr, out + c, out_step, int(channels - c));
}

template <class T>
static void depthwise_positions(const void* x_, int64_t x_step, const int64_t* offset,
                                const void* w_, int64_t w_row, const int* tap, int taps,
                                const void* start_, void* out_, int64_t out_step, int64_t positions,
                                int64_t channels) {
  const T *x = static_cast<const T*>(x_), *w = static_cast<const T*>(w_),
          *start = static_cast<const T*>(start_);
  T* out = static_cast<T*>(out_);
  int64_t p = 0;
  for (; p + 4 <= positions; p += 4)
    positions_of<T, 4>(x + p * x_step, x_step, offset, w, w_row, tap, taps, start,
                       out + p * out_step, out_step, channels);
  for (; p < positions; p++)
    positions_of<T, 1>(x + p * x_step, x_step, offset, w, w_row, tap, taps, start,
                       out + p * out_step, out_step, channels);
}

}  // namespace fastnn::FASTNN_TARGET
