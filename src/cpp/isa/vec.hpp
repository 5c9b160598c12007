// The vector types of one instruction set, under one set of names.
//
// A kernel file defines FASTNN_TARGET as portable, avx2 or avx512 and includes this header; all of
// it then lives in namespace fastnn::FASTNN_TARGET. Nothing here may be shared between targets: an
// inline function that two files instantiate is kept once by the linker, perhaps in its AVX-512
// form, and kills an older CPU. For the same reason kernel files use no templates of std.
//
//   V::width, V::T, V::zero(), V::set1(x)
//   V::load(p), v.store(p)                      unaligned; p may be bf16* or f16* for VecF32
//   V::load_partial(p, n), v.store_partial(p, n)  first n lanes, 0 <= n <= width; the rest load as
//                                               0, and memory beyond p[n-1] is not touched
//   + - * /, fma(a,b,c) = a*b+c, max, min (the second operand where one is NaN), abs, neg, round
//   (to nearest even), sqrt, lt/le/eq/is_nan -> V::Mask, either(mask, mask), select(mask, yes, no)
//   even_odd(a, b, even, odd)                   every second element of a and b together, and back:
//   zip(even, odd, a, b)
//   stream(p, v), p aligned to the vector: a store around the caches; end_stream() after the last
#pragma once
#include "common/dtype.hpp"

#define FASTNN_INLINE inline __attribute__((always_inline))

#if FASTNN_TARGET_ID >= 1
#include <immintrin.h>
#endif

