// The kernels of layer norm and rms norm. Included once by each file in kernels/, which defines
// FASTNN_TARGET; see isa/vec.hpp for why nothing here may be shared between targets.
#include "isa/stream.hpp"
#include "norm/layer_norm.hpp"
#include "norm/vectors.inl"

namespace fastnn::FASTNN_TARGET {

// A row is gone over several times: the first brings it into the nearest cache.
template <class T>
struct Rows {
  using V = typename ComputeIn<T>::V;
  using S = typename V::T;
  using Terms = RowTerms<S>;
  static constexpr int w = V::width;
  // Elements that are added up in float32, in four chains, before float64 takes over.
  static constexpr int64_t kBlock = 32 * 4 * 16;
  // Rows whose gradients are found together, so that sums over them stay in registers.
  static constexpr int kTogether = RowBlock::kAhead;

  static FASTNN_INLINE const T* at(const char* p) { return reinterpret_cast<const T*>(p); }
  static FASTNN_INLINE V column(const void* p, int64_t i, int lanes) {
    return load_at<true, V>(static_cast<const S*>(p), 1, i, lanes);
  }
  template <class U>
  static FASTNN_INLINE void put(U* p, V v, int lanes) {
    lanes == w ? v.store(p) : v.store_partial(p, lanes);
  }

  // f(element, lanes, sums) for each vector; `count` sums of a row.
  template <int count, class F>
  static FASTNN_INLINE void add_up(int64_t n, double* totals, F f) {
    constexpr int chains = count > 2 ? 2 : 4;  // more would not fit the registers
    Wide<V> wide[count];
    for (int s = 0; s < count; s++) wide[s] = Wide<V>::zero();
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      V sums[chains][count];
      for (int k = 0; k < chains; k++)
        for (int s = 0; s < count; s++) sums[k][s] = V::zero();
      const int64_t length = n - begin < kBlock ? n - begin : kBlock;
      for_each_vector<V>(length, [&](int k, int64_t i, int lanes) __attribute__((always_inline)) {
        f(begin + i, lanes, sums[k % chains]);
      });
      for (int s = 0; s < count; s++)
        for (int k = 0; k < chains; k += 2) wide[s].add(sums[k][s] + sums[k + 1][s]);
    }
    for (int s = 0; s < count; s++) totals[s] = wide[s].total();
  }

  // The mean is center + off. sum: of h = grad * weight; along: of h (x - mean).
  struct Statistics {
    double off, var, sum, along;
    S center;
  };
  // Whether squares have left the range of float32, or are what little of it is left. eps above it
  // hides what is lost.
  static FASTNN_INLINE bool out_of_range(double var, double eps) {
    return sizeof(S) == 4 && !(var + eps > 1e-30 && var < 1e37);
  }
  static __attribute__((noinline)) Statistics in_float64(const T* x, const T* grad, const S* weight,
                                                         int64_t n, bool centered) {
    double mean = 0;
    Statistics found{0, 0, 0, 0, 0};
    if (centered) {
      for (int64_t i = 0; i < n; i++) mean += to_f64(x[i]);
      mean /= double(n);
    }
    for (int64_t i = 0; i < n; i++) {
      const double d = to_f64(x[i]) - mean;
      found.var += d * d / double(n);
      if (!grad) continue;
      const double h = to_f64(grad[i]) * (weight ? double(weight[i]) : 1);
      found.sum += h;
      found.along += h * d;
    }
    found.center = S(mean);
    found.off = mean - double(found.center);
    return found;
  }
  // Sums of deviations from a value near the mean, and of their squares: squares of the elements
  // themselves would cancel where the mean is far from 0. That value is the mean of an eighth of
  // the row: even if that part is unlike the rest, its distance from the row's mean squared is at
  // most eight times the row's variance, so that little can cancel. Without the mean to take off,
  // the value is 0.
  template <bool centered, bool backward, bool scaled>
  static FASTNN_INLINE Statistics statistics(const T* x, const T* grad, const RowBlock& b) {
    const int64_t n = b.n;
    const double part = 1 / double(n);
    double sums[4] = {0, 0, 0, 0};
    S pilot = 0;
    if constexpr (centered) {
      const int64_t some = (n + 7) / 8;
      add_up<1>(some, sums, [=](int64_t i, int lanes, V* s) __attribute__((always_inline)) {
        s[0] = s[0] + load_at<true, V>(x, 1, i, lanes);
      });
      pilot = S(sums[0] / double(some));
    }
    const V whole = V::set1(pilot), tail = centered ? whole * ones<V>(int(n % w)) : whole;
    add_up<backward ? 4 : 2>(
        n, sums, [=, weight = b.weight](int64_t i, int lanes, V* s) __attribute__((always_inline)) {
          V d = load_at<true, V>(x, 1, i, lanes);
          if constexpr (centered) {
            d = d - (lanes == w ? whole : tail);
            s[0] = s[0] + d;
          }
          s[1] = fma(d, d, s[1]);
          if constexpr (backward) {
            V h = load_at<true, V>(grad, 1, i, lanes);
            if constexpr (scaled) h = h * column(weight, i, lanes);
            if constexpr (centered) s[2] = s[2] + h;
            s[3] = fma(h, d, s[3]);
          }
        });
    const double shift = sums[0] * part, mean = double(pilot) + shift;
    const double var = sums[1] * part - shift * shift;
    if (out_of_range(var, b.eps))
      return in_float64(x, backward ? grad : nullptr, static_cast<const S*>(b.weight), n, centered);
    const S center = S(mean);
    return {mean - double(center), var, sums[2], sums[3] - shift * sums[2], center};
  }

