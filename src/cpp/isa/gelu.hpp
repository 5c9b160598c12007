// gelu for results that are not exact anyway, such as those of sums of rounded numbers: without the
// float64 arithmetic of math.hpp's, which is rounded once. Included after FASTNN_TARGET was chosen;
// see isa/vec.hpp.
#pragma once
#include "isa/math.hpp"

namespace fastnn::FASTNN_TARGET {

#if FASTNN_TARGET_ID == 2

// The standard normal distribution function in 32 intervals of `width` about `width` (i - 16), in
// each a polynomial of the distance from its middle: coefficient k of interval i is [k][i]. They
// are those of the least relative error, which is below 6e-9 from -3 on and 4e-5 at the left end,
// but that the last interval's first is 1, which the function is from there on.
struct NormalTable {
  static constexpr float width = 0.359375f;  // a float32 with room for the distance to be exact
  static constexpr float low = -5.9f, high = 5.55f;
  // clang-format off
  alignas(64) static constexpr float of[6][32] = {
    {4.462271e-09f, 3.51070675e-08f, 2.43648572e-07f, 1.49232233e-06f, 8.07097331e-06f, 3.8568629e-05f, 0.00016297643f,
     0.000609546492f, 0.00202013738f, 0.0059410762f, 0.0155320736f, 0.0361777321f, 0.0752879828f, 0.140488997f,
     0.236147493f, 0.359657288f, 0.5f, 0.640342712f, 0.763852537f, 0.859511018f, 0.924712002f,
     0.963822246f, 0.984467924f, 0.994058907f, 0.997979879f, 0.999390483f, 0.999837041f, 0.999961436f,
     0.999991953f, 0.99999851f, 0.999999762f, 1.0f},
    {2.63885127e-08f, 1.95353493e-07f, 1.27095939e-06f, 7.26687949e-06f, 3.65149972e-05f, 0.000161251082f, 0.000625810586f,
     0.00213448261f, 0.0063981195f, 0.01685475f, 0.0390213951f, 0.0793951303f, 0.141969696f, 0.223104432f,
     0.308128178f, 0.373994648f, 0.398942262f, 0.373994678f, 0.308128208f, 0.223104447f, 0.141969696f,
     0.0793951154f, 0.0390213802f, 0.0168547425f, 0.0063981195f, 0.0021344861f, 0.000625813729f, 0.000161252974f,
     3.65158521e-05f, 7.26718736e-06f, 1.27105022e-06f, 1.95375847e-07f},
    {7.58005925e-08f, 5.26186511e-07f, 3.19568198e-06f, 1.69690957e-05f, 7.87174213e-05f, 0.000318678649f, 0.00112442172f,
     0.00345176319f, 0.00919729285f, 0.0212003812f, 0.0420705751f, 0.0713323131f, 0.102040932f, 0.120266318f,
     0.110731781f, 0.0672006831f, 3.16266413e-09f, -0.0672006756f, -0.110731766f, -0.120266311f, -0.102040946f,
     -0.0713323429f, -0.0420706011f, -0.0212003924f, -0.00919729006f, -0.00345175364f, -0.00112441252f, -0.000318672712f,
     -7.87145618e-05f, -1.69679897e-05f, -3.19533297e-06f, -5.26094823e-07f},
    {1.41504714e-07f, 9.15936766e-07f, 5.15992451e-06f, 2.52569789e-05f, 0.000107190055f, 0.000393322203f, 0.00124313508f,
     0.00336624053f, 0.00774790673f, 0.0149674853f, 0.02373261f, 0.029490035f, 0.0252316315f, 0.00603756867f,
     -0.0248224922f, -0.0542795956f, -0.0664892569f, -0.054282289f, -0.024825925f, 0.00603568368f, 0.0252321493f,
     0.0294920299f, 0.0237345062f, 0.0149683747f, 0.00774786901f, 0.00336581538f, 0.00124273216f, 0.000393079536f,
     0.000107080057f, 2.52172049e-05f, 5.14812155e-06f, 9.13014617e-07f},
    {1.97501308e-07f, 1.1813994e-06f, 6.10928691e-06f, 2.72255093e-05f, 0.000104112878f, 0.00033961967f, 0.000936793513f,
     0.00215510535f, 0.00403642748f, 0.00585699314f, 0.00572757842f, 0.00129508914f, -0.00795717817f, -0.0183412973f,
     -0.0227668937f, -0.0159541145f, -1.27818936e-07f, 0.0159537476f, 0.0227663964f, 0.0183410421f, 0.00795750692f,
     -0.00129427097f, -0.00572677422f, -0.00585661316f, -0.00403648941f, -0.00215540337f, -0.000937083038f, -0.000339804887f,
     -0.000104202583f, -2.72601665e-05f, -6.12025224e-06f, -1.18428716e-06f},
    {1.89142554e-07f, 1.05474669e-06f, 5.03755427e-06f, 2.0489666e-05f, 7.03996411e-05f, 0.000201826013f, 0.000473016873f,
     0.00087167928f, 0.00114932982f, 0.000718582305f, -0.00103461568f, -0.00387953571f, -0.0060141352f, -0.00486395042f,
     0.000381714519f, 0.00689893542f, 0.00990531035f, 0.00696567027f, 0.000466805184f, -0.00481721247f, -0.00602710992f,
     -0.00392916659f, -0.00108179974f, 0.000696420029f, 0.00115033519f, 0.000882348802f, 0.000483135402f, 0.000207932258f,
     7.31739929e-05f, 2.14954671e-05f, 5.33689263e-06f, 1.12908674e-06f}};
  // clang-format on
};

// x times the normal distribution function: 1.8 ulp where x > 0, within 2.5e-5 of the result where
// x > -5.5, and nothing beyond, where it is below 2e-8 of x. (In float32 torch's is 5 ulp off on
// the right, and on the left by 3e-7 of x: by a third of the result at -5.)
FASTNN_INLINE VecF32 gelu_near(VecF32 x) {
  using V = VecF32;
  const V a = max(V::set1(NormalTable::low), min(V::set1(NormalTable::high), x));
  // The nearest integer to a / width, plus 16, in the last bits of a float32 of this size.
  const V size = V::set1(0x1.8p23f + 16);
  const V shifted = fma(a, V::set1(1 / NormalTable::width), size);
  const V distance = fma(shifted - size, V::set1(-NormalTable::width), a);
  const __m512i interval = _mm512_castps_si512(shifted.r);
  auto coefficient = [&](int k) __attribute__((always_inline)) {
    const float* from = NormalTable::of[k];
    return V{_mm512_permutex2var_ps(_mm512_load_ps(from), interval, _mm512_load_ps(from + 16))};
  };
  V p = coefficient(5);
  for (int k = 4; k > 0; k--) p = fma(p, distance, coefficient(k));
  // -infinity times 0 is NaN, as in torch.
  const __mmask16 inside = _mm512_cmp_ps_mask(x.r, _mm512_set1_ps(NormalTable::low), _CMP_GE_OQ);
  return x * V{_mm512_maskz_fmadd_ps(inside, p.r, distance.r, coefficient(0).r)};
}

#else

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

#endif

// gelu of a sum of rounded numbers, for a result that is rounded to 16 bits, or is not.
template <bool narrow>
FASTNN_INLINE VecF32 gelu_of_sum(VecF32 x) {
#if FASTNN_TARGET_ID == 2
  return gelu_near(x);
#else
  return narrow ? activate_narrow_as<kGelu>(x) : activate_as<kGelu>(x);
#endif
}

}  // namespace fastnn::FASTNN_TARGET
