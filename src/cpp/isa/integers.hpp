// Integers in lanes beside those of VecF32, and bytes made of them and taken apart. Included after
// FASTNN_TARGET was chosen; see isa/vec.hpp.
//
//   VecI32: as many lanes as VecF32. set1(x), load(p) of 32 bits each, load_partial(p, n) (the rest
//           are 0), + - * & |, max (signed),
//           shift_left<n>, shift_right<n> (zeros come in), select(VecF32::Mask, yes, no)
//   to_int(v)             rounds to nearest even; v within 32 bits
//   to_float(i), bits_of(v), float_of(i)   conversion; and the same bits as the other type
//   load_s8(p), load_u8(p), load_s8_partial(p, n), load_u8_partial(p, n)   bytes, widened
//   Bytes: four vectors' lanes. pack_s8(a, b, c, d), pack_u8 saturate; store(p), store_partial(p,
//   n) stream(p, bytes), p aligned to them; end_stream() after the last store_nibbles(p, bytes) the
//   lower halves, two a byte, the first in the low half load_nibbles(p)           Bytes from half
//   as many, 0 to 15
#pragma once
#include "isa/vec.hpp"

namespace fastnn::FASTNN_TARGET {

#if FASTNN_TARGET_ID == 2

struct VecI32 {
  static constexpr int width = 16;
  __m512i r;
  static FASTNN_INLINE VecI32 set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
  static FASTNN_INLINE VecI32 load(const void* p) { return {_mm512_loadu_si512(p)}; }
  static FASTNN_INLINE VecI32 load_partial(const void* p, int n) {
    return {_mm512_maskz_loadu_epi32(VecF32::first(n), p)};
  }
};
FASTNN_INLINE VecI32 operator+(VecI32 a, VecI32 b) { return {_mm512_add_epi32(a.r, b.r)}; }
FASTNN_INLINE VecI32 operator-(VecI32 a, VecI32 b) { return {_mm512_sub_epi32(a.r, b.r)}; }
FASTNN_INLINE VecI32 operator*(VecI32 a, VecI32 b) { return {_mm512_mullo_epi32(a.r, b.r)}; }
FASTNN_INLINE VecI32 operator&(VecI32 a, VecI32 b) { return {_mm512_and_si512(a.r, b.r)}; }
FASTNN_INLINE VecI32 operator|(VecI32 a, VecI32 b) { return {_mm512_or_si512(a.r, b.r)}; }
FASTNN_INLINE VecI32 max(VecI32 a, VecI32 b) { return {_mm512_max_epi32(a.r, b.r)}; }
template <int n>
FASTNN_INLINE VecI32 shift_left(VecI32 a) {
  return {_mm512_slli_epi32(a.r, n)};
}
template <int n>
FASTNN_INLINE VecI32 shift_right(VecI32 a) {
  return {_mm512_srli_epi32(a.r, n)};
}
FASTNN_INLINE VecI32 select(__mmask16 m, VecI32 yes, VecI32 no) {
  return {_mm512_mask_blend_epi32(m, no.r, yes.r)};
}
FASTNN_INLINE VecI32 to_int(VecF32 a) { return {_mm512_cvtps_epi32(a.r)}; }
FASTNN_INLINE VecF32 to_float(VecI32 a) { return {_mm512_cvtepi32_ps(a.r)}; }
FASTNN_INLINE VecI32 bits_of(VecF32 a) { return {_mm512_castps_si512(a.r)}; }
FASTNN_INLINE VecF32 float_of(VecI32 a) { return {_mm512_castsi512_ps(a.r)}; }
FASTNN_INLINE VecI32 load_s8(const void* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))};
}
FASTNN_INLINE VecI32 load_u8(const void* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))};
}
FASTNN_INLINE VecI32 load_s8_partial(const void* p, int n) {
  return {_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(VecF32::first(n), p))};
}
FASTNN_INLINE VecI32 load_u8_partial(const void* p, int n) {
  return {_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(VecF32::first(n), p))};
}