  template <bool centered, bool scaled, bool shifted>
  static FASTNN_INLINE void forward_as(const RowBlock& b) {
    const int64_t n = b.n;
    for (int64_t r = 0; r < b.rows; r++) {
      const T *x = at(b.x[r]), *next = at(b.x[r + 1]);
      const Statistics found = statistics<centered, false, false>(x, nullptr, b);
      const double inverse = 1 / __builtin_sqrt(found.var + b.eps);
      const V center = V::set1(found.center), scale = V::set1(S(inverse)),
              shift = V::set1(S(-found.off * inverse));
      fill<T, V>(reinterpret_cast<T*>(b.out[r]), n, b.around_caches,
                 [=, weight = b.weight, bias = b.bias](int64_t i, int lanes)
                     __attribute__((always_inline)) {
                       __builtin_prefetch(next + i, 0, 2);
                       V y = load_at<true, V>(x, 1, i, lanes);
                       if constexpr (centered)
                         y = fma(y - center, scale, shift);
                       else
                         y = y * scale;
                       if constexpr (scaled && shifted)
                         return fma(y, column(weight, i, lanes), column(bias, i, lanes));
                       else if constexpr (scaled)
                         return y * column(weight, i, lanes);
                       else if constexpr (shifted)
                         return y + column(bias, i, lanes);
                       else
                         return y;
                     });
    }
  }
  template <bool centered>
  static FASTNN_INLINE void forward_with(const RowBlock& b) {
    if (b.weight)
      b.bias ? forward_as<centered, true, true>(b) : forward_as<centered, true, false>(b);
    else
      b.bias ? forward_as<centered, false, true>(b) : forward_as<centered, false, false>(b);
  }
  static void forward(const RowBlock& b, bool centered) {
    centered ? forward_with<true>(b) : forward_with<false>(b);
  }

  // With h = grad * weight and x^ the normalized row: grad_x = (h - mean(h) - x^ mean(h x^)) /
  // sqrt(var + eps), without mean(h) where the row is not centered (Ba, Kiros and Hinton,
  // arXiv:1607.06450; Zhang and Sennrich, arXiv:1910.07467).
  template <bool centered, bool scaled>
  static FASTNN_INLINE Terms terms_of(const T* x, const T* grad, const RowBlock& b) {
    const Statistics found = statistics<centered, true, scaled>(x, grad, b);
    const double inverse = 1 / __builtin_sqrt(found.var + b.eps), part = 1 / double(b.n);
    const double along = inverse * found.along * part, mean = centered ? found.sum * part : 0;
    const S rounded = S(mean);
    return {found.center, S(inverse), S(-found.off * inverse),
            rounded,      S(-along),  S(double(rounded) - mean)};
  }
  template <bool centered>
  static FASTNN_INLINE void terms_with(const RowBlock& b, Terms* terms) {
    for (int64_t r = 0; r < b.rows; r++)
      terms[r] = b.weight ? terms_of<centered, true>(at(b.x[r]), at(b.grad[r]), b)
                          : terms_of<centered, false>(at(b.x[r]), at(b.grad[r]), b);
  }
  static void terms(const RowBlock& b, bool centered, void* terms) {
    centered ? terms_with<true>(b, static_cast<Terms*>(terms))
             : terms_with<false>(b, static_cast<Terms*>(terms));
  }