namespace fastnn::FASTNN_TARGET {

template <class To, class From>
FASTNN_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// Scalar conversions, for the portable path and the tails of the others.
FASTNN_INLINE float to_f32(float x) { return x; }
FASTNN_INLINE float to_f32(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
FASTNN_INLINE float to_f32(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, mag = x.bits & 0x7fff;
  if (mag >= 0x7c00) return bit_cast<float>(sign | 0x7f800000u | (mag & 0x3ff) << 13);
  // Exponent rebias by a multiplication, which also normalizes the denormals, exactly.
  const float magnitude = bit_cast<float>(mag << 13) * bit_cast<float>(0x77800000u);  // 2^112
  return bit_cast<float>(sign | bit_cast<uint32_t>(magnitude));
}
FASTNN_INLINE void from_f32(float& out, float x) { out = x; }
FASTNN_INLINE void from_f32(bf16& out, float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  out.bits = x != x ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
FASTNN_INLINE void from_f32(f16& out, float x) {
  const uint32_t u = bit_cast<uint32_t>(x), sign = u >> 16 & 0x8000, mag = u & 0x7fffffff;
  if (mag > 0x7f800000) {
    out.bits = uint16_t(sign | 0x7e00 | (mag >> 13 & 0x3ff));
  } else if (mag >= 0x477ff000) {  // rounds to 2^16 or more
    out.bits = uint16_t(sign | 0x7c00);
  } else if (mag < 0x38800000) {  // denormal: adding 0.5 aligns the units in the last place
    const float r = bit_cast<float>(mag) + 0.5f;
    out.bits = uint16_t(sign | (bit_cast<uint32_t>(r) - 0x3f000000u));
  } else {
    const uint32_t r = mag - 0x38000000u + 0xfff + (mag >> 13 & 1);
    out.bits = uint16_t(sign | r >> 13);
  }
}

// Any accumulator to any element of C.
template <class T>
FASTNN_INLINE void from_any(T& out, float x) {
  from_f32(out, x);
}
FASTNN_INLINE void from_any(double& out, double x) { out = x; }

#if FASTNN_TARGET_ID == 2  // ------------------------------------------------------ avx512

struct VecF32 {
  using T = float;
  using Mask = __mmask16;
  static constexpr int width = 16;
  __m512 r;
  static FASTNN_INLINE __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
  static FASTNN_INLINE VecF32 zero() { return {_mm512_setzero_ps()}; }
  static FASTNN_INLINE VecF32 set1(float x) { return {_mm512_set1_ps(x)}; }
  static FASTNN_INLINE VecF32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static FASTNN_INLINE VecF32 load_partial(const float* p, int n) {
    return {_mm512_maskz_loadu_ps(first(n), p)};
  }
  static FASTNN_INLINE VecF32 from(__m256i h, bf16) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
  }
  static FASTNN_INLINE VecF32 from(__m256i h, f16) { return {_mm512_cvtph_ps(h)}; }
  template <class H>
  static FASTNN_INLINE VecF32 load(const H* p) {
    return from(_mm256_loadu_si256((const __m256i*)p), H());
  }
  template <class H>
  static FASTNN_INLINE VecF32 load_partial(const H* p, int n) {
    return from(_mm256_maskz_loadu_epi16(first(n), p), H());
  }
  FASTNN_INLINE void store(float* p) const { _mm512_storeu_ps(p, r); }
  FASTNN_INLINE void store_partial(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), r); }
  FASTNN_INLINE __m256i to(bf16) const {
    const __m512i u = _mm512_castps_si512(r);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i q = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(r, r, _CMP_UNORD_Q);
    q = _mm512_mask_or_epi32(q, nan, u, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(q, 16));
  }
  FASTNN_INLINE __m256i to(f16) const {
    return _mm512_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  template <class H>
  FASTNN_INLINE void store(H* p) const {
    _mm256_storeu_si256((__m256i*)p, to(H()));
  }
  template <class H>
  FASTNN_INLINE void store_partial(H* p, int n) const {
    _mm256_mask_storeu_epi16(p, first(n), to(H()));
  }
};
FASTNN_INLINE VecF32 operator+(VecF32 a, VecF32 b) { return {_mm512_add_ps(a.r, b.r)}; }
FASTNN_INLINE VecF32 operator-(VecF32 a, VecF32 b) { return {_mm512_sub_ps(a.r, b.r)}; }
FASTNN_INLINE VecF32 operator*(VecF32 a, VecF32 b) { return {_mm512_mul_ps(a.r, b.r)}; }
FASTNN_INLINE VecF32 operator/(VecF32 a, VecF32 b) { return {_mm512_div_ps(a.r, b.r)}; }
FASTNN_INLINE VecF32 fma(VecF32 a, VecF32 b, VecF32 c) { return {_mm512_fmadd_ps(a.r, b.r, c.r)}; }
FASTNN_INLINE VecF32 max(VecF32 a, VecF32 b) { return {_mm512_max_ps(a.r, b.r)}; }
FASTNN_INLINE VecF32 min(VecF32 a, VecF32 b) { return {_mm512_min_ps(a.r, b.r)}; }
FASTNN_INLINE VecF32 abs(VecF32 a) { return {_mm512_abs_ps(a.r)}; }
FASTNN_INLINE VecF32 neg(VecF32 a) { return {_mm512_xor_ps(a.r, _mm512_set1_ps(-0.0f))}; }
FASTNN_INLINE VecF32 round(VecF32 a) { return {_mm512_roundscale_ps(a.r, 8)}; }
FASTNN_INLINE VecF32 sqrt(VecF32 a) { return {_mm512_sqrt_ps(a.r)}; }
FASTNN_INLINE __mmask16 lt(VecF32 a, VecF32 b) { return _mm512_cmp_ps_mask(a.r, b.r, _CMP_LT_OQ); }
FASTNN_INLINE __mmask16 le(VecF32 a, VecF32 b) { return _mm512_cmp_ps_mask(a.r, b.r, _CMP_LE_OQ); }
FASTNN_INLINE __mmask16 eq(VecF32 a, VecF32 b) { return _mm512_cmp_ps_mask(a.r, b.r, _CMP_EQ_OQ); }
FASTNN_INLINE __mmask16 is_nan(VecF32 a) { return _mm512_cmp_ps_mask(a.r, a.r, _CMP_UNORD_Q); }
FASTNN_INLINE VecF32 select(__mmask16 m, VecF32 yes, VecF32 no) {
  return {_mm512_mask_blend_ps(m, no.r, yes.r)};
}
FASTNN_INLINE float reduce_add(VecF32 a) { return _mm512_reduce_add_ps(a.r); }

struct VecF64 {
  using T = double;
  using Mask = __mmask8;
  static constexpr int width = 8;
  __m512d r;
  static FASTNN_INLINE __mmask8 first(int n) { return __mmask8((1u << n) - 1); }
  static FASTNN_INLINE VecF64 zero() { return {_mm512_setzero_pd()}; }
  static FASTNN_INLINE VecF64 set1(double x) { return {_mm512_set1_pd(x)}; }
  static FASTNN_INLINE VecF64 load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static FASTNN_INLINE VecF64 load_partial(const double* p, int n) {
    return {_mm512_maskz_loadu_pd(first(n), p)};
  }
  FASTNN_INLINE void store(double* p) const { _mm512_storeu_pd(p, r); }
  FASTNN_INLINE void store_partial(double* p, int n) const {
    _mm512_mask_storeu_pd(p, first(n), r);
  }
};
FASTNN_INLINE VecF64 operator+(VecF64 a, VecF64 b) { return {_mm512_add_pd(a.r, b.r)}; }
FASTNN_INLINE VecF64 operator-(VecF64 a, VecF64 b) { return {_mm512_sub_pd(a.r, b.r)}; }
FASTNN_INLINE VecF64 operator*(VecF64 a, VecF64 b) { return {_mm512_mul_pd(a.r, b.r)}; }
FASTNN_INLINE VecF64 operator/(VecF64 a, VecF64 b) { return {_mm512_div_pd(a.r, b.r)}; }
FASTNN_INLINE VecF64 fma(VecF64 a, VecF64 b, VecF64 c) { return {_mm512_fmadd_pd(a.r, b.r, c.r)}; }
FASTNN_INLINE VecF64 max(VecF64 a, VecF64 b) { return {_mm512_max_pd(a.r, b.r)}; }
FASTNN_INLINE VecF64 min(VecF64 a, VecF64 b) { return {_mm512_min_pd(a.r, b.r)}; }
FASTNN_INLINE VecF64 abs(VecF64 a) { return {_mm512_abs_pd(a.r)}; }
FASTNN_INLINE VecF64 neg(VecF64 a) { return {_mm512_xor_pd(a.r, _mm512_set1_pd(-0.0))}; }
FASTNN_INLINE VecF64 round(VecF64 a) { return {_mm512_roundscale_pd(a.r, 8)}; }
FASTNN_INLINE VecF64 sqrt(VecF64 a) { return {_mm512_sqrt_pd(a.r)}; }
FASTNN_INLINE __mmask8 lt(VecF64 a, VecF64 b) { return _mm512_cmp_pd_mask(a.r, b.r, _CMP_LT_OQ); }
FASTNN_INLINE __mmask8 le(VecF64 a, VecF64 b) { return _mm512_cmp_pd_mask(a.r, b.r, _CMP_LE_OQ); }
FASTNN_INLINE __mmask8 eq(VecF64 a, VecF64 b) { return _mm512_cmp_pd_mask(a.r, b.r, _CMP_EQ_OQ); }
FASTNN_INLINE __mmask8 is_nan(VecF64 a) { return _mm512_cmp_pd_mask(a.r, a.r, _CMP_UNORD_Q); }
FASTNN_INLINE VecF64 select(__mmask8 m, VecF64 yes, VecF64 no) {
  return {_mm512_mask_blend_pd(m, no.r, yes.r)};
}
FASTNN_INLINE double reduce_add(VecF64 a) { return _mm512_reduce_add_pd(a.r); }

FASTNN_INLINE __mmask16 either(__mmask16 a, __mmask16 b) { return __mmask16(a | b); }
FASTNN_INLINE void even_odd(VecF32 a, VecF32 b, VecF32& even, VecF32& odd) {
  const __m512i i = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even = {_mm512_permutex2var_ps(a.r, i, b.r)};
  odd = {_mm512_permutex2var_ps(a.r, _mm512_or_si512(i, _mm512_set1_epi32(1)), b.r)};
}
FASTNN_INLINE void zip(VecF32 even, VecF32 odd, VecF32& a, VecF32& b) {
  const __m512i i = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  a = {_mm512_permutex2var_ps(even.r, i, odd.r)};
  b = {_mm512_permutex2var_ps(even.r, _mm512_add_epi32(i, _mm512_set1_epi32(8)), odd.r)};
}
FASTNN_INLINE void even_odd(VecF64 a, VecF64 b, VecF64& even, VecF64& odd) {
  const __m512i i = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
  even = {_mm512_permutex2var_pd(a.r, i, b.r)};
  odd = {_mm512_permutex2var_pd(a.r, _mm512_or_si512(i, _mm512_set1_epi64(1)), b.r)};
}
FASTNN_INLINE void zip(VecF64 even, VecF64 odd, VecF64& a, VecF64& b) {
  const __m512i i = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  a = {_mm512_permutex2var_pd(even.r, i, odd.r)};
  b = {_mm512_permutex2var_pd(even.r, _mm512_add_epi64(i, _mm512_set1_epi64(4)), odd.r)};
}

FASTNN_INLINE void stream(float* p, VecF32 v) { _mm512_stream_ps(p, v.r); }
FASTNN_INLINE void stream(double* p, VecF64 v) { _mm512_stream_pd(p, v.r); }
template <class H>
FASTNN_INLINE void stream(H* p, VecF32 v) {
  _mm256_stream_si256((__m256i*)p, v.to(H()));
}
FASTNN_INLINE void end_stream() { _mm_sfence(); }

// For math.hpp. ldexp(a, n) = a 2^n for integral n, rounded once, through subnormals to 0 and to
// infinity. The two halves of a float32 vector in float64, and back with one rounding.
FASTNN_INLINE VecF32 ldexp(VecF32 a, VecF32 n) { return {_mm512_scalef_ps(a.r, n.r)}; }
FASTNN_INLINE VecF64 ldexp(VecF64 a, VecF64 n) { return {_mm512_scalef_pd(a.r, n.r)}; }
FASTNN_INLINE VecF64 copysign(VecF64 a, VecF64 sign) {
  const __m512d m = _mm512_set1_pd(-0.0);
  return {_mm512_or_pd(_mm512_andnot_pd(m, a.r), _mm512_and_pd(m, sign.r))};
}
FASTNN_INLINE VecF64 widen_low(VecF32 a) { return {_mm512_cvtps_pd(_mm512_castps512_ps256(a.r))}; }
FASTNN_INLINE VecF64 widen_high(VecF32 a) {
  return {_mm512_cvtps_pd(_mm512_extractf32x8_ps(a.r, 1))};
}
FASTNN_INLINE VecF32 narrow(VecF64 low, VecF64 high) {
  return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low.r)),
                             _mm512_cvtpd_ps(high.r), 1)};
}

