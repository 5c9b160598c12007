// Rows: split into phases and joined again, copied where they do not lie together, and reduced
// along the width.
#pragma once
#include "pool/lanes.inl"

namespace fastnn::FASTNN_TARGET {

// Working memory, handed out piece by piece.
struct Work {
  char* at;
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(at);
    at += (n * int64_t(sizeof(T)) + 63) / 64 * 64;
    return p;
  }
};

template <class C>
static FASTNN_INLINE void fill(C* p, int64_t n, C value) {
  for (int64_t i = 0; i < n; i++) p[i] = value;
}

// Element i of a row goes to phase (i + padding) % stride, place (i + padding) / stride.
static FASTNN_INLINE int64_t phase_start(int64_t first, const PoolWindows& w, int64_t length) {
  const int64_t t = first + w.padding;
  return t % w.stride * length + t / w.stride;
}

template <class T, class C>
static void split_row(const T* x, int64_t xs, const PoolWindows& w, int64_t length, C* phases) {
  using V = typename Compute<T>::V;
  const int64_t n = w.in;
  int64_t i = 0;
  if (xs == 1 && w.stride == 1) {
    C* to = phases + w.padding;
    for (; i + V::width <= n; i += V::width) V::load(x + i).store(to + i);
    if (i < n) V::load_partial(x + i, int(n - i)).store_partial(to + i, int(n - i));
    return;
  }
  if (xs == 1 && w.stride == 2) {
    C* to_even = phases + phase_start(0, w, length);
    C* to_odd = phases + phase_start(1, w, length);
    for (; i + 2 * V::width <= n; i += 2 * V::width) {
      V even, odd;
      even_odd(V::load(x + i), V::load(x + i + V::width), even, odd);
      even.store(to_even + i / 2);
      odd.store(to_odd + i / 2);
    }
    if (i < n) {
      const int rest = int(n - i), a = rest < V::width ? rest : V::width, b = rest - a;
      V even, odd;
      even_odd(V::load_partial(x + i, a), b ? V::load_partial(x + i + V::width, b) : V::zero(),
               even, odd);
      even.store_partial(to_even + i / 2, (rest + 1) / 2);
      odd.store_partial(to_odd + i / 2, rest / 2);
    }
    return;
  }
  for (int64_t m = 0; m < w.stride && m < n; m++) {
    C* to = phases + phase_start(m, w, length);
    for (int64_t j = 0; m + j * w.stride < n; j++) to[j] = wide(x[(m + j * w.stride) * xs]);
  }
}

// The other way round.
template <class T, class C>
static void join_row(const C* phases, const PoolWindows& w, int64_t length, T* x, int64_t xs) {
  using V = typename Compute<T>::V;
  const int64_t n = w.in;
  int64_t i = 0;
  if (xs == 1 && w.stride == 1) {
    const C* from = phases + w.padding;
    for (; i + V::width <= n; i += V::width) V::load(from + i).store(x + i);
    if (i < n) V::load_partial(from + i, int(n - i)).store_partial(x + i, int(n - i));
    return;
  }
  if (xs == 1 && w.stride == 2) {
    const C* from_even = phases + phase_start(0, w, length);
    const C* from_odd = phases + phase_start(1, w, length);
    for (; i + 2 * V::width <= n; i += 2 * V::width) {
      V a, b;
      zip(V::load(from_even + i / 2), V::load(from_odd + i / 2), a, b);
      a.store(x + i);
      b.store(x + i + V::width);
    }
    for (int64_t j = i / 2; 2 * j < n; j++) from_any(x[2 * j], from_even[j]);
    for (int64_t j = i / 2; 2 * j + 1 < n; j++) from_any(x[2 * j + 1], from_odd[j]);
    return;
  }
  for (int64_t m = 0; m < w.stride && m < n; m++) {
    const C* from = phases + phase_start(m, w, length);
    for (int64_t j = 0; m + j * w.stride < n; j++) from_any(x[(m + j * w.stride) * xs], from[j]);
  }
}

// The row itself, or a copy that lies together in the type of the computation.
template <class T, class C>
static FASTNN_INLINE const C* dense_row(const T* x, int64_t xs, int64_t n, C* copy) {
  using V = typename Compute<T>::V;
  if (xs != 1) {
    for (int64_t i = 0; i < n; i++) copy[i] = wide(x[i * xs]);
    return copy;
  }
  if constexpr (sizeof(T) == sizeof(C)) {
    return x;
  } else {
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) V::load(x + i).store(copy + i);
    if (i < n) V::load_partial(x + i, int(n - i)).store_partial(copy + i, int(n - i));
    return copy;
  }
}

template <class T, class C>
static void store_row(const C* from, T* to, int64_t stride, int64_t n) {
  using V = typename Compute<T>::V;
  if (stride == 1) {
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) V::load(from + i).store(to + i);
    if (i < n) V::load_partial(from + i, int(n - i)).store_partial(to + i, int(n - i));
  } else {
    for (int64_t i = 0; i < n; i++) from_any(to[i * stride], from[i]);
  }
}

// Along the width, one tap after the other. `taps` > 0 is their count, known when compiled.
template <int mode, int taps, class V, class C>
static FASTNN_INLINE void reduce_taps(const C* phases, const int64_t* offset, int count,
                                      const C* first, int64_t n, C* value, C* code) {
  const int many = taps ? taps : count;
  for (int64_t i = 0; i < n; i += V::width) {
    V best = mode == kSum ? V::zero() : V::set1(C(kLowest));
    V at = mode == kMaxCodes ? V::load(first + i) : V::zero();
    for (int t = 0; t < many; t++)
      take<mode>(best, at, V::load(phases + offset[t] + i), V::set1(C(t)));
    best.store(value + i);
    if constexpr (mode == kMaxCodes) at.store(code + i);
  }
}

template <class V, class C>
static FASTNN_INLINE C sum_lanes(const C* x, int64_t n) {
  V sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int64_t i = 0;
  for (; i + 4 * V::width <= n; i += 4 * V::width)
    for (int u = 0; u < 4; u++) sum[u] = sum[u] + V::load(x + i + u * V::width);
  for (; i + V::width <= n; i += V::width) sum[0] = sum[0] + V::load(x + i);
  if (i < n) sum[1] = sum[1] + V::load_partial(x + i, int(n - i));
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// One window's part of a row that lies together.
template <int mode, class V, class C>
static FASTNN_INLINE void reduce_segment(const C* x, int64_t n, C& value, int64_t& at) {
  at = 0;
  if constexpr (mode == kSum) {
    // Long sums in parts: the error of one chain grows with its length.
    constexpr int64_t kPart = 1024;
    C sum = 0;
    for (int64_t i = 0; i < n; i += kPart)
      sum += sum_lanes<V>(x + i, n - i < kPart ? n - i : kPart);
    value = sum;
    return;
  }
  C best = C(kLowest);
  int64_t i = 0;
  if (n >= V::width) {
    V lanes = V::load(x), none = V::zero();
    for (i = V::width; i + V::width <= n; i += V::width)
      take<kMax>(lanes, none, V::load(x + i), none);
    C each[V::width];
    lanes.store(each);
    for (int l = 0; l < V::width; l++)
      if (each[l] > best || each[l] != each[l]) best = each[l];
  }
  for (; i < n; i++)
    if (x[i] > best || x[i] != x[i]) best = x[i];
  value = best;
  if constexpr (mode == kMaxCodes) {
    if (best != best) {
      for (at = n - 1; x[at] == x[at];) at--;
    } else {
      while (x[at] != best) at++;
    }
  }
}

}  // namespace fastnn::FASTNN_TARGET