struct Bytes {
  static constexpr int count = 64;
  __m512i r;
  FASTNN_INLINE void store(uint8_t* p) const { _mm512_storeu_si512(p, r); }
  FASTNN_INLINE void store_partial(uint8_t* p, int n) const {
    _mm512_mask_storeu_epi8(p, n < 64 ? (__mmask64(1) << n) - 1 : ~__mmask64(0), r);
  }
};
// What the packing instructions leave in each quarter is a quarter of every operand.
FASTNN_INLINE __m512i in_order(__m512i quarters) {
  const __m512i i = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(i, quarters);
}
FASTNN_INLINE Bytes pack_s8(VecI32 a, VecI32 b, VecI32 c, VecI32 d) {
  return {in_order(_mm512_packs_epi16(_mm512_packs_epi32(a.r, b.r), _mm512_packs_epi32(c.r, d.r)))};
}
FASTNN_INLINE Bytes pack_u8(VecI32 a, VecI32 b, VecI32 c, VecI32 d) {
  return {
      in_order(_mm512_packus_epi16(_mm512_packs_epi32(a.r, b.r), _mm512_packs_epi32(c.r, d.r)))};
}
FASTNN_INLINE void stream(uint8_t* p, Bytes b) { _mm512_stream_si512((__m512i*)p, b.r); }
FASTNN_INLINE void store_nibbles(uint8_t* p, Bytes b) {
  const __m512i low = _mm512_and_si512(b.r, _mm512_set1_epi8(15));
  const __m512i pairs = _mm512_maddubs_epi16(low, _mm512_set1_epi16(16 << 8 | 1));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi16_epi8(pairs));
}
FASTNN_INLINE Bytes load_nibbles(const uint8_t* p) {
  const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
  const __m512i both = _mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4));
  return {_mm512_and_si512(both, _mm512_set1_epi8(15))};
}

#elif FASTNN_TARGET_ID == 1

struct VecI32 {
  static constexpr int width = 8;
  __m256i r;
  static FASTNN_INLINE VecI32 set1(int32_t x) { return {_mm256_set1_epi32(x)}; }
  static FASTNN_INLINE VecI32 load(const void* p) {
    return {_mm256_loadu_si256((const __m256i*)p)};
  }
  static FASTNN_INLINE VecI32 load_partial(const void* p, int n) {
    return {_mm256_maskload_epi32((const int*)p, VecF32::first(n))};
  }
};
FASTNN_INLINE VecI32 operator+(VecI32 a, VecI32 b) { return {_mm256_add_epi32(a.r, b.r)}; }
FASTNN_INLINE VecI32 operator-(VecI32 a, VecI32 b) { return {_mm256_sub_epi32(a.r, b.r)}; }
FASTNN_INLINE VecI32 operator*(VecI32 a, VecI32 b) { return {_mm256_mullo_epi32(a.r, b.r)}; }
FASTNN_INLINE VecI32 operator&(VecI32 a, VecI32 b) { return {_mm256_and_si256(a.r, b.r)}; }
FASTNN_INLINE VecI32 operator|(VecI32 a, VecI32 b) { return {_mm256_or_si256(a.r, b.r)}; }
FASTNN_INLINE VecI32 max(VecI32 a, VecI32 b) { return {_mm256_max_epi32(a.r, b.r)}; }
template <int n>
FASTNN_INLINE VecI32 shift_left(VecI32 a) {
  return {_mm256_slli_epi32(a.r, n)};
}
template <int n>
FASTNN_INLINE VecI32 shift_right(VecI32 a) {
  return {_mm256_srli_epi32(a.r, n)};
}
FASTNN_INLINE VecI32 select(VecF32::Mask m, VecI32 yes, VecI32 no) {
  return {_mm256_blendv_epi8(no.r, yes.r, _mm256_castps_si256(m.m))};
}
FASTNN_INLINE VecI32 to_int(VecF32 a) { return {_mm256_cvtps_epi32(a.r)}; }
FASTNN_INLINE VecF32 to_float(VecI32 a) { return {_mm256_cvtepi32_ps(a.r)}; }
FASTNN_INLINE VecI32 bits_of(VecF32 a) { return {_mm256_castps_si256(a.r)}; }
FASTNN_INLINE VecF32 float_of(VecI32 a) { return {_mm256_castsi256_ps(a.r)}; }
FASTNN_INLINE __m128i eight_bytes(const void* p) { return _mm_loadl_epi64((const __m128i*)p); }
FASTNN_INLINE __m128i some_bytes(const void* p, int n) {
  uint64_t bytes = 0;
  for (int i = 0; i < n; i++) bytes |= uint64_t(((const uint8_t*)p)[i]) << 8 * i;
  return _mm_cvtsi64_si128(int64_t(bytes));
}
FASTNN_INLINE VecI32 load_s8(const void* p) { return {_mm256_cvtepi8_epi32(eight_bytes(p))}; }
FASTNN_INLINE VecI32 load_u8(const void* p) { return {_mm256_cvtepu8_epi32(eight_bytes(p))}; }
FASTNN_INLINE VecI32 load_s8_partial(const void* p, int n) {
  return {_mm256_cvtepi8_epi32(some_bytes(p, n))};
}
FASTNN_INLINE VecI32 load_u8_partial(const void* p, int n) {
  return {_mm256_cvtepu8_epi32(some_bytes(p, n))};
}

