// Vectorised exp, tanh, erf, the normal distribution, and the activations made of them.
//
// Most float32 functions are evaluated in float64 lanes and rounded once: a short polynomial with
// 33 correct bits needs no compensation there, costs about as many instructions as a float32 one
// that compensates, and is within 0.51 ulp of the exact value for every float32, subnormal results
// included. sigmoid and silu have a float32 form, as accurate as torch's (2.5 ulp) and twice as
// quick. Three sets of functions share the formulas below:
//
//   Wide    float64 lanes, relative error below 2^-32: for float32 results
//   Full    float64 lanes, a few ulp of float64:       for float64 results
//   Narrow  float32 lanes, relative error below 2^-16: for bfloat16 and float16 results
//
// Coefficients are minimax or Chebyshev fits made in 45-digit arithmetic; each says its domain and
// its relative error. tests/kernels/test_math.py measures all of it.
//
// min(a, b) and max(a, b) are called with the data second, so that NaN passes through, as the x86
// instructions define it.
#pragma once
#include "common/activation.hpp"
#include "isa/vec.hpp"

namespace fastnn::FASTNN_TARGET {

// c0 + c1 x + c2 x^2 + ...
template <class V, class T>
FASTNN_INLINE V polynomial(V, T c0) {
  return V::set1(c0);
}
template <class V, class T, class... Ts>
FASTNN_INLINE V polynomial(V x, T c0, Ts... rest) {
  return fma(polynomial(x, rest...), x, V::set1(c0));
}

struct Wide {
  using V = VecF64;

  // Goes to 0 and to infinity by itself at the ends of the range that the clamp leaves.
  static FASTNN_INLINE V exp(V x) {
    x = max(V::set1(-746.0), min(V::set1(710.0), x));
    const V n = round(x * V::set1(0x1.71547652b82fep+0));  // x / ln 2
    const V r = fma(n, V::set1(-0x1.62e42fefa39efp-1), x);
    // exp(r), |r| <= ln(2)/2: 2^-34
    const V p = polynomial(r, 0.99999999995952937, 0.99999999999550548, 0.5000000107793876,
                           0.16666666786380441, 0.041666218139710595, 0.0083332835187681052,
                           0.0013948590286863383, 0.00019907582591325134);
    return ldexp(p, n);
  }

  static FASTNN_INLINE V tanh(V x) {
    // tanh(9.1) is 1 in float32. x P(x^2) / Q(x^2), |x| <= 9.1: 4.1e-11
    x = max(V::set1(-9.1), min(V::set1(9.1), x));
    const V s = x * x;
    const V p = polynomial(s, 0.99999999995906441, 0.14096302111149628, 0.0044220717070248107,
                           4.217360121499547e-05, 1.1059904541173316e-07, 3.6382604200062858e-11);
    const V q = polynomial(s, 1.0, 0.47429635399971454, 0.029187523846285295, 0.000500087674521269,
                           2.5945355952190782e-06, 2.9297392957840693e-09);
    return x * p / q;
  }

  static FASTNN_INLINE V erf(V x) {
    // erf(4) is 1 in float32. x P(x^2) / Q(x^2), |x| <= 4: 1.6e-10
    x = max(V::set1(-4.0), min(V::set1(4.0), x));
    const V s = x * x;
    const V p = polynomial(s, 1.1283791669147514, 0.3245814598200224, 0.077544601669877283,
                           0.010791631599599916, 0.00089326788913252401, 6.0978976430684413e-05,
                           1.0668800035211261e-06);
    const V q = polynomial(s, 1.0, 0.62098615434423055, 0.1757175668719371, 0.029847043126260617,
                           0.0033250299975783894, 0.00024367624092216811, 1.068759104013724e-05,
                           4.5171317674917784e-08);
    return x * p / q;
  }

