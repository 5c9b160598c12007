// What the kernels of all normalizations have in common. See isa/vec.hpp for why nothing here may
// be shared between targets.
#pragma once
#include "isa/vec.hpp"

namespace fastnn::FASTNN_TARGET {

template <class T>
struct ComputeIn {
  using V = VecF32;
};
template <>
struct ComputeIn<double> {
  using V = VecF64;
};

static FASTNN_INLINE double to_f64(double x) { return x; }
template <class T>
static FASTNN_INLINE double to_f64(T x) {
  return double(to_f32(x));
}

// Element i of a row and the `lanes` - 1 after it; the other lanes are 0.
template <bool dense, class V, class T>
static FASTNN_INLINE V load_at(const T* p, int64_t stride, int64_t i, int lanes) {
  if constexpr (dense) {
    return lanes == V::width ? V::load(p + i) : V::load_partial(p + i, lanes);
  } else {
    T gathered[V::width] = {};
    for (int j = 0; j < lanes; j++) gathered[j] = p[(i + j) * stride];
    return V::load(gathered);
  }
}
// 1 in the first lanes, 0 in the others.
template <class V>
static FASTNN_INLINE V ones(int lanes) {
  typename V::T one[V::width];
  for (int j = 0; j < V::width; j++) one[j] = j < lanes;
  return V::load(one);
}

// f(which of four independent sums, element, lanes) for a row of n.
template <class V, class F>
static FASTNN_INLINE void for_each_vector(int64_t n, F f) {
  constexpr int w = V::width;
  int64_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w) {
    f(0, i, w);
    f(1, i + w, w);
    f(2, i + 2 * w, w);
    f(3, i + 3 * w, w);
  }
  if (i + 2 * w <= n) {
    f(0, i, w);
    f(1, i + w, w);
    i += 2 * w;
  }
  if (i + w <= n) {
    f(2, i, w);
    i += w;
  }
  if (i < n) f(3, i, int(n - i));
}

// A sum whose terms are vectors of V, in float64.
template <class V>
struct Wide;
template <>
struct Wide<VecF32> {
  VecF64 low, high;
  static FASTNN_INLINE Wide zero() { return {VecF64::zero(), VecF64::zero()}; }
  FASTNN_INLINE void add(VecF32 v) {
    low = low + widen_low(v);
    high = high + widen_high(v);
  }
  FASTNN_INLINE double total() const { return reduce_add(low + high); }
};
template <>
struct Wide<VecF64> {
  VecF64 all;
  static FASTNN_INLINE Wide zero() { return {VecF64::zero()}; }
  FASTNN_INLINE void add(VecF64 v) { all = all + v; }
  FASTNN_INLINE double total() const { return reduce_add(all); }
};

}  // namespace fastnn::FASTNN_TARGET