#elif FASTNN_TARGET_ID == 1  // ---------------------------------------------------- avx2

struct VecF32 {
  using T = float;
  struct Mask {
    __m256 m;
  };
  static constexpr int width = 8;
  __m256 r;
  static FASTNN_INLINE __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static FASTNN_INLINE VecF32 zero() { return {_mm256_setzero_ps()}; }
  static FASTNN_INLINE VecF32 set1(float x) { return {_mm256_set1_ps(x)}; }
  static FASTNN_INLINE VecF32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static FASTNN_INLINE VecF32 load_partial(const float* p, int n) {
    return {_mm256_maskload_ps(p, first(n))};
  }
  static FASTNN_INLINE VecF32 from(__m128i h, bf16) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
  }
  static FASTNN_INLINE VecF32 from(__m128i h, f16) { return {_mm256_cvtph_ps(h)}; }
  template <class H>
  static FASTNN_INLINE VecF32 load(const H* p) {
    return from(_mm_loadu_si128((const __m128i*)p), H());
  }
  template <class H>
  static FASTNN_INLINE VecF32 load_partial(const H* p, int n) {
    H lanes[8] = {};
    for (int i = 0; i < n; i++) lanes[i] = p[i];
    return load(lanes);
  }
  FASTNN_INLINE void store(float* p) const { _mm256_storeu_ps(p, r); }
  FASTNN_INLINE void store_partial(float* p, int n) const { _mm256_maskstore_ps(p, first(n), r); }
  FASTNN_INLINE __m128i to(bf16) const {
    const __m256i u = _mm256_castps_si256(r);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i q = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256 nan = _mm256_cmp_ps(r, r, _CMP_UNORD_Q);
    const __m256i w = _mm256_srli_epi32(_mm256_blendv_epi8(q, quiet, _mm256_castps_si256(nan)), 16);
    const __m256i packed = _mm256_packus_epi32(w, w);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  }
  FASTNN_INLINE __m128i to(f16) const {
    return _mm256_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  template <class H>
  FASTNN_INLINE void store(H* p) const {
    _mm_storeu_si128((__m128i*)p, to(H()));
  }
  template <class H>
  FASTNN_INLINE void store_partial(H* p, int n) const {
    H lanes[8];
    store(lanes);
    for (int i = 0; i < n; i++) p[i] = lanes[i];
  }
};
FASTNN_INLINE VecF32 operator+(VecF32 a, VecF32 b) { return {_mm256_add_ps(a.r, b.r)}; }
FASTNN_INLINE VecF32 operator-(VecF32 a, VecF32 b) { return {_mm256_sub_ps(a.r, b.r)}; }
FASTNN_INLINE VecF32 operator*(VecF32 a, VecF32 b) { return {_mm256_mul_ps(a.r, b.r)}; }
FASTNN_INLINE VecF32 operator/(VecF32 a, VecF32 b) { return {_mm256_div_ps(a.r, b.r)}; }
FASTNN_INLINE VecF32 fma(VecF32 a, VecF32 b, VecF32 c) { return {_mm256_fmadd_ps(a.r, b.r, c.r)}; }
FASTNN_INLINE VecF32 max(VecF32 a, VecF32 b) { return {_mm256_max_ps(a.r, b.r)}; }
FASTNN_INLINE VecF32 min(VecF32 a, VecF32 b) { return {_mm256_min_ps(a.r, b.r)}; }
FASTNN_INLINE VecF32 abs(VecF32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.r)}; }
FASTNN_INLINE VecF32 neg(VecF32 a) { return {_mm256_xor_ps(a.r, _mm256_set1_ps(-0.0f))}; }
FASTNN_INLINE VecF32 round(VecF32 a) { return {_mm256_round_ps(a.r, 8)}; }
FASTNN_INLINE VecF32 sqrt(VecF32 a) { return {_mm256_sqrt_ps(a.r)}; }
FASTNN_INLINE VecF32::Mask lt(VecF32 a, VecF32 b) { return {_mm256_cmp_ps(a.r, b.r, _CMP_LT_OQ)}; }
FASTNN_INLINE VecF32::Mask le(VecF32 a, VecF32 b) { return {_mm256_cmp_ps(a.r, b.r, _CMP_LE_OQ)}; }
FASTNN_INLINE VecF32::Mask eq(VecF32 a, VecF32 b) { return {_mm256_cmp_ps(a.r, b.r, _CMP_EQ_OQ)}; }
FASTNN_INLINE VecF32::Mask is_nan(VecF32 a) { return {_mm256_cmp_ps(a.r, a.r, _CMP_UNORD_Q)}; }
FASTNN_INLINE VecF32 select(VecF32::Mask m, VecF32 yes, VecF32 no) {
  return {_mm256_blendv_ps(no.r, yes.r, m.m)};
}
FASTNN_INLINE float reduce_add(VecF32 a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.r), _mm256_extractf128_ps(a.r, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

struct VecF64 {
  using T = double;
  struct Mask {
    __m256d m;
  };
  static constexpr int width = 4;
  __m256d r;
  static FASTNN_INLINE __m256i first(int n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
  }
  static FASTNN_INLINE VecF64 zero() { return {_mm256_setzero_pd()}; }
  static FASTNN_INLINE VecF64 set1(double x) { return {_mm256_set1_pd(x)}; }
  static FASTNN_INLINE VecF64 load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static FASTNN_INLINE VecF64 load_partial(const double* p, int n) {
    return {_mm256_maskload_pd(p, first(n))};
  }
  FASTNN_INLINE void store(double* p) const { _mm256_storeu_pd(p, r); }
  FASTNN_INLINE void store_partial(double* p, int n) const { _mm256_maskstore_pd(p, first(n), r); }
};
FASTNN_INLINE VecF64 operator+(VecF64 a, VecF64 b) { return {_mm256_add_pd(a.r, b.r)}; }
FASTNN_INLINE VecF64 operator-(VecF64 a, VecF64 b) { return {_mm256_sub_pd(a.r, b.r)}; }
FASTNN_INLINE VecF64 operator*(VecF64 a, VecF64 b) { return {_mm256_mul_pd(a.r, b.r)}; }
FASTNN_INLINE VecF64 operator/(VecF64 a, VecF64 b) { return {_mm256_div_pd(a.r, b.r)}; }
FASTNN_INLINE VecF64 fma(VecF64 a, VecF64 b, VecF64 c) { return {_mm256_fmadd_pd(a.r, b.r, c.r)}; }
FASTNN_INLINE VecF64 max(VecF64 a, VecF64 b) { return {_mm256_max_pd(a.r, b.r)}; }
FASTNN_INLINE VecF64 min(VecF64 a, VecF64 b) { return {_mm256_min_pd(a.r, b.r)}; }
FASTNN_INLINE VecF64 abs(VecF64 a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.r)}; }
FASTNN_INLINE VecF64 neg(VecF64 a) { return {_mm256_xor_pd(a.r, _mm256_set1_pd(-0.0))}; }
FASTNN_INLINE VecF64 round(VecF64 a) { return {_mm256_round_pd(a.r, 8)}; }
FASTNN_INLINE VecF64 sqrt(VecF64 a) { return {_mm256_sqrt_pd(a.r)}; }
FASTNN_INLINE VecF64::Mask lt(VecF64 a, VecF64 b) { return {_mm256_cmp_pd(a.r, b.r, _CMP_LT_OQ)}; }
FASTNN_INLINE VecF64::Mask le(VecF64 a, VecF64 b) { return {_mm256_cmp_pd(a.r, b.r, _CMP_LE_OQ)}; }
FASTNN_INLINE VecF64::Mask eq(VecF64 a, VecF64 b) { return {_mm256_cmp_pd(a.r, b.r, _CMP_EQ_OQ)}; }
FASTNN_INLINE VecF64::Mask is_nan(VecF64 a) { return {_mm256_cmp_pd(a.r, a.r, _CMP_UNORD_Q)}; }
FASTNN_INLINE VecF64 select(VecF64::Mask m, VecF64 yes, VecF64 no) {
  return {_mm256_blendv_pd(no.r, yes.r, m.m)};
}
FASTNN_INLINE double reduce_add(VecF64 a) {
  __m128d s = _mm_add_pd(_mm256_castpd256_pd128(a.r), _mm256_extractf128_pd(a.r, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}

FASTNN_INLINE VecF32::Mask either(VecF32::Mask a, VecF32::Mask b) {
  return {_mm256_or_ps(a.m, b.m)};
}
FASTNN_INLINE VecF64::Mask either(VecF64::Mask a, VecF64::Mask b) {
  return {_mm256_or_pd(a.m, b.m)};
}
FASTNN_INLINE __m256 middle_swapped(__m256 a) {
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(a), 0xd8));
}
FASTNN_INLINE void even_odd(VecF32 a, VecF32 b, VecF32& even, VecF32& odd) {
  even = {middle_swapped(_mm256_shuffle_ps(a.r, b.r, 0x88))};
  odd = {middle_swapped(_mm256_shuffle_ps(a.r, b.r, 0xdd))};
}
FASTNN_INLINE void zip(VecF32 even, VecF32 odd, VecF32& a, VecF32& b) {
  const __m256 low = _mm256_unpacklo_ps(even.r, odd.r), high = _mm256_unpackhi_ps(even.r, odd.r);
  a = {_mm256_permute2f128_ps(low, high, 0x20)};
  b = {_mm256_permute2f128_ps(low, high, 0x31)};
}
FASTNN_INLINE void even_odd(VecF64 a, VecF64 b, VecF64& even, VecF64& odd) {
  even = {_mm256_permute4x64_pd(_mm256_unpacklo_pd(a.r, b.r), 0xd8)};
  odd = {_mm256_permute4x64_pd(_mm256_unpackhi_pd(a.r, b.r), 0xd8)};
}
FASTNN_INLINE void zip(VecF64 even, VecF64 odd, VecF64& a, VecF64& b) {
  const __m256d low = _mm256_unpacklo_pd(even.r, odd.r), high = _mm256_unpackhi_pd(even.r, odd.r);
  a = {_mm256_permute2f128_pd(low, high, 0x20)};
  b = {_mm256_permute2f128_pd(low, high, 0x31)};
}