  // exp(-x^2 / 2), and the standard normal distribution function, which share it.
  static FASTNN_INLINE V gauss(V x) {
    const V a = min(V::set1(40.0), abs(x));  // x is a float32, so that its square is exact
    return exp(a * a * V::set1(-0.5));
  }
  static FASTNN_INLINE V normal_cdf(V x, V gauss) {
    const V a = min(V::set1(40.0), abs(x));
    // erfc(a / sqrt 2) exp(a^2 / 2) / 2 = P(a) / Q(a), a <= 15.2: 9.4e-11; beyond, x cdf(-a) is
    // below the least float32.
    const V p = polynomial(a, 0.49999999995458899, 0.50883016184991547, 0.25172613287773299,
                           0.071798876095152536, 0.011754172627223655, 0.00090114034129908256);
    const V q = polynomial(a, 1.0, 1.815544875750976, 1.4520476258702599, 0.66035241250400289,
                           0.18223716121325498, 0.029463169383835738, 0.0022588263653691102);
    const V tail = gauss * p / q;
    return select(lt(x, V::zero()), tail, V::set1(1.0) - tail);
  }
};

struct Full {
  using V = VecF64;

  // x = n ln 2 + r, |r| <= ln(2)/2
  static FASTNN_INLINE V reduce(V x, V& n) {
    n = round(x * V::set1(0x1.71547652b82fep+0));
    const V r = fma(n, V::set1(-0x1.62e42fefa3800p-1), x);  // 42 bits: n * this is exact
    return fma(n, V::set1(-0x1.ef35793c76730p-45), r);
  }
  // exp(r) - 1 = r + r^2 q(r), q to 2^-52
  static FASTNN_INLINE V expm1_reduced(V r) {
    const V q = polynomial(r, 0.5, 0.16666666666666671, 0.041666666666666671, 0.0083333333333261358,
                           0.0013888888888883748, 0.00019841269874820627, 2.4801587325547743e-05,
                           2.7557255400206422e-06, 2.7557273643110297e-07, 2.5105217004720745e-08,
                           2.0914686968086876e-09);
    return fma(r * r, q, r);
  }
  static FASTNN_INLINE V exp(V x) {
    x = max(V::set1(-746.0), min(V::set1(710.0), x));
    V n;
    const V r = reduce(x, n);
    return ldexp(V::set1(1.0) + expm1_reduced(r), n);
  }
  // x <= 700
  static FASTNN_INLINE V expm1(V x) {
    x = max(V::set1(-746.0), x);
    V n;
    const V r = reduce(x, n);
    const V scale = ldexp(V::set1(1.0), n);
    return fma(scale, expm1_reduced(r), scale - V::set1(1.0));
  }

  // (exp(2x) - 1) / (exp(2x) + 1); tanh(20) is 1 in float64
  static FASTNN_INLINE V tanh(V x) {
    const V a = min(V::set1(20.0), abs(x));
    const V m = expm1(a + a);
    return copysign(m / (m + V::set1(2.0)), x);
  }

  // erfc(z) exp(z^2) = t p(t), t = 4 / (4 + z), 0 <= z <= 28: 2^-57
  static FASTNN_INLINE V scaled_erfc(V z) {
    const V t = V::set1(4.0) / (V::set1(4.0) + z);
    const V u = fma(t, V::set1(2.2857142857142856), V::set1(-1.2857142857142858));
    const V p = polynomial(u, 0.30782209556653278, 0.26206585456959602, 0.1934623646622928,
                           0.1233809059645678, 0.067325617361522885, 0.030854432600682116,
                           0.011461066792548035, 0.0031925482777230615, 0.00051984120630661778,
                           -3.2908502685360057e-05, -4.5406297393468493e-05,
                           -9.0075551385509632e-06, 1.614877723553382e-06, 1.0525311370781306e-06,
                           2.4157517980100303e-08, -9.3245307391061851e-08, -1.197788897552821e-08,
                           8.1787708198240961e-09, 1.6732223020043751e-09, -7.2366708571372078e-10,
                           -1.7756169201794509e-10, 4.7464381396455866e-11, 1.2034282476861792e-11);
    return t * p;
  }

