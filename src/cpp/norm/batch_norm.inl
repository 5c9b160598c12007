// The batch norm kernels of one instruction set. Included once by each file in kernels/, which
// defines FASTNN_TARGET; see isa/vec.hpp for why nothing here may be shared between targets.
#include "isa/stream.hpp"
#include "norm/batch_norm.hpp"

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

// The sum of all lanes in float64.
static FASTNN_INLINE double sum_lanes(VecF32 v) { return reduce_add(widen_low(v) + widen_high(v)); }
static FASTNN_INLINE double sum_lanes(VecF64 v) { return reduce_add(v); }

// Element i of a row and the `lanes` - 1 after it; the other lanes are 0.
template <bool dense, class V, class T>
static FASTNN_INLINE V load_at(const T* p, int64_t stride, int64_t i, int lanes) {
  if constexpr (dense) {
    return lanes == V::width ? V::load(p + i) : V::load_partial(p + i, lanes);
  } else {
    T gathered[V::width];
    for (int j = 0; j < lanes; j++) gathered[j] = p[(i + j) * stride];
    return V::load_partial(gathered, lanes);
  }
}
// row[i] = f(i-th vector), as fill() of isa/stream.hpp, of any stride.
template <bool dense, class V, class T, class F>
static FASTNN_INLINE void fill_row(T* row, int64_t stride, int64_t n, bool around_caches, F f) {
  if constexpr (dense) {
    fill<T, V>(row, n, around_caches, f);
  } else {
    for (int64_t i = 0; i < n; i += V::width) {
      const int lanes = n - i < V::width ? int(n - i) : V::width;
      T scattered[V::width];
      f(i, lanes).store(scattered);
      for (int j = 0; j < lanes; j++) row[(i + j) * stride] = scattered[j];
    }
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

// Statistics are sums of deviations from a value near the mean: squares of the elements themselves
// would cancel where the mean is far from 0. That value is the mean of an eighth of the block: even
// if that part is unlike the rest, its distance from the block's mean squared is at most eight
// times the block's variance, so that little can cancel. Where it is small beside the elements it
// is taken for 0: nothing cancels then, and subtracting it would round each of them, which shows in
// a mean that is near 0 itself.
constexpr int64_t kPilot = 8;
template <class V>
static FASTNN_INLINE V pilot(V sum, V size, V share) {
  return select(lt(abs(sum) + abs(sum), size), V::zero(), sum * share);
}

// Chan, Golub and LeVeque (1983): two sets of elements, each with its mean and sum of squared
// deviations, become one.
static FASTNN_INLINE void merge(double before, double count, double share, double sum,
                                double squares, double shift, double& mean, double& all_squares) {
  const double block_mean = shift + sum / count;
  const double delta = block_mean - mean;
  mean += delta * share;  // share = count / (before + count)
  all_squares += squares - sum * (sum / count) + delta * delta * (before * share);
}

template <class T, bool dense>
struct Plane {
  using V = typename ComputeIn<T>::V;
  using S = typename V::T;

  static void stats(const NormBlock& b, int64_t before, double* mean, double* squares) {
    const T* x = reinterpret_cast<const T*>(b.at[0]);
    const int64_t stride = b.inner[0];
    const int64_t pilot_rows = (b.rows + kPilot - 1) / kPilot;
    const int64_t pilot_n = b.rows > 1 ? b.n : (b.n + kPilot - 1) / kPilot;
    V s[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    V q[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    for (int64_t r = 0; r < pilot_rows; r++) {
      const T* row = x + r * b.row[0];
      for_each_vector<V>(pilot_n, [&](int k, int64_t i, int lanes) __attribute__((always_inline)) {
        const V v = load_at<dense, V>(row, stride, i, lanes);
        s[k] = s[k] + v;
        q[k] = q[k] + abs(v);
      });
    }
    const V center = pilot(V::set1(S(sum_lanes((s[0] + s[1]) + (s[2] + s[3])))),
                           V::set1(S(sum_lanes((q[0] + q[1]) + (q[2] + q[3])))),
                           V::set1(S(1) / S(pilot_rows * pilot_n)));
    const int tail = int(b.n % V::width);
    const V tail_center = center * ones<V>(tail);
    for (int k = 0; k < 4; k++) s[k] = q[k] = V::zero();
    for (int64_t r = 0; r < b.rows; r++) {
      const T* row = x + r * b.row[0];
      for_each_vector<V>(b.n, [&](int k, int64_t i, int lanes) __attribute__((always_inline)) {
        const V d =
            load_at<dense, V>(row, stride, i, lanes) - (lanes == V::width ? center : tail_center);
        s[k] = s[k] + d;
        q[k] = fma(d, d, q[k]);
      });
    }
    const double count = double(b.rows * b.n);
    merge(double(before), count, count / (double(before) + count),
          sum_lanes(s[0]) + sum_lanes(s[1]) + sum_lanes(s[2]) + sum_lanes(s[3]),
          sum_lanes(q[0]) + sum_lanes(q[1]) + sum_lanes(q[2]) + sum_lanes(q[3]),
          sum_lanes(center) / V::width, *mean, *squares);
  }

  template <bool relu>
  static FASTNN_INLINE void reduce_as(const NormBlock& b, const void* center_, double* sum_grad,
                                      double* sum_grad_x) {
    const V center = V::set1(*static_cast<const S*>(center_));
    V s[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    V q[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    for (int64_t r = 0; r < b.rows; r++) {
      const T* grad = reinterpret_cast<const T*>(b.at[0]) + r * b.row[0];
      const T* x = reinterpret_cast<const T*>(b.at[1]) + r * b.row[1];
      const T* out = reinterpret_cast<const T*>(b.at[2]) + r * b.row[2];
      for_each_vector<V>(b.n, [&](int k, int64_t i, int lanes) __attribute__((always_inline)) {
        V g = load_at<dense, V>(grad, b.inner[0], i, lanes);
        if constexpr (relu)
          g = select(le(load_at<dense, V>(out, b.inner[2], i, lanes), V::zero()), V::zero(), g);
        s[k] = s[k] + g;
        // Past the end g is 0; x - center is not, and must be finite for that.
        q[k] = fma(g, load_at<dense, V>(x, b.inner[1], i, lanes) - center, q[k]);
      });
    }
    *sum_grad += sum_lanes(s[0]) + sum_lanes(s[1]) + sum_lanes(s[2]) + sum_lanes(s[3]);
    *sum_grad_x += sum_lanes(q[0]) + sum_lanes(q[1]) + sum_lanes(q[2]) + sum_lanes(q[3]);
  }
  static void reduce(const NormBlock& b, const void* center, bool relu, double* sum_grad,
                     double* sum_grad_x) {
    relu ? reduce_as<true>(b, center, sum_grad, sum_grad_x)
         : reduce_as<false>(b, center, sum_grad, sum_grad_x);
  }
};

template <class T, bool dense>
struct Across {
  using V = typename ComputeIn<T>::V;
  using S = typename V::T;
  static constexpr int w = V::width;

  // f.template operator()<vectors>(first channel, lanes of the last vector): four vectors a time.
  template <class F>
  static FASTNN_INLINE void for_each_tile(int64_t n, F f) {
    int64_t i = 0;
    for (; i + 4 * w <= n; i += 4 * w) f.template operator()<4>(i, w);
    for (; i + w <= n; i += w) f.template operator()<1>(i, w);
    if (i < n) f.template operator()<1>(i, int(n - i));
  }

  // A lane adds up one channel, and no other lanes average its rounding out: chains are short.
  static constexpr int64_t kChain = 16;
  template <int vectors>
  static FASTNN_INLINE void end_chain(V* sum, V* all) {
    for (int v = 0; v < vectors; v++) {
      all[v] = all[v] + sum[v];
      sum[v] = V::zero();
    }
  }

  static void stats(const NormBlock& b, int64_t before, double* mean, double* squares) {
    const T* x = reinterpret_cast<const T*>(b.at[0]);
    const int64_t stride = b.inner[0];
    const int64_t pilot_rows = (b.rows + kPilot - 1) / kPilot;
    const double count = double(b.rows), share = count / (double(before) + count);
    for_each_tile(b.n, [&]<int vectors>(int64_t first, int lanes) __attribute__((always_inline)) {
      V center[vectors], s[vectors], q[vectors];
      for (int v = 0; v < vectors; v++) s[v] = q[v] = V::zero();
      for (int64_t r = 0; r < pilot_rows; r++)
        for (int v = 0; v < vectors; v++) {
          const V e = load_at<dense, V>(x + r * b.row[0], stride, first + v * w, lanes);
          s[v] = s[v] + e;
          q[v] = q[v] + abs(e);
        }
      for (int v = 0; v < vectors; v++) {
        center[v] = pilot(s[v], q[v], V::set1(S(1) / S(pilot_rows)));
        s[v] = q[v] = V::zero();
      }
      V all_s[vectors], all_q[vectors];
      for (int v = 0; v < vectors; v++) all_s[v] = all_q[v] = V::zero();
      for (int64_t r = 0; r < b.rows;) {
        for (const int64_t end = r + kChain < b.rows ? r + kChain : b.rows; r < end; r++)
          for (int v = 0; v < vectors; v++) {
            const V d =
                load_at<dense, V>(x + r * b.row[0], stride, first + v * w, lanes) - center[v];
            s[v] = s[v] + d;
            q[v] = fma(d, d, q[v]);
          }
        end_chain<vectors>(s, all_s);
        end_chain<vectors>(q, all_q);
      }
      for (int v = 0; v < vectors; v++) {
        S shift[w], sum[w], square[w];
        center[v].store(shift);
        all_s[v].store(sum);
        all_q[v].store(square);
        double* m = mean + first + v * w;
        double* m2 = squares + first + v * w;
        for (int j = 0; j < lanes; j++)
          merge(double(before), count, share, double(sum[j]), double(square[j]), double(shift[j]),
                m[j], m2[j]);
      }
    });
  }

  template <bool relu>
  static FASTNN_INLINE void reduce_as(const NormBlock& b, const void* center_, double* sum_grad,
                                      double* sum_grad_x) {
    const S* centers = static_cast<const S*>(center_);
    for_each_tile(b.n, [&]<int vectors>(int64_t first, int lanes) __attribute__((always_inline)) {
      V center[vectors], s[vectors], q[vectors], all_s[vectors], all_q[vectors];
      for (int v = 0; v < vectors; v++) {
        s[v] = q[v] = all_s[v] = all_q[v] = V::zero();
        center[v] = load_at<true, V>(centers, 1, first + v * w, lanes);
      }
      for (int64_t r = 0; r < b.rows;) {
        for (const int64_t end = r + kChain < b.rows ? r + kChain : b.rows; r < end; r++) {
          const T* grad = reinterpret_cast<const T*>(b.at[0]) + r * b.row[0];
          const T* x = reinterpret_cast<const T*>(b.at[1]) + r * b.row[1];
          const T* out = reinterpret_cast<const T*>(b.at[2]) + r * b.row[2];
          for (int v = 0; v < vectors; v++) {
            const int64_t i = first + v * w;
            V g = load_at<dense, V>(grad, b.inner[0], i, lanes);
            if constexpr (relu)
              g = select(le(load_at<dense, V>(out, b.inner[2], i, lanes), V::zero()), V::zero(), g);
            s[v] = s[v] + g;
            q[v] = fma(g, load_at<dense, V>(x, b.inner[1], i, lanes) - center[v], q[v]);
          }
        }
        end_chain<vectors>(s, all_s);
        end_chain<vectors>(q, all_q);
      }
      for (int v = 0; v < vectors; v++) {
        S sum[w], product[w];
        all_s[v].store(sum);
        all_q[v].store(product);
        for (int j = 0; j < lanes; j++) {
          sum_grad[first + v * w + j] += double(sum[j]);
          sum_grad_x[first + v * w + j] += double(product[j]);
        }
      }
    });
  }
  static void reduce(const NormBlock& b, const void* center, bool relu, double* sum_grad,
                     double* sum_grad_x) {
    relu ? reduce_as<true>(b, center, sum_grad, sum_grad_x)
         : reduce_as<false>(b, center, sum_grad, sum_grad_x);
  }
};

// A coefficient: of the block's channel, or of the channels of the vector at i.
template <bool across, class V>
struct Coefficient {
  const typename V::T* p;
  V all;
  explicit FASTNN_INLINE Coefficient(const void* from)
      : p(static_cast<const typename V::T*>(from)), all(V::set1(*p)) {}
  FASTNN_INLINE V at(int64_t i, int lanes) const {
    if constexpr (across)
      return load_at<true, V>(p, 1, i, lanes);
    else
      return all;
  }
};

template <class T, bool dense, bool across, bool residual>
static FASTNN_INLINE void apply_as(const NormBlock& b, const void* const* coef, bool relu) {
  using V = typename ComputeIn<T>::V;
  const Coefficient<across, V> center(coef[0]), scale(coef[1]), shift(coef[2]);
  // The second operand of max is its result where that is NaN.
  const V least = V::set1(relu ? 0 : -__builtin_inf());
  const int64_t x_stride = b.inner[0], added_stride = b.inner[1], ahead = b.ahead;
  for (int64_t r = 0; r < b.rows; r++) {
    const T* x = reinterpret_cast<const T*>(b.at[0]) + r * b.row[0];
    const T* added = reinterpret_cast<const T*>(b.at[1]) + r * b.row[1];
    T* out = reinterpret_cast<T*>(b.at[2]) + r * b.row[2];
    fill_row<dense, V>(out, b.inner[2], b.n, b.around_caches,
                       [=](int64_t i, int lanes) __attribute__((always_inline)) {
                         if constexpr (dense && !across) __builtin_prefetch(x + i + ahead, 0, 2);
                         V y = fma(load_at<dense, V>(x, x_stride, i, lanes) - center.at(i, lanes),
                                   scale.at(i, lanes), shift.at(i, lanes));
                         if constexpr (residual)
                           y = y + load_at<dense, V>(added, added_stride, i, lanes);
                         return max(least, y);
                       });
  }
  if (b.around_caches) end_stream();
}

template <class T, bool dense, bool across, bool training, bool residual, bool relu>
static FASTNN_INLINE void backward_as(const NormBlock& b, const void* const* coef) {
  using V = typename ComputeIn<T>::V;
  const Coefficient<across, V> center(coef[0]), by_grad(coef[1]), by_x(coef[2]), rest(coef[3]);
  const int64_t grad_stride = b.inner[0], x_stride = b.inner[1], out_stride = b.inner[2],
                residual_stride = b.inner[4], ahead = b.ahead;
  for (int64_t r = 0; r < b.rows; r++) {
    const T* grad = reinterpret_cast<const T*>(b.at[0]) + r * b.row[0];
    const T* x = reinterpret_cast<const T*>(b.at[1]) + r * b.row[1];
    const T* out = reinterpret_cast<const T*>(b.at[2]) + r * b.row[2];
    T* grad_x = reinterpret_cast<T*>(b.at[3]) + r * b.row[3];
    T* grad_residual = reinterpret_cast<T*>(b.at[4]) + r * b.row[4];
    auto gradient = [=](int64_t i, int lanes) __attribute__((always_inline)) {
      const V g = load_at<dense, V>(grad, grad_stride, i, lanes);
      if constexpr (relu)
        return select(le(load_at<dense, V>(out, out_stride, i, lanes), V::zero()), V::zero(), g);
      else
        return g;
    };
    if constexpr (residual)
      fill_row<dense, V>(grad_residual, residual_stride, b.n, b.around_caches, gradient);
    fill_row<dense, V>(grad_x, b.inner[3], b.n, b.around_caches,
                       [=](int64_t i, int lanes) __attribute__((always_inline)) {
                         if constexpr (dense && !across && training) {
                           __builtin_prefetch(grad + i + ahead, 0, 2);
                           __builtin_prefetch(x + i + ahead, 0, 2);
                           if constexpr (relu) __builtin_prefetch(out + i + ahead, 0, 2);
                         }
                         const V g = gradient(i, lanes);
                         if constexpr (training)
                           return fma(
                               g, by_grad.at(i, lanes),
                               fma(load_at<dense, V>(x, x_stride, i, lanes) - center.at(i, lanes),
                                   by_x.at(i, lanes), rest.at(i, lanes)));
                         else
                           return g * by_grad.at(i, lanes);
                       });
  }
  if (b.around_caches) end_stream();
}

template <class T, bool dense, bool across>
static void apply(const NormBlock& b, const void* const* coef, bool residual, bool relu) {
  residual ? apply_as<T, dense, across, true>(b, coef, relu)
           : apply_as<T, dense, across, false>(b, coef, relu);
}

template <class T, bool dense, bool across>
static void backward(const NormBlock& b, const void* const* coef, bool training, bool residual,
                     bool relu) {
  auto with = [&]<bool train>() __attribute__((always_inline)) {
    if (residual)
      relu ? backward_as<T, dense, across, train, true, true>(b, coef)
           : backward_as<T, dense, across, train, true, false>(b, coef);
    else
      relu ? backward_as<T, dense, across, train, false, true>(b, coef)
           : backward_as<T, dense, across, train, false, false>(b, coef);
  };
  training ? with.template operator()<true>() : with.template operator()<false>();
}

template <class T>
static void widen(const void* x_, int64_t stride, int64_t n, double* out) {
  const T* x = static_cast<const T*>(x_);
  for (int64_t i = 0; i < n; i++) out[i] = to_f64(x[i * stride]);
}

#define FASTNN_PLANE(T, dense)                                              \
  {Plane<T, dense>::stats, apply<T, dense, false>, Plane<T, dense>::reduce, \
   backward<T, dense, false>}
#define FASTNN_ACROSS(T, dense)                                              \
  {Across<T, dense>::stats, apply<T, dense, true>, Across<T, dense>::reduce, \
   backward<T, dense, true>}
static const BatchNormKernels batch_norm_table = {
    {{FASTNN_PLANE(float, false), FASTNN_PLANE(float, true)},
     {FASTNN_PLANE(double, false), FASTNN_PLANE(double, true)},
     {FASTNN_PLANE(bf16, false), FASTNN_PLANE(bf16, true)},
     {FASTNN_PLANE(f16, false), FASTNN_PLANE(f16, true)}},
    {{FASTNN_ACROSS(float, false), FASTNN_ACROSS(float, true)},
     {FASTNN_ACROSS(double, false), FASTNN_ACROSS(double, true)},
     {FASTNN_ACROSS(bf16, false), FASTNN_ACROSS(bf16, true)},
     {FASTNN_ACROSS(f16, false), FASTNN_ACROSS(f16, true)}},
    {widen<float>, widen<double>, widen<bf16>, widen<f16>}};
#undef FASTNN_PLANE
#undef FASTNN_ACROSS

}  // namespace fastnn::FASTNN_TARGET