FASTNN_INLINE void stream(float* p, VecF32 v) { _mm256_stream_ps(p, v.r); }
FASTNN_INLINE void stream(double* p, VecF64 v) { _mm256_stream_pd(p, v.r); }
template <class H>
FASTNN_INLINE void stream(H* p, VecF32 v) {
  _mm_stream_si128((__m128i*)p, v.to(H()));
}
FASTNN_INLINE void end_stream() { _mm_sfence(); }

// For math.hpp; see above. a 2^n in two steps, as 2^n alone may be out of range: the first is exact
// for a near 1 and |n| up to twice the largest exponent.
FASTNN_INLINE VecF32 ldexp(VecF32 a, VecF32 n) {
  const __m256i whole = _mm256_cvtps_epi32(n.r), half = _mm256_srai_epi32(whole, 1);
  const __m256i rest = _mm256_sub_epi32(whole, half), bias = _mm256_set1_epi32(127);
  const __m256i s = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i t = _mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23);
  return {_mm256_mul_ps(_mm256_mul_ps(a.r, _mm256_castsi256_ps(s)), _mm256_castsi256_ps(t))};
}
FASTNN_INLINE VecF64 ldexp(VecF64 a, VecF64 n) {
  // Adding 1.5 2^52 leaves an integer in the low bits; the exponent's bias comes with it.
  const __m256d magic = _mm256_set1_pd(0x1.8p52 + 1023);
  const __m256d half = _mm256_round_pd(_mm256_mul_pd(n.r, _mm256_set1_pd(0.5)), 8);
  const __m256d rest = _mm256_sub_pd(n.r, half);
  const __m256i s = _mm256_slli_epi64(_mm256_castpd_si256(_mm256_add_pd(half, magic)), 52);
  const __m256i t = _mm256_slli_epi64(_mm256_castpd_si256(_mm256_add_pd(rest, magic)), 52);
  return {_mm256_mul_pd(_mm256_mul_pd(a.r, _mm256_castsi256_pd(s)), _mm256_castsi256_pd(t))};
}
FASTNN_INLINE VecF64 copysign(VecF64 a, VecF64 sign) {
  const __m256d m = _mm256_set1_pd(-0.0);
  return {_mm256_or_pd(_mm256_andnot_pd(m, a.r), _mm256_and_pd(m, sign.r))};
}
FASTNN_INLINE VecF64 widen_low(VecF32 a) { return {_mm256_cvtps_pd(_mm256_castps256_ps128(a.r))}; }
FASTNN_INLINE VecF64 widen_high(VecF32 a) {
  return {_mm256_cvtps_pd(_mm256_extractf128_ps(a.r, 1))};
}
FASTNN_INLINE VecF32 narrow(VecF64 low, VecF64 high) {
  return {_mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(low.r)),
                               _mm256_cvtpd_ps(high.r), 1)};
}

