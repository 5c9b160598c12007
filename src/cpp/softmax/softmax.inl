// The softmax kernels of one instruction set. Included once by each file in kernels/, which defines
// FASTNN_TARGET; see isa/vec.hpp for why nothing here may be shared between targets.
#include "isa/stream.hpp"
#include "softmax/lanes.hpp"
#include "softmax/softmax.hpp"

namespace fastnn::FASTNN_TARGET {

// ---- rows: the lanes of a vector are neighbours along the dimension
// -----------------------------------

// What is exponentiated is kept in `e`, which is the result's own memory where that can hold it and
// is not to be written around the caches.
template <class T>
static void softmax_row(const T* x, T* out, int64_t n, void* work, bool around) {
  using V = typename Lanes<T>::V;
  using S = typename V::T;
  const V most = V::set1(largest<V>(x, n));
  S* e = static_cast<S*>(work);
  if constexpr (sizeof(T) == sizeof(S))
    if (!around) e = out;
  const double sum = sum_in_blocks<V>(n, [=](int64_t i, int lanes) __attribute__((always_inline)) {
    const V v = exp_below(load_lanes<V>(x + i, lanes) - most);
    store_lanes(v, e + i, lanes);
    return first_lanes(v, lanes);
  });
  const auto scale = Twofold<V>::of(1 / sum);
  fill<T, V>(out, n, around, [=](int64_t i, int lanes) __attribute__((always_inline)) {
    return scale.times(load_lanes<V>(e + i, lanes));
  });
}

template <class T>
static void log_softmax_row(const T* x, T* out, int64_t n, void*, bool around) {
  using V = typename Lanes<T>::V;
  using S = typename V::T;
  const V most = V::set1(largest<V>(x, n));
  const double sum = sum_in_blocks<V>(n, [=](int64_t i, int lanes) __attribute__((always_inline)) {
    return first_lanes(exp_below(load_lanes<V>(x + i, lanes) - most), lanes);
  });
  const V rest = V::set1(S(__builtin_log(sum)));
  fill<T, V>(out, n, around, [=](int64_t i, int lanes) __attribute__((always_inline)) {
    return load_lanes<V>(x + i, lanes) - most - rest;
  });
}

template <class T>
static void softmax_row_backward(const T* grad, const T* saved, T* out, int64_t n, bool around) {
  using V = typename Lanes<T>::V;
  using S = typename V::T;
  const double sum = sum_in_blocks<V>(n, [=](int64_t i, int lanes) __attribute__((always_inline)) {
    return load_lanes<V>(grad + i, lanes) * load_lanes<V>(saved + i, lanes);
  });
  const V s = V::set1(S(sum));
  fill<T, V>(out, n, around, [=](int64_t i, int lanes) __attribute__((always_inline)) {
    return (load_lanes<V>(grad + i, lanes) - s) * load_lanes<V>(saved + i, lanes);
  });
}

template <class T>
static void log_softmax_row_backward(const T* grad, const T* saved, T* out, int64_t n,
                                     bool around) {
  using V = typename Lanes<T>::V;
  using S = typename V::T;
  const double sum = sum_in_blocks<V>(n, [=](int64_t i, int lanes) __attribute__((always_inline)) {
    return load_lanes<V>(grad + i, lanes);
  });
  const V s = V::set1(S(-sum));
  fill<T, V>(out, n, around, [=](int64_t i, int lanes) __attribute__((always_inline)) {
    return fma(exp_below(load_lanes<V>(saved + i, lanes)), s, load_lanes<V>(grad + i, lanes));
  });
}

template <class T, bool log>
static void rows(const SoftmaxKernels::Rows& r) {
  const T* x = static_cast<const T*>(r.x[0]);
  T* out = static_cast<T*>(r.out);
  for (int64_t i = 0; i < r.rows; i++)
    (log ? log_softmax_row<T> : softmax_row<T>)(x + i * r.x_row[0], out + i * r.out_row, r.n,
                                                r.work, r.around_caches);
}

template <class T, bool log>
static void rows_backward(const SoftmaxKernels::Rows& r) {
  const T *grad = static_cast<const T*>(r.x[0]), *saved = static_cast<const T*>(r.x[1]);
  T* out = static_cast<T*>(r.out);
  for (int64_t i = 0; i < r.rows; i++)
    (log ? log_softmax_row_backward<T>
         : softmax_row_backward<T>)(grad + i * r.x_row[0], saved + i * r.x_row[1],
                                    out + i * r.out_row, r.n, r.around_caches);
}

// ---- columns: each lane goes along the dimension by itself
// --------------------------------------------

// Sums of columns: vectors are added up in blocks of rows, and these in float64.
template <class V>
struct ColumnSums {
  static constexpr int64_t kRows = 64;
  VecF64 total[2] = {VecF64::zero(), VecF64::zero()};
  FASTNN_INLINE void add(VecF32 sum) {
    total[0] = total[0] + widen_low(sum);
    total[1] = total[1] + widen_high(sum);
  }
  FASTNN_INLINE void add(VecF64 sum) { total[0] = total[0] + sum; }
  // f(row) of all n rows
  template <class F>
  FASTNN_INLINE void add_all(int64_t n, F f) {
    for (int64_t b = 0; b < n; b += kRows) {
      const int64_t end = b + kRows < n ? b + kRows : n;
      V sum = V::zero();
      for (int64_t i = b; i < end; i++) sum = sum + f(i);
      add(sum);
    }
  }
  FASTNN_INLINE V get(VecF32) const { return narrow(total[0], total[1]); }
  FASTNN_INLINE V get(VecF64) const { return total[0]; }
  FASTNN_INLINE V get() const { return get(V()); }
  // 1 over the sums
  FASTNN_INLINE Twofold<V> inverse() const {
    ColumnSums one, rest;
    for (int h = 0; h < 2; h++) one.total[h] = VecF64::set1(1) / total[h];
    const V high = one.get();
    rest.add(neg(high));
    for (int h = 0; h < 2; h++) rest.total[h] = rest.total[h] + one.total[h];
    return {high, rest.get()};
  }
  FASTNN_INLINE void store(double* lanes) const {
    for (int h = 0; h < 2; h++) total[h].store(lanes + h * VecF64::width);
  }
  FASTNN_INLINE void logarithms(VecF64 (&logs)[2]) const {
    double lanes[2 * VecF64::width];
    store(lanes);
    for (double& x : lanes) x = __builtin_log(x);
    for (int h = 0; h < 2; h++) logs[h] = VecF64::load(lanes + h * VecF64::width);
  }
  FASTNN_INLINE V logarithm() const {
    ColumnSums logs;
    logarithms(logs.total);
    return logs.get();
  }
};

static FASTNN_INLINE int lanes_of(int64_t columns, int64_t c, int width) {
  return columns - c < width ? int(columns - c) : width;
}

template <class T, bool log>
static void columns(const SoftmaxKernels::Columns& k) {
  using V = typename Lanes<T>::V;
  using S = typename V::T;
  constexpr int w = V::width;
  const T* x = static_cast<const T*>(k.x[0]);
  T* out = static_cast<T*>(k.out);
  S* work = static_cast<S*>(k.work);
  constexpr int64_t p = SoftmaxKernels::kPitch;
  const int64_t pitch = (k.columns + p - 1) / p * p;
  V most[SoftmaxKernels::kMostColumns / w];
  Twofold<V> last[SoftmaxKernels::kMostColumns / w];  // what is taken away, or multiplied by
  for (int64_t c = 0; c < k.columns; c += w) most[c / w] = V::set1(-S(__builtin_inf()));
  for (int64_t i = 0; i < k.n; i++)
    for (int64_t c = 0; c < k.columns; c += w) {
      const V v = load_lanes<V>(x + i * k.step[0] + c, lanes_of(k.columns, c, w));
      v.store(work + i * pitch + c);
      most[c / w] = max(v, most[c / w]);
    }
  for (int64_t c = 0; c < k.columns; c += w) {
    const V m = most[c / w];
    ColumnSums<V> sums;
    sums.add_all(k.n, [=](int64_t i) __attribute__((always_inline)) {
      S* at = work + i * pitch + c;
      const V shifted = V::load(at) - m, e = exp_below(shifted);
      (log ? shifted : e).store(at);
      return e;
    });
    last[c / w] = log ? Twofold<V>{sums.logarithm(), V::zero()} : sums.inverse();
  }
  for (int64_t i = 0; i < k.n; i++)
    for (int64_t c = 0; c < k.columns; c += w) {
      const V v = V::load(work + i * pitch + c);
      store_lanes(log ? v - last[c / w].high : last[c / w].times(v), out + i * k.out_step + c,
                  lanes_of(k.columns, c, w));
    }
}

template <class T, bool log>
static void columns_backward(const SoftmaxKernels::Columns& k) {
  using V = typename Lanes<T>::V;
  constexpr int w = V::width;
  const T *grad = static_cast<const T*>(k.x[0]), *saved = static_cast<const T*>(k.x[1]);
  T* out = static_cast<T*>(k.out);
  V last[SoftmaxKernels::kMostColumns / w];
  for (int64_t c = 0; c < k.columns; c += w) {
    const int lanes = lanes_of(k.columns, c, w);
    ColumnSums<V> sums;
    sums.add_all(k.n, [=](int64_t i) __attribute__((always_inline)) {
      const V g = load_lanes<V>(grad + i * k.step[0] + c, lanes);
      return log ? g : g * load_lanes<V>(saved + i * k.step[1] + c, lanes);
    });
    last[c / w] = sums.get();
  }
  for (int64_t i = 0; i < k.n; i++)
    for (int64_t c = 0; c < k.columns; c += w) {
      const int lanes = lanes_of(k.columns, c, w);
      const V g = load_lanes<V>(grad + i * k.step[0] + c, lanes);
      const V s = load_lanes<V>(saved + i * k.step[1] + c, lanes);
      const V v = log ? fma(neg(last[c / w]), exp_below(s), g) : (g - last[c / w]) * s;
      store_lanes(v, out + i * k.out_step + c, lanes);
    }
}

#define FASTNN_SOFTMAX(T)                                                                       \
  {                                                                                             \
    {rows<T, false>, rows_backward<T, false>, columns<T, false>, columns_backward<T, false>}, { \
      rows<T, true>, rows_backward<T, true>, columns<T, true>, columns_backward<T, true>        \
    }                                                                                           \
  }
static const SoftmaxKernels softmax_table = {
    {FASTNN_SOFTMAX(float), FASTNN_SOFTMAX(double), FASTNN_SOFTMAX(bf16), FASTNN_SOFTMAX(f16)},
    end_stream};
#undef FASTNN_SOFTMAX

}  // namespace fastnn::FASTNN_TARGET