  // Of the rows from `first` on.
  template <int rows, bool scaled, bool by_weight, bool by_bias>
  static FASTNN_INLINE void gradients(const RowBlock& b, int64_t first, const Terms* terms,
                                      S* sum_weight, S* sum_bias) {
    V center[rows], scale[rows], shift[rows], mean[rows], along[rows], rest[rows];
    const T *x[rows], *grad[rows], *next_x[rows], *next_grad[rows];
    T* out[rows];
    bool aligned = b.around_caches;
    for (int r = 0; r < rows; r++) {
      const Terms& t = terms[first + r];
      center[r] = V::set1(t.center), scale[r] = V::set1(t.scale), shift[r] = V::set1(t.shift);
      mean[r] = V::set1(t.mean), along[r] = V::set1(t.along), rest[r] = V::set1(t.rest);
      x[r] = at(b.x[first + r]), grad[r] = at(b.grad[first + r]);
      next_x[r] = at(b.x[first + r + rows]), next_grad[r] = at(b.grad[first + r + rows]);
      out[r] = reinterpret_cast<T*>(b.out[first + r]);
      aligned = aligned && uintptr_t(out[r]) % (w * sizeof(T)) == 0;
    }
    auto vector = [&]<bool around>(int64_t i, int lanes) __attribute__((always_inline)) {
      V weight = V::zero(), products = V::zero(), sum = V::zero();
      if constexpr (scaled) weight = column(b.weight, i, lanes);
      for (int r = 0; r < rows; r++) {
        __builtin_prefetch(next_x[r] + i, 0, 2);
        __builtin_prefetch(next_grad[r] + i, 0, 2);
        const V g = load_at<true, V>(grad[r], 1, i, lanes);
        const V value = fma(load_at<true, V>(x[r], 1, i, lanes) - center[r], scale[r], shift[r]);
        const V h = scaled ? g * weight : g;
        const V result = ((h - mean[r]) + fma(value, along[r], rest[r])) * scale[r];
        if constexpr (around)
          stream(out[r] + i, result);
        else
          put(out[r] + i, result, lanes);
        if constexpr (by_weight) products = fma(g, value, products);
        if constexpr (by_bias) sum = sum + g;
      }
      // The chain of additions is the shorter for starting anew.
      if constexpr (by_weight) put(sum_weight + i, column(sum_weight, i, lanes) + products, lanes);
      if constexpr (by_bias) put(sum_bias + i, column(sum_bias, i, lanes) + sum, lanes);
    };
    int64_t i = 0;
    if (aligned)
      for (; i + w <= b.n; i += w) vector.template operator()<true>(i, w);
    for (; i + w <= b.n; i += w) vector.template operator()<false>(i, w);
    if (i < b.n) vector.template operator()<false>(i, int(b.n - i));
  }
  template <bool scaled, bool by_weight, bool by_bias>
  static FASTNN_INLINE void backward_as(const RowBlock& b, const Terms* terms, S* sum_weight,
                                        S* sum_bias) {
    int64_t r = 0;
    for (; r + kTogether <= b.rows; r += kTogether)
      gradients<kTogether, scaled, by_weight, by_bias>(b, r, terms, sum_weight, sum_bias);
    for (; r < b.rows; r++)
      gradients<1, scaled, by_weight, by_bias>(b, r, terms, sum_weight, sum_bias);
  }
  static void backward(const RowBlock& b, const void* terms_, void* sum_weight_, void* sum_bias_) {
    const Terms* t = static_cast<const Terms*>(terms_);
    S *sum_weight = static_cast<S*>(sum_weight_), *sum_bias = static_cast<S*>(sum_bias_);
    if (sum_weight && b.weight)
      sum_bias ? backward_as<true, true, true>(b, t, sum_weight, sum_bias)
               : backward_as<true, true, false>(b, t, sum_weight, sum_bias);
    else if (b.weight)
      sum_bias ? backward_as<true, false, true>(b, t, sum_weight, sum_bias)
               : backward_as<true, false, false>(b, t, sum_weight, sum_bias);
    else if (sum_weight)
      sum_bias ? backward_as<false, true, true>(b, t, sum_weight, sum_bias)
               : backward_as<false, true, false>(b, t, sum_weight, sum_bias);
    else
      sum_bias ? backward_as<false, false, true>(b, t, sum_weight, sum_bias)
               : backward_as<false, false, false>(b, t, sum_weight, sum_bias);
  }

  static void flush(void* sums_, int64_t n, double* to) {
    S* sums = static_cast<S*>(sums_);
    for (int64_t i = 0; i < n; i++) {
      to[i] += double(sums[i]);
      sums[i] = 0;
    }
  }
};

template <class From, class S>
static void convert(const void* from_, int64_t stride, int64_t n, void* to_) {
  const From* from = static_cast<const From*>(from_);
  S* to = static_cast<S*>(to_);
  for (int64_t i = 0; i < n; i++) to[i] = S(to_f64(from[i * stride]));
}

#define FASTNN_CONVERT(S) {convert<float, S>, convert<double, S>, convert<bf16, S>, convert<f16, S>}
#define FASTNN_ROWS(f) {Rows<float>::f, Rows<double>::f, Rows<bf16>::f, Rows<f16>::f}
static const RowNormKernels row_norm_table = {
    FASTNN_ROWS(forward),
    FASTNN_ROWS(terms),
    FASTNN_ROWS(backward),
    FASTNN_ROWS(flush),
    {FASTNN_CONVERT(float), FASTNN_CONVERT(double), FASTNN_CONVERT(float), FASTNN_CONVERT(float)},
    end_stream};
#undef FASTNN_CONVERT
#undef FASTNN_ROWS

}  // namespace fastnn::FASTNN_TARGET