#else  // -------------------------------------------------------------------------- portable

// GCC and clang lower these to whatever the baseline of the target has (SSE2, NEON, ...).
#include "isa/portable_lanes.inl"

template <class Scalar, class Int, int Width>
struct PortableVec {
  using T = Scalar;
  typedef Scalar Lanes __attribute__((vector_size(Width * sizeof(Scalar))));
  typedef Int Bits __attribute__((vector_size(Width * sizeof(Scalar))));
  struct Mask {
    Bits m;  // all ones where true
  };
  static constexpr int width = Width;
  Lanes r;
  static FASTNN_INLINE PortableVec zero() { return {Lanes{}}; }
  static FASTNN_INLINE PortableVec set1(T x) { return {x - Lanes{}}; }
  static FASTNN_INLINE PortableVec load(const T* p) {
    PortableVec v;
    __builtin_memcpy(&v.r, p, sizeof(v.r));
    return v;
  }
  static FASTNN_INLINE PortableVec load_partial(const T* p, int n) {
    PortableVec v = zero();
    for (int i = 0; i < n; i++) v.r[i] = p[i];
    return v;
  }
  template <class H>
  static FASTNN_INLINE PortableVec load(const H* p) {
    return load_partial(p, Width);
  }
  template <class H>
  static FASTNN_INLINE PortableVec load_partial(const H* p, int n) {
    return {to_floats(load_halves(p, n), H())};
  }
  FASTNN_INLINE void store(T* p) const { __builtin_memcpy(p, &r, sizeof(r)); }
  FASTNN_INLINE void store_partial(T* p, int n) const {
    for (int i = 0; i < n; i++) p[i] = r[i];
  }
  template <class H>
  FASTNN_INLINE void store(H* p) const {
    store_partial(p, Width);
  }
  template <class H>
  FASTNN_INLINE void store_partial(H* p, int n) const {
    store_halves(p, from_floats(r, H()), n);
  }
  friend FASTNN_INLINE PortableVec operator+(PortableVec a, PortableVec b) { return {a.r + b.r}; }
  friend FASTNN_INLINE PortableVec operator-(PortableVec a, PortableVec b) { return {a.r - b.r}; }
  friend FASTNN_INLINE PortableVec operator*(PortableVec a, PortableVec b) { return {a.r * b.r}; }
  friend FASTNN_INLINE PortableVec operator/(PortableVec a, PortableVec b) { return {a.r / b.r}; }
  // Two roundings: the baseline has no fused form, and a software one is 50 times slower.
  friend FASTNN_INLINE PortableVec fma(PortableVec a, PortableVec b, PortableVec c) {
    return {a.r * b.r + c.r};
  }
  friend FASTNN_INLINE PortableVec select(Mask m, PortableVec yes, PortableVec no) {
    return {bit_cast<Lanes>((m.m & bit_cast<Bits>(yes.r)) | (~m.m & bit_cast<Bits>(no.r)))};
  }
  friend FASTNN_INLINE Mask lt(PortableVec a, PortableVec b) { return {Bits(a.r < b.r)}; }
  friend FASTNN_INLINE Mask le(PortableVec a, PortableVec b) { return {Bits(a.r <= b.r)}; }
  friend FASTNN_INLINE Mask eq(PortableVec a, PortableVec b) { return {Bits(a.r == b.r)}; }
  friend FASTNN_INLINE Mask is_nan(PortableVec a) { return {Bits(a.r != a.r)}; }
  friend FASTNN_INLINE Mask either(Mask a, Mask b) { return {a.m | b.m}; }
  friend FASTNN_INLINE void even_odd(PortableVec a, PortableVec b, PortableVec& even,
                                     PortableVec& odd) {
    for (int i = 0; i < Width; i++) {
      even.r[i] = 2 * i < Width ? a.r[2 * i] : b.r[2 * i - Width];
      odd.r[i] = 2 * i < Width ? a.r[2 * i + 1] : b.r[2 * i + 1 - Width];
    }
  }
  friend FASTNN_INLINE void zip(PortableVec even, PortableVec odd, PortableVec& a, PortableVec& b) {
    for (int i = 0; i < Width; i++) {
      a.r[i] = i % 2 ? odd.r[i / 2] : even.r[i / 2];
      b.r[i] = i % 2 ? odd.r[(i + Width) / 2] : even.r[(i + Width) / 2];
    }
  }
  friend FASTNN_INLINE PortableVec max(PortableVec a, PortableVec b) {
    return select(lt(b, a), a, b);
  }
  friend FASTNN_INLINE PortableVec min(PortableVec a, PortableVec b) {
    return select(lt(a, b), a, b);
  }
  friend FASTNN_INLINE PortableVec neg(PortableVec a) { return {-a.r}; }
  friend FASTNN_INLINE PortableVec abs(PortableVec a) {
    return {bit_cast<Lanes>(bit_cast<Bits>(a.r) & ~bit_cast<Bits>(set1(T(-0.0)).r))};
  }
  friend FASTNN_INLINE PortableVec round(PortableVec a) {
    // From `least` on there are no fractions, and none is left where it was added.
    const PortableVec least = set1(sizeof(T) == 4 ? T(0x1p23) : T(0x1p52)), size = abs(a);
    const Bits sign = bit_cast<Bits>(a.r) & bit_cast<Bits>(set1(T(-0.0)).r);
    const Lanes whole = (size.r + least.r) - least.r;
    return select(lt(size, least), {bit_cast<Lanes>(bit_cast<Bits>(whole) | sign)}, a);
  }
  friend FASTNN_INLINE PortableVec sqrt(PortableVec a) {
    PortableVec v;
    for (int i = 0; i < Width; i++) v.r[i] = T(__builtin_sqrt(a.r[i]));
    return v;
  }
  friend FASTNN_INLINE T reduce_add(PortableVec a) {
    T s = 0;
    for (int i = 0; i < Width; i++) s += a.r[i];
    return s;
  }
};
using VecF32 = PortableVec<float, int32_t, 4>;
using VecF64 = PortableVec<double, int64_t, 2>;