  static FASTNN_INLINE V erf(V x) {
    const V a = min(V::set1(6.0), abs(x));
    const V s = a * a;
    // erf(x) / x as a polynomial in x^2, |x| <= 1: 2^-56
    const V p =
        polynomial(s, 1.1283791670955126, -0.37612638903183543, 0.11283791670945006,
                   -0.02686617064323777, 0.0052239776071164225, -0.00085483259753896918,
                   0.00012055294904839707, -1.4924736907419661e-05, 1.6447424703317362e-06,
                   -1.6208483801871705e-07, 1.3720064546777686e-08, -7.7958988270021425e-10);
    const V inside = a * p;
    const V outside = fma(exp(neg(s)), neg(scaled_erfc(a)), V::set1(1.0));
    return copysign(select(lt(a, V::set1(1.0)), inside, outside), x);
  }

  static FASTNN_INLINE V gauss(V x) {
    const V a = min(V::set1(40.0), abs(x));
    const V s = a * a;
    const V rest = fma(a, a, neg(s));  // what the square lost, which exp would magnify
    const V e = exp(s * V::set1(-0.5));
    return fma(e, rest * V::set1(-0.5), e);
  }
  static FASTNN_INLINE V normal_cdf(V x, V gauss) {
    const V z = min(V::set1(40.0), abs(x)) * V::set1(0x1.6a09e667f3bcdp-1);
    const V tail = gauss * V::set1(0.5) * scaled_erfc(z);
    return select(lt(x, V::zero()), tail, V::set1(1.0) - tail);
  }
};

struct Narrow {
  using V = VecF32;

  static FASTNN_INLINE V exp(V x) {
    x = max(V::set1(-105.0f), min(V::set1(89.0f), x));
    const V n = round(x * V::set1(0x1.715476p+0f));
    V r = fma(n, V::set1(-0x1.62e400p-1f), x);  // 15 bits: n * this is exact
    r = fma(n, V::set1(-0x1.7f7d1cp-20f), r);
    // exp(r), |r| <= ln(2)/2: 2^-23
    const V p = polynomial(r, 1.0000000755002301f, 1.00000001077804f, 0.49998868925286089f,
                           0.16666505195758111f, 0.04191755754136265f, 0.008369155667697397f);
    return ldexp(p, n);
  }

  static FASTNN_INLINE V tanh(V x) {
    // x P(x^2) / Q(x^2), |x| <= 9.1: 4.2e-7
    x = max(V::set1(-9.1f), min(V::set1(9.1f), x));
    const V s = x * x;
    const V p = polynomial(s, 0.9999995851225142f, 0.12826123576777093f, 0.002845472087677882f,
                           1.0327450965583034e-05f);
    const V q = polynomial(s, 1.0f, 0.46159147598779476f, 0.023379865894767433f,
                           0.0002239681902565986f, 2.116428894361117e-07f);
    return x * p / q;
  }

