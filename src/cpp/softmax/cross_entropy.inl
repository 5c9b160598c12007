// The cross entropy kernels of one instruction set. Included once by each file in kernels/, after
// softmax.inl.
#include "softmax/cross_entropy.hpp"

namespace fastnn::FASTNN_TARGET {

using LossBlock = CrossEntropyKernels::Block;

// The weights of n classes from the first, or 1 each; 0 in the lanes beyond.
template <class V>
static FASTNN_INLINE V weights_at(const void* weight, int64_t i, int lanes) {
  using S = typename V::T;
  if (weight) return load_lanes<V>(static_cast<const S*>(weight) + i, lanes);
  return first_lanes(V::set1(1), lanes);
}

// Sums of products of float32 that may cancel out, in float64.
struct WideSums {
  double below, mass;
};
static FASTNN_INLINE VecF64 half_of(VecF32 v, int h) { return h ? widen_high(v) : widen_low(v); }
static FASTNN_INLINE VecF64 half_of(VecF64 v, int) { return v; }
template <class V>
constexpr int kHalves = V::width / VecF64::width;

// sum p w (most - x + log_sum), and sum p w
template <class V, class T>
static FASTNN_INLINE WideSums weigh_targets(const T* x, const T* p, const void* weight, int64_t n,
                                            double most, double log_sum) {
  const VecF64 top = VecF64::set1(most), rest = VecF64::set1(log_sum);
  VecF64 below = VecF64::zero(), mass = VecF64::zero();
  for (int64_t i = 0; i < n; i += V::width) {
    const int lanes = lanes_of(n, i, V::width);
    const V xs = load_lanes<V>(x + i, lanes), ps = load_lanes<V>(p + i, lanes);
    const V ws = weights_at<V>(weight, i, lanes);
    for (int h = 0; h < kHalves<V>; h++) {
      const VecF64 q = half_of(ps, h) * half_of(ws, h);
      mass = mass + q;
      // The lanes beyond the last have no weight.
      below = fma(q, top - half_of(xs, h) + rest, below);
    }
  }
  return {reduce_add(below), reduce_add(mass)};
}

template <class T>
static void loss_rows(const LossBlock& b, bool smooth, CrossEntropyKernels::Sums* sums) {
  using V = typename Lanes<T>::V;
  for (int64_t k = 0; k < b.positions; k++) {
    const T* x = static_cast<const T*>(b.x) + k * b.x_position;
    const auto top = largest<V>(x, b.n);
    const V most = V::set1(top);
    auto& s = sums[k];
    s = {double(top), 0, 0, 0, 0};
    s.exps = sum_in_blocks<V>(b.n, [=](int64_t i, int lanes) __attribute__((always_inline)) {
      return first_lanes(exp_below(load_lanes<V>(x + i, lanes) - most), lanes);
    });
    const void* weight = b.weight;
    if (smooth)
      s.below = sum_in_blocks<V>(b.n, [=](int64_t i, int lanes) __attribute__((always_inline)) {
        const V d = first_lanes(most - load_lanes<V>(x + i, lanes), lanes);
        return weights_at<V>(weight, i, lanes) * d;
      });
    if (!b.probabilities) continue;
    const T* p = static_cast<const T*>(b.probabilities) + k * b.p_position;
    const auto q = weigh_targets<V>(x, p, weight, b.n, double(top), __builtin_log(s.exps));
    s.p_below = q.below, s.p = q.mass;
  }
}

// One number a lane, of each position's numbers in float64.
template <class V>
static FASTNN_INLINE V lanes_from(const double* from, int64_t stride, int lanes) {
  typename V::T values[V::width] = {};
  for (int j = 0; j < lanes; j++) values[j] = typename V::T(from[j * stride]);
  return V::load(values);
}

template <class T>
static void loss_columns(const LossBlock& b, bool smooth, CrossEntropyKernels::Sums* sums) {
  using V = typename Lanes<T>::V;
  using S = typename V::T;
  constexpr int w = V::width;
  for (int64_t c = 0; c < b.positions; c += w) {
    const int lanes = lanes_of(b.positions, c, w);
    const T* x = static_cast<const T*>(b.x) + c;
    const T* p = static_cast<const T*>(b.probabilities) + (b.probabilities ? c : 0);
    const S* weight = static_cast<const S*>(b.weight);
    V most = V::set1(-S(__builtin_inf()));
    for (int64_t i = 0; i < b.n; i++) most = max(load_lanes<V>(x + i * b.x_step, lanes), most);
    auto at = [=](int64_t i)
                  __attribute__((always_inline)) { return load_lanes<V>(x + i * b.x_step, lanes); };
    auto weigh = [=](int64_t i)
                     __attribute__((always_inline)) { return V::set1(weight ? weight[i] : S(1)); };
    ColumnSums<V> exps, below, p_below, mass;
    exps.add_all(b.n,
                 [=](int64_t i) __attribute__((always_inline)) { return exp_below(at(i) - most); });
    if (smooth)
      below.add_all(
          b.n, [=](int64_t i) __attribute__((always_inline)) { return weigh(i) * (most - at(i)); });
    if (p) {
      VecF64 rest[2];
      exps.logarithms(rest);
      for (int64_t i = 0; i < b.n; i++) {
        const V t = load_lanes<V>(p + i * b.p_step, lanes);
        for (int h = 0; h < kHalves<V>; h++) {
          const VecF64 q = half_of(t, h) * half_of(weigh(i), h);
          mass.total[h] = mass.total[h] + q;
          p_below.total[h] =
              fma(q, half_of(most, h) - half_of(at(i), h) + rest[h], p_below.total[h]);
        }
      }
    }
    S tops[w];
    most.store(tops);
    double found[4][2 * VecF64::width];
    exps.store(found[0]), below.store(found[1]), p_below.store(found[2]), mass.store(found[3]);
    for (int j = 0; j < lanes; j++)
      sums[c + j] = {double(tops[j]), found[0][j], found[1][j], found[2][j], found[3][j]};
  }
}

// exp(x - lse), with lse in two parts so that the difference rounds once
template <class V>
static FASTNN_INLINE V soft(V x, Twofold<V> lse) {
  return exp_below(x - lse.high - lse.low);
}

template <class T>
static void gradient_rows(const LossBlock& b, const CrossEntropyKernels::Factors* factors,
                          void* out, int64_t, int64_t out_position) {
  using V = typename Lanes<T>::V;
  using S = typename V::T;
  const void* weight = b.weight;
  for (int64_t k = 0; k < b.positions; k++) {
    const auto& f = factors[k];
    const T* x = static_cast<const T*>(b.x) + k * b.x_position;
    T* to = static_cast<T*>(out) + k * out_position;
    const auto lse = Twofold<V>::of(f.lse);
    const V softs = V::set1(S(f.softs)), flat = V::set1(S(f.flat)), hard = V::set1(S(f.hard));
    if (b.probabilities) {
      const T* p = static_cast<const T*>(b.probabilities) + k * b.p_position;
      fill<T, V>(to, b.n, false, [=](int64_t i, int lanes) __attribute__((always_inline)) {
        const V q = weights_at<V>(weight, i, lanes) * fma(hard, load_lanes<V>(p + i, lanes), flat);
        return fma(softs, soft(load_lanes<V>(x + i, lanes), lse), neg(q));
      });
      continue;
    }
    // Before it is overwritten, where the gradient takes the place of the logits.
    const V there = f.index < 0 ? V::zero() : softs * soft(V::load_partial(x + f.index, 1), lse);
    if (f.flat != 0)
      fill<T, V>(to, b.n, false, [=](int64_t i, int lanes) __attribute__((always_inline)) {
        const V q = weights_at<V>(weight, i, lanes) * flat;
        return fma(softs, soft(load_lanes<V>(x + i, lanes), lse), neg(q));
      });
    else
      fill<T, V>(to, b.n, false, [=](int64_t i, int lanes) __attribute__((always_inline)) {
        return softs * soft(load_lanes<V>(x + i, lanes), lse);
      });
    if (f.index < 0) continue;
    const V q = weights_at<V>(weight, f.index, 1) * (flat + hard);
    (there - q).store_partial(to + f.index, 1);
  }
}

template <class T>
static void gradient_columns(const LossBlock& b, const CrossEntropyKernels::Factors* factors,
                             void* out, int64_t out_step, int64_t) {
  using V = typename Lanes<T>::V;
  using S = typename V::T;
  constexpr int w = V::width;
  const S* weight = static_cast<const S*>(b.weight);
  for (int64_t c = 0; c < b.positions; c += w) {
    const int lanes = lanes_of(b.positions, c, w);
    const T* x = static_cast<const T*>(b.x) + c;
    const T* p = static_cast<const T*>(b.probabilities) + (b.probabilities ? c : 0);
    T* to = static_cast<T*>(out) + c;
    constexpr int64_t stride = sizeof(*factors) / sizeof(double);
    const auto* f = factors + c;
    double low[w] = {};
    for (int j = 0; j < lanes; j++) {
      low[j] = f[j].lse - double(S(f[j].lse));
      if (low[j] != low[j]) low[j] = 0;
    }
    const Twofold<V> lse = {lanes_from<V>(&f->lse, stride, lanes), lanes_from<V>(low, 1, lanes)};
    const V softs = lanes_from<V>(&f->softs, stride, lanes);
    const V flat = lanes_from<V>(&f->flat, stride, lanes);
    const V hard = lanes_from<V>(&f->hard, stride, lanes);
    S there[w] = {};  // the softmax of each position's class
    if (!p)
      for (int j = 0; j < lanes; j++)
        if (f[j].index >= 0)
          V::load_partial(x + j + f[j].index * b.x_step, 1).store_partial(there + j, 1);
    const V at_index = softs * soft(V::load(there), lse);
    for (int64_t i = 0; i < b.n; i++) {
      const V weigh = V::set1(weight ? weight[i] : S(1));
      const V t = p ? fma(hard, load_lanes<V>(p + i * b.p_step, lanes), flat) : flat;
      const V s = soft(load_lanes<V>(x + i * b.x_step, lanes), lse);
      store_lanes(fma(softs, s, neg(weigh * t)), to + i * out_step, lanes);
    }
    if (p) continue;
    at_index.store(there);
    for (int j = 0; j < lanes; j++) {
      const int64_t index = f[j].index;
      if (index < 0) continue;
      const S q = (weight ? weight[index] : S(1)) * (S(f[j].flat) + S(f[j].hard));
      V::set1(there[j] - q).store_partial(to + j + index * out_step, 1);
    }
  }
}

template <class T>
static double read_number(const void* x) {
  return double(to_f32(*static_cast<const T*>(x)));
}
template <>
double read_number<double>(const void* x) {
  return *static_cast<const double*>(x);
}

#define FASTNN_LOSS(T) \
  {loss_rows<T>, loss_columns<T>, gradient_rows<T>, gradient_columns<T>, read_number<T>}
static const CrossEntropyKernels cross_entropy_table = {
    {FASTNN_LOSS(float), FASTNN_LOSS(double), FASTNN_LOSS(bf16), FASTNN_LOSS(f16)}};
#undef FASTNN_LOSS

}  // namespace fastnn::FASTNN_TARGET
