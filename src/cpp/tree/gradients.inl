// Gradients and hessians of losses, as scikit-learn's _loss has them. Included after math.hpp.
#include "tree/histogram.hpp"

namespace fastnn::FASTNN_TARGET {

// w (raw - y), w
static void squared_error(const LossRows& x, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const double w = x.weight ? x.weight[i] : 1;
    x.gradient[i] = float(w * (x.raw[i] - x.y[i]));
    if (x.hessian) x.hessian[i] = float(w);
  }
}

// With e = exp(-raw): ((1 - y) - y e) / (1 + e) and e / (1 + e)^2, which for a raw below -37 are
// exp(raw) - y and exp(raw).
static void half_binomial(const LossRows& x, int64_t n) {
  using V = VecF64;
  constexpr int w = V::width;
  const V one = V::set1(1), edge = V::set1(-37);
  for (int64_t i = 0; i < n; i += w) {
    const int some = n - i < w ? int(n - i) : w;
    const auto load = [&](const double* p) __attribute__((always_inline)) {
      return some == w ? V::load(p + i) : V::load_partial(p + i, some);
    };
    const V y = load(x.y), raw = load(x.raw);
    const auto far = le(raw, edge);
    const V e = Full::exp(select(far, raw, neg(raw)));
    const V sum = one + e;
    V g = select(far, e - y, ((one - y) - y * e) / sum);
    V h = select(far, e, e / (sum * sum));
    if (x.weight) {
      const V weight = load(x.weight);
      g = weight * g, h = weight * h;
    }
    double gradient[w], hessian[w];
    g.store(gradient), h.store(hessian);
    for (int j = 0; j < some; j++) x.gradient[i + j] = float(gradient[j]);
    if (x.hessian)
      for (int j = 0; j < some; j++) x.hessian[i + j] = float(hessian[j]);
  }
}

}  // namespace fastnn::FASTNN_TARGET