struct Bytes {
  static constexpr int count = 32;
  __m256i r;
  FASTNN_INLINE void store(uint8_t* p) const { _mm256_storeu_si256((__m256i*)p, r); }
  FASTNN_INLINE void store_partial(uint8_t* p, int n) const {
    uint8_t bytes[32];
    store(bytes);
    for (int i = 0; i < n; i++) p[i] = bytes[i];
  }
};
// What the packing instructions leave in each half is a half of every operand.
FASTNN_INLINE __m256i in_order(__m256i halves) {
  return _mm256_permutevar8x32_epi32(halves, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
FASTNN_INLINE Bytes pack_s8(VecI32 a, VecI32 b, VecI32 c, VecI32 d) {
  return {in_order(_mm256_packs_epi16(_mm256_packs_epi32(a.r, b.r), _mm256_packs_epi32(c.r, d.r)))};
}
FASTNN_INLINE Bytes pack_u8(VecI32 a, VecI32 b, VecI32 c, VecI32 d) {
  return {
      in_order(_mm256_packus_epi16(_mm256_packs_epi32(a.r, b.r), _mm256_packs_epi32(c.r, d.r)))};
}
FASTNN_INLINE void stream(uint8_t* p, Bytes b) { _mm256_stream_si256((__m256i*)p, b.r); }
FASTNN_INLINE void store_nibbles(uint8_t* p, Bytes b) {
  const __m256i low = _mm256_and_si256(b.r, _mm256_set1_epi8(15));
  const __m256i pairs = _mm256_maddubs_epi16(low, _mm256_set1_epi16(16 << 8 | 1));
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(halves));
}
FASTNN_INLINE Bytes load_nibbles(const uint8_t* p) {
  const __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
  const __m256i both = _mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4));
  return {_mm256_and_si256(both, _mm256_set1_epi8(15))};
}

#else