  static FASTNN_INLINE V gauss(V x) {
    const V a = min(V::set1(40.0f), abs(x));
    return exp(a * a * V::set1(-0.5f));
  }
  static FASTNN_INLINE V normal_cdf(V x, V gauss) {
    const V a = min(V::set1(40.0f), abs(x));
    // as Wide's: 4.3e-7
    const V p = polynomial(a, 0.49999979212475715f, 0.3637454609005976f, 0.12055331063487582f,
                           0.017290364846652858f);
    const V q = polynomial(a, 1.0f, 1.525354994276755f, 0.9583249612059864f, 0.3019950464214473f,
                           0.04334497940252263f);
    const V tail = gauss * p / q;
    return select(lt(x, V::zero()), tail, V::set1(1.0f) - tail);
  }
};

// 1 / (1 + exp(-x)), without overflow and with the subnormal results of the left tail
template <class M, class V>
FASTNN_INLINE V sigmoid(V x) {
  const V one = V::set1(1);
  const V e = M::exp(neg(abs(x)));
  return select(lt(x, V::zero()), e, one) / (one + e);
}

// exp(x) = 2^n times what is returned, between 1/sqrt(2) and sqrt(2), in float32: 0.9 ulp.
FASTNN_INLINE VecF32 exp_near_1(VecF32 x, VecF32& n) {
  using V = VecF32;
  n = round(x * V::set1(0x1.715476p+0f));
  V r = fma(n, V::set1(-0x1.62e400p-1f), x);  // 15 bits: n * this is exact
  r = fma(n, V::set1(-0x1.7f7d1cp-20f), r);
  // (exp(r) - 1 - r) / r^2, |r| <= ln(2)/2: 2^-32 of exp(r)
  const V q = polynomial(r, 0.500000001f, 0.166666667f, 0.0416664649f, 0.00833331093f, 0.001393365f,
                         0.000198909908f);
  return V::set1(1.0f) + fma(r * r, q, r);
}
// exp(x) of what is not above 88, as softmax needs it: subnormal results included, 0 where it is
// less. NaN stays NaN.
FASTNN_INLINE VecF32 exp_below(VecF32 x) {
  VecF32 n;
  const VecF32 near = exp_near_1(max(VecF32::set1(-105.0f), x), n);  // exp(-105) rounds to 0
  return ldexp(near, n);
}
FASTNN_INLINE VecF64 exp_below(VecF64 x) { return Full::exp(x); }

// numerator / (1 + exp(-x)) in float32: 2.5 ulp. Left of -64 both parts of the fraction are scaled
// by 2^-64, so that exp(-x) is finite wherever the result is not 0.
FASTNN_INLINE VecF32 logistic(VecF32 numerator, VecF32 x) {
  using V = VecF32;
  const V one = V::set1(1.0f);
  const auto far = lt(x, V::set1(-64.0f));
  const V scale = select(far, V::set1(0x1p-64f), one);
  const V shift = select(far, V::set1(-64.0f), V::zero());
  const V y = max(V::set1(-105.0f), min(V::set1(200.0f), neg(x)));  // exp(200) 2^-64 is infinite
  V n;
  const V near = exp_near_1(y, n);
  const V e = ldexp(near, n + shift);
  return numerator * scale / (scale + e);
}

// 2 sqrt(2 / pi) (x + 0.044715 x^3): gelu_tanh is x sigmoid of it, as (1 + tanh(z)) / 2 =
// sigmoid(2 z), which keeps the accuracy of the left tail.
template <class V>
FASTNN_INLINE V gelu_tanh_argument(V x) {
  const V c1 = V::set1(1.5957691216057308), c3 = V::set1(0.07135481627260025);
  return x * fma(x * x, c3, c1);
}
template <class V>
FASTNN_INLINE V gelu_tanh_argument_derivative(V x) {
  const V c1 = V::set1(1.5957691216057308), c3 = V::set1(3 * 0.07135481627260025);
  return fma(x * x, c3, c1);
}

// gelu, silu and gelu_tanh of -infinity are NaN, as in torch: -infinity times 0.
template <class M, int kind, class V>
FASTNN_INLINE V forward(V x) {
  if constexpr (kind == kGelu) return x * M::normal_cdf(x, M::gauss(x));
  if constexpr (kind == kGeluTanh) return x * sigmoid<M>(gelu_tanh_argument(x));
  if constexpr (kind == kSilu) return x * sigmoid<M>(x);
  if constexpr (kind == kSigmoid) return sigmoid<M>(x);
  if constexpr (kind == kTanh) return M::tanh(x);
  if constexpr (kind == kExp) return M::exp(x);
  if constexpr (kind == kErf) return M::erf(x);
  return x;
}

// The derivative in terms of x: the output for sigmoid and tanh, the input for the others.
template <class M, int kind, class V>
FASTNN_INLINE V derivative(V x) {
  const V one = V::set1(1);
  if constexpr (kind == kGelu) {
    const V g = M::gauss(x);
    const V density = g * V::set1(0.3989422804014327);  // 1 / sqrt(2 pi)
    return fma(x, density, M::normal_cdf(x, g));
  }
  if constexpr (kind == kGeluTanh) {
    const V s = sigmoid<M>(gelu_tanh_argument(x));
    const V ds = s * (one - s);
    return fma(x * ds, gelu_tanh_argument_derivative(x), s);
  }
  if constexpr (kind == kSilu) {
    const V s = sigmoid<M>(x);
    return s * fma(x, one - s, one);
  }
  if constexpr (kind == kSigmoid) return x * (one - x);
  if constexpr (kind == kTanh) return fma(neg(x), x, one);
  return one;
}

// max(x, 0) with NaN passed on
template <class V>
FASTNN_INLINE V relu(V x) {
  return max(V::zero(), x);
}

// Calls f on the two float64 halves of a float32 vector and rounds once.
template <class F>
FASTNN_INLINE VecF32 in_float64(VecF32 v, F f) {
  return narrow(f(widen_low(v)), f(widen_high(v)));
}

// NaN passes, as in relu.
template <class V>
FASTNN_INLINE V relu6(V v) {
  return min(V::set1(6), relu(v));
}

template <int kind>
FASTNN_INLINE VecF32 activate_as(VecF32 v) {
  if constexpr (kind == kNone) return v;
  if constexpr (kind == kRelu) return relu(v);
  if constexpr (kind == kRelu6) return relu6(v);
#if FASTNN_TARGET_ID > 0  // needs a fused multiply-add
  if constexpr (kind == kSilu) return logistic(v, v);
  if constexpr (kind == kSigmoid) return logistic(VecF32::set1(1.0f), v);
#endif
  return in_float64(v,
                    [](VecF64 x) __attribute__((always_inline)) { return forward<Wide, kind>(x); });
}
template <int kind>
FASTNN_INLINE VecF64 activate_as(VecF64 v) {
  if constexpr (kind == kNone) return v;
  if constexpr (kind == kRelu) return relu(v);
  if constexpr (kind == kRelu6) return relu6(v);
  return forward<Full, kind>(v);
}
// For a float32 value that will be rounded to bfloat16 or float16
template <int kind>
FASTNN_INLINE VecF32 activate_narrow_as(VecF32 v) {
  if constexpr (kind == kNone) return v;
  if constexpr (kind == kRelu) return relu(v);
  if constexpr (kind == kRelu6) return relu6(v);
  if constexpr (kind == kSilu) return logistic(v, v);
  if constexpr (kind == kSigmoid) return logistic(VecF32::set1(1.0f), v);
  return forward<Narrow, kind>(v);
}

#define FASTNN_FOR_KIND(kind, CALL) \
  switch (kind) {                   \
    case kRelu:                     \
      return CALL(kRelu);           \
    case kGelu:                     \
      return CALL(kGelu);           \
    case kGeluTanh:                 \
      return CALL(kGeluTanh);       \
    case kSilu:                     \
      return CALL(kSilu);           \
    case kSigmoid:                  \
      return CALL(kSigmoid);        \
    case kTanh:                     \
      return CALL(kTanh);           \
    case kRelu6:                    \
      return CALL(kRelu6);          \
    default:                        \
      return CALL(kNone);           \
  }

// The activation `kind` of each lane: within 0.51 ulp for float32 (silu and sigmoid 2.5), a few ulp
// for float64 (more in the left tail of gelu_tanh, where the rounding of its argument is
// magnified).
template <class V>
inline V activate(int kind, V v) {
#define FASTNN_CALL(k) activate_as<k>(v)
  FASTNN_FOR_KIND(kind, FASTNN_CALL)
#undef FASTNN_CALL
}

// The same in plain float32 arithmetic (relative error below 2^-20, in gelu's tails 2^-16): twice
// as quick, for results that are then rounded to bfloat16 or float16.
inline VecF32 activate_narrow(int kind, VecF32 v) {
#define FASTNN_CALL(k) activate_narrow_as<k>(v)
  FASTNN_FOR_KIND(kind, FASTNN_CALL)
#undef FASTNN_CALL
}
#undef FASTNN_FOR_KIND

}  // namespace fastnn::FASTNN_TARGET
