// The lanes of a vector: elements of a tensor, and codes beside them.
#pragma once
#include "isa/vec.hpp"
#include "pool/pool.hpp"

namespace fastnn::FASTNN_TARGET {

// The vector in which elements of type T are computed.
template <class T>
struct Compute {
  using V = VecF32;
};
template <>
struct Compute<double> {
  using V = VecF64;
};

static FASTNN_INLINE double wide(double x) { return x; }
template <class T>
static FASTNN_INLINE float wide(T x) {
  return to_f32(x);
}

enum Mode { kMax, kMaxCodes, kSum };

constexpr float kLowest = -__builtin_inff();

template <class V, class T>
static FASTNN_INLINE V load_lanes(const T* p, int n) {
  return n == V::width ? V::load(p) : V::load_partial(p, n);
}
template <class V, class T>
static FASTNN_INLINE void store_lanes(T* p, V v, int n) {
  if (n == V::width)
    v.store(p);
  else
    v.store_partial(p, n);
}

// Whether any lane is NaN.
template <class V>
static FASTNN_INLINE bool has_nan(V v) {
#if FASTNN_TARGET_ID == 2
  return is_nan(v) != 0;
#else
  const V none = V::zero();
  return reduce_add(select(is_nan(v), V::set1(1), none)) > 0;
#endif
}

// Takes one more value. A NaN replaces whatever was there.
template <int mode, class V>
static FASTNN_INLINE void take(V& value, V& code, V v, V v_code) {
  if constexpr (mode == kSum) {
    value = value + v;
  } else if constexpr (mode == kMax) {
    value = select(is_nan(v), v, max(v, value));
  } else {
    const auto newer = either(lt(value, v), is_nan(v));
    value = select(newer, v, value);
    code = select(newer, v_code, code);
  }
}

// ---- codes: whole numbers in the lanes of a vector, bytes or int32 in memory
// ----------------------

#if FASTNN_TARGET_ID == 2
static FASTNN_INLINE void put(uint8_t* p, VecF32 v, int n) {
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v.r));
  if (n == VecF32::width)
    _mm_storeu_si128((__m128i*)p, bytes);
  else
    _mm_mask_storeu_epi8(p, VecF32::first(n), bytes);
}
static FASTNN_INLINE void put(uint8_t* p, VecF64 v, int n) {
  _mm_mask_storeu_epi8(p, VecF64::first(n), _mm256_cvtepi32_epi8(_mm512_cvtpd_epi32(v.r)));
}
static FASTNN_INLINE void put(int32_t* p, VecF32 v, int n) {
  _mm512_mask_storeu_epi32(p, VecF32::first(n), _mm512_cvtps_epi32(v.r));
}
static FASTNN_INLINE void put(int32_t* p, VecF64 v, int n) {
  _mm256_mask_storeu_epi32(p, VecF64::first(n), _mm512_cvtpd_epi32(v.r));
}
static FASTNN_INLINE void get(VecF32& v, const uint8_t* p, int n) {
  const __m128i bytes = n == VecF32::width ? _mm_loadu_si128((const __m128i*)p)
                                           : _mm_maskz_loadu_epi8(VecF32::first(n), p);
  v = {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))};
}
static FASTNN_INLINE void get(VecF64& v, const uint8_t* p, int n) {
  v = {_mm512_cvtepi32_pd(_mm256_cvtepu8_epi32(_mm_maskz_loadu_epi8(VecF64::first(n), p)))};
}
static FASTNN_INLINE void get(VecF32& v, const int32_t* p, int n) {
  v = {_mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(VecF32::first(n), p))};
}
static FASTNN_INLINE void get(VecF64& v, const int32_t* p, int n) {
  v = {_mm512_cvtepi32_pd(_mm256_maskz_loadu_epi32(VecF64::first(n), p))};
}
#else
template <class I, class V>
static FASTNN_INLINE void put(I* p, V v, int n) {
#if FASTNN_TARGET_ID == 1
  if constexpr (sizeof(I) == 1 && V::width == 8) {
    if (n == V::width) {
      const __m256i i = _mm256_cvtps_epi32(v.r);
      const __m128i w = _mm_packus_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
      _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(w, w));
      return;
    }
  }
#endif
  typename V::T lanes[V::width];
  v.store(lanes);
  for (int i = 0; i < n; i++) p[i] = I(int32_t(lanes[i]));
}
template <class I, class V>
static FASTNN_INLINE void get(V& v, const I* p, int n) {
#if FASTNN_TARGET_ID == 1
  if constexpr (sizeof(I) == 1 && V::width == 8) {
    if (n == V::width) {
      v = {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
      return;
    }
  }
#endif
  typename V::T lanes[V::width] = {};
  for (int i = 0; i < n; i++) lanes[i] = typename V::T(int32_t(p[i]));
  v = V::load(lanes);
}
#endif

template <class V>
static FASTNN_INLINE void put_codes(char* p, bool wide_codes, int64_t at, V v, int n) {
  if (wide_codes)
    put(reinterpret_cast<int32_t*>(p) + at, v, n);
  else
    put(reinterpret_cast<uint8_t*>(p) + at, v, n);
}
template <class V>
static FASTNN_INLINE V get_codes(const char* p, bool wide_codes, int64_t at, int n) {
  V v;
  if (wide_codes)
    get(v, reinterpret_cast<const int32_t*>(p) + at, n);
  else
    get(v, reinterpret_cast<const uint8_t*>(p) + at, n);
  return v;
}
// hit[u]: in which of the `n` lanes of vector u the codes that begin at `at` are `number`.
template <int vectors, class V, class Mask>
static FASTNN_INLINE void find_code(const char* p, bool wide_codes, int64_t at, int64_t number,
                                    int n, Mask* hit) {
#if FASTNN_TARGET_ID == 2
  // Bytes are compared as they are, those of all vectors at once.
  constexpr int lanes = vectors * V::width;
  if constexpr (lanes == 64 || lanes == 32) {
    if (!wide_codes) {
      uint64_t all;
      if constexpr (lanes == 64)
        all = _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(p + at), _mm512_set1_epi8(char(number)));
      else
        all = _mm256_cmpeq_epi8_mask(_mm256_loadu_si256((const __m256i*)(p + at)),
                                     _mm256_set1_epi8(char(number)));
      for (int u = 0; u < vectors; u++) hit[u] = Mask(all >> (u * V::width));
      return;
    }
  }
#endif
  const V of = V::set1(typename V::T(number));
  for (int u = 0; u < vectors; u++)
    hit[u] = eq(get_codes<V>(p, wide_codes, at + u * V::width, n), of);
}
static FASTNN_INLINE int64_t code_at(const char* p, bool wide_codes, int64_t at) {
  return wide_codes ? int64_t(reinterpret_cast<const int32_t*>(p)[at])
                    : int64_t(reinterpret_cast<const uint8_t*>(p)[at]);
}

}  // namespace fastnn::FASTNN_TARGET
