// gelu for results that are not exact anyway, such as those of sums of rounded numbers: half the
// instructions of math.hpp's, since the left tail needs no exponential where only its absolute
// error counts. Included after FASTNN_TARGET was chosen; see isa/vec.hpp.
#pragma once
#include "isa/math.hpp"

namespace fastnn::FASTNN_TARGET {

// x times the normal distribution function, within 3e-7 |x|, of which 7.2e-9 are the fit's. Its
// coefficients are 6e-8 too large, so that the fraction is no less than a half where it ends, and
// what is left of there is 0.
FASTNN_INLINE VecF32 gelu_near(VecF32 x) {
  using V = VecF32;
  // The function less a half as x P(x^2) / Q(x^2), |x| <= 5.5; beyond, it is 0 or 1.
  const V a = max(V::set1(-5.5f), min(V::set1(5.5f), x));
  const V s = a * a;
  const V p = polynomial(s, 0.3989422619342804f, 0.03385268524289131f, 0.004677263088524342f,
                         0.00016882599447853863f, 6.35211563349003e-06f, 2.27493508475618e-08f);
  const V q = polynomial(s, 1.0f, 0.2515220046043396f, 0.028645891696214676f,
                         0.0018844465957954526f, 7.364757766481489e-05f, 1.1975032521149842e-06f);
  const V half = V::set1(0.5f);
  const V h = max(neg(half), min(half, a * p / q));
  return x * (half + h);
}

}  // namespace fastnn::FASTNN_TARGET