template <class T, class V>
FASTNN_INLINE void stream(T* p, V v) {
  v.store(p);
}
FASTNN_INLINE void end_stream() {}

// For math.hpp; see above. NaN in n gives something arbitrary times a, which is NaN then as well.
FASTNN_INLINE VecF32 ldexp(VecF32 a, VecF32 n) {
  VecF32 v;
  for (int i = 0; i < VecF32::width; i++) {
    const int whole = n.r[i] == n.r[i] ? int(n.r[i]) : 0, half = whole >> 1;
    v.r[i] =
        a.r[i] * bit_cast<float>((half + 127) << 23) * bit_cast<float>((whole - half + 127) << 23);
  }
  return v;
}
FASTNN_INLINE VecF64 ldexp(VecF64 a, VecF64 n) {
  VecF64 v;
  for (int i = 0; i < VecF64::width; i++) {
    const int whole = n.r[i] == n.r[i] ? int(n.r[i]) : 0, half = whole >> 1;
    v.r[i] = a.r[i] * bit_cast<double>(int64_t(half + 1023) << 52) *
             bit_cast<double>(int64_t(whole - half + 1023) << 52);
  }
  return v;
}
FASTNN_INLINE VecF64 copysign(VecF64 a, VecF64 sign) {
  const VecF64::Bits m = bit_cast<VecF64::Bits>(VecF64::set1(-0.0).r);
  return {bit_cast<VecF64::Lanes>((bit_cast<VecF64::Bits>(a.r) & ~m) |
                                  (bit_cast<VecF64::Bits>(sign.r) & m))};
}
FASTNN_INLINE VecF64 widen_low(VecF32 a) { return {VecF64::Lanes{a.r[0], a.r[1]}}; }
FASTNN_INLINE VecF64 widen_high(VecF32 a) { return {VecF64::Lanes{a.r[2], a.r[3]}}; }
FASTNN_INLINE VecF32 narrow(VecF64 low, VecF64 high) {
  return {VecF32::Lanes{float(low.r[0]), float(low.r[1]), float(high.r[0]), float(high.r[1])}};
}

#endif

}  // namespace fastnn::FASTNN_TARGET
