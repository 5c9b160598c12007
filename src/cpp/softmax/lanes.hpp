// Partial vectors, and maxima and sums of neighbours. Included after isa/vec.hpp's target was
// chosen.
#pragma once
#include "isa/math.hpp"

namespace fastnn::FASTNN_TARGET {

// The vector in which elements of type T are computed.
template <class T>
struct Lanes {
  using V = VecF32;
};
template <>
struct Lanes<double> {
  using V = VecF64;
};

template <class V, class T>
FASTNN_INLINE V load_lanes(const T* p, int n) {
  return n == V::width ? V::load(p) : V::load_partial(p, n);
}
template <class V, class T>
FASTNN_INLINE void store_lanes(V v, T* p, int n) {
  n == V::width ? v.store(p) : v.store_partial(p, n);
}

// A number of float64 as the sum of two of the type that is computed in, so that multiplying by it
// or taking it away rounds once only.
template <class V>
struct Twofold {
  V high, low;
  static FASTNN_INLINE Twofold of(double x) {
    using S = typename V::T;
    const S high = S(x);
    const double rest = x - double(high);
    return {V::set1(high), V::set1(rest == rest ? S(rest) : S(0))};
  }
  FASTNN_INLINE V times(V x) const { return fma(x, high, x * low); }
};

// The largest of n neighbours, at least -infinity; NaN does not count.
template <class V, class T>
FASTNN_INLINE typename V::T largest(const T* x, int64_t n) {
  using S = typename V::T;
  constexpr int64_t w = V::width;
  const V lowest = V::set1(-S(__builtin_inf()));
  V m[4] = {lowest, lowest, lowest, lowest};
  int64_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w)
    for (int k = 0; k < 4; k++) m[k] = max(V::load(x + i + k * w), m[k]);
  for (; i + w <= n; i += w) m[0] = max(V::load(x + i), m[0]);
  m[0] = max(max(m[0], m[1]), max(m[2], m[3]));
  S lanes[w];
  m[0].store(lanes);
  if (i < n) {
    S rest[w];
    V::load_partial(x + i, int(n - i)).store(rest);
    for (int64_t k = 0; k < n - i; k++)
      if (rest[k] > lanes[0]) lanes[0] = rest[k];
  }
  S most = lanes[0];
  for (int64_t k = 1; k < w; k++)
    if (lanes[k] > most) most = lanes[k];
  return most;
}

// The sum of f(i, n), vectors that start at element i, of which n lanes count and the others are 0:
// in blocks, which are summed in float64.
template <class V, class F>
FASTNN_INLINE double sum_in_blocks(int64_t n, F f) {
  constexpr int64_t w = V::width, block = 64 * w;
  double total = 0;
  for (int64_t b = 0; b < n; b += block) {
    const int64_t end = b + block < n ? b + block : n;
    V sum[2] = {V::zero(), V::zero()};
    int64_t i = b;
    for (; i + 2 * w <= end; i += 2 * w) {
      sum[0] = sum[0] + f(i, int(w));
      sum[1] = sum[1] + f(i + w, int(w));
    }
    if (i + w <= end) {
      sum[0] = sum[0] + f(i, int(w));
      i += w;
    }
    if (i < end) sum[1] = sum[1] + f(i, int(end - i));
    total += double(reduce_add(sum[0] + sum[1]));
  }
  return total;
}

// The first n lanes; the others are 0.
template <class V>
FASTNN_INLINE V first_lanes(V v, int n) {
  if (n == V::width) return v;
  typename V::T lanes[V::width];
  v.store(lanes);
  return V::load_partial(lanes, n);
}

}  // namespace fastnn::FASTNN_TARGET