struct VecI32 {
  typedef int32_t Lanes __attribute__((vector_size(16)));
  typedef uint32_t Unsigned __attribute__((vector_size(16)));
  static constexpr int width = 4;
  Lanes r;
  static FASTNN_INLINE VecI32 set1(int32_t x) { return {x - Lanes{}}; }
  static FASTNN_INLINE VecI32 load(const void* p) {
    VecI32 v;
    __builtin_memcpy(&v.r, p, sizeof(v.r));
    return v;
  }
  static FASTNN_INLINE VecI32 load_partial(const void* p, int n) {
    VecI32 v = set1(0);
    for (int i = 0; i < n; i++) v.r[i] = ((const int32_t*)p)[i];
    return v;
  }
};
// Sums and products may wrap, as they do in the instructions of the others.
FASTNN_INLINE VecI32 operator+(VecI32 a, VecI32 b) {
  return {VecI32::Lanes(VecI32::Unsigned(a.r) + VecI32::Unsigned(b.r))};
}
FASTNN_INLINE VecI32 operator-(VecI32 a, VecI32 b) {
  return {VecI32::Lanes(VecI32::Unsigned(a.r) - VecI32::Unsigned(b.r))};
}
FASTNN_INLINE VecI32 operator*(VecI32 a, VecI32 b) {
  return {VecI32::Lanes(VecI32::Unsigned(a.r) * VecI32::Unsigned(b.r))};
}
FASTNN_INLINE VecI32 operator&(VecI32 a, VecI32 b) { return {a.r & b.r}; }
FASTNN_INLINE VecI32 operator|(VecI32 a, VecI32 b) { return {a.r | b.r}; }
FASTNN_INLINE VecI32 max(VecI32 a, VecI32 b) {
  const VecI32::Lanes more = a.r > b.r;
  return {(a.r & more) | (b.r & ~more)};
}
template <int n>
FASTNN_INLINE VecI32 shift_left(VecI32 a) {
  return {VecI32::Lanes(VecI32::Unsigned(a.r) << n)};
}
template <int n>
FASTNN_INLINE VecI32 shift_right(VecI32 a) {
  return {VecI32::Lanes(VecI32::Unsigned(a.r) >> n)};
}
FASTNN_INLINE VecI32 select(VecF32::Mask m, VecI32 yes, VecI32 no) {
  return {(m.m & yes.r) | (~m.m & no.r)};
}
FASTNN_INLINE VecI32 to_int(VecF32 a) {
  VecI32 v;
  for (int i = 0; i < VecI32::width; i++) {
    const float whole = __builtin_nearbyintf(a.r[i]);
    // Of what does not fit, the instructions make the least integer.
    v.r[i] = whole >= -0x1p31f && whole < 0x1p31f ? int32_t(whole) : INT32_MIN;
  }
  return v;
}
FASTNN_INLINE VecF32 to_float(VecI32 a) {
  VecF32 v;
  for (int i = 0; i < VecI32::width; i++) v.r[i] = float(a.r[i]);
  return v;
}
FASTNN_INLINE VecI32 bits_of(VecF32 a) { return {bit_cast<VecI32::Lanes>(a.r)}; }
FASTNN_INLINE VecF32 float_of(VecI32 a) { return {bit_cast<VecF32::Lanes>(a.r)}; }
FASTNN_INLINE VecI32 load_s8_partial(const void* p, int n) {
  VecI32 v = VecI32::set1(0);
  for (int i = 0; i < n; i++) v.r[i] = ((const int8_t*)p)[i];
  return v;
}
FASTNN_INLINE VecI32 load_u8_partial(const void* p, int n) {
  VecI32 v = VecI32::set1(0);
  for (int i = 0; i < n; i++) v.r[i] = ((const uint8_t*)p)[i];
  return v;
}
FASTNN_INLINE VecI32 load_s8(const void* p) { return load_s8_partial(p, VecI32::width); }
FASTNN_INLINE VecI32 load_u8(const void* p) { return load_u8_partial(p, VecI32::width); }

struct Bytes {
  static constexpr int count = 16;
  uint8_t r[16];
  FASTNN_INLINE void store(uint8_t* p) const { __builtin_memcpy(p, r, 16); }
  FASTNN_INLINE void store_partial(uint8_t* p, int n) const {
    for (int i = 0; i < n; i++) p[i] = r[i];
  }
};
FASTNN_INLINE Bytes pack_clamped(VecI32 a, VecI32 b, VecI32 c, VecI32 d, int least, int most) {
  const VecI32 all[4] = {a, b, c, d};
  Bytes bytes;
  for (int i = 0; i < 16; i++) {
    const int32_t x = all[i / 4].r[i % 4];
    bytes.r[i] = uint8_t(x < least ? least : x > most ? most : x);
  }
  return bytes;
}
FASTNN_INLINE Bytes pack_s8(VecI32 a, VecI32 b, VecI32 c, VecI32 d) {
  return pack_clamped(a, b, c, d, -128, 127);
}
FASTNN_INLINE Bytes pack_u8(VecI32 a, VecI32 b, VecI32 c, VecI32 d) {
  return pack_clamped(a, b, c, d, 0, 255);
}
FASTNN_INLINE void stream(uint8_t* p, Bytes b) { b.store(p); }
FASTNN_INLINE void store_nibbles(uint8_t* p, Bytes b) {
  for (int i = 0; i < 8; i++) p[i] = uint8_t((b.r[2 * i] & 15) | b.r[2 * i + 1] << 4);
}
FASTNN_INLINE Bytes load_nibbles(const uint8_t* p) {
  Bytes b;
  for (int i = 0; i < 16; i++) b.r[i] = uint8_t(p[i / 2] >> 4 * (i % 2) & 15);
  return b;
}

#endif

}  // namespace fastnn::FASTNN_TARGET
