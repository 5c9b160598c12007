// common/philox.hpp, a vector of counters at a time. Included after FASTNN_TARGET was chosen; see
// isa/vec.hpp.
//
//   philox_words(seed, first, n, words)   words[i] = the word of element first + i, for any first
//   keeps(words, threshold, V())          V::Mask: which of the V::width elements whose words these
//                                         are stay; threshold at most 2^32 - 1
//   keeps_partial(words, n, threshold, V())   of the first n, reading no more than n words
#pragma once
#include "common/philox.hpp"
#include "isa/vec.hpp"

namespace fastnn::FASTNN_TARGET {

// One counter a lane; group<0> to group<3> of `store` are four elements a counter, in order.
#if FASTNN_TARGET_ID == 2

constexpr int kPhiloxLanes = 16;
// The high and low halves of the products of all lanes with m.
static FASTNN_INLINE void philox_multiply(__m512i a, __m512i m, __m512i& high, __m512i& low) {
  const __m512i even = _mm512_mul_epu32(a, m);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), m);
  high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
  low = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
}
// The words of 64 elements from 4 * counter.
static FASTNN_INLINE void philox_block(uint64_t seed, uint64_t counter, uint32_t* words) {
  // Lane 4 i + j has counter i + 4 j, so that transposing within the quarters of the vectors, which
  // is cheap, leaves four neighbours in each.
  const __m512i lane = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i start = _mm512_set1_epi32(int(uint32_t(counter)));
  __m512i c0 = _mm512_add_epi32(start, lane);
  const __mmask16 carry = _mm512_cmplt_epu32_mask(c0, start);
  __m512i c1 = _mm512_set1_epi32(int(uint32_t(counter >> 32)));
  c1 = _mm512_mask_add_epi32(c1, carry, c1, _mm512_set1_epi32(1));
  __m512i c2 = _mm512_setzero_si512(), c3 = c2;
  const __m512i m0 = _mm512_set1_epi32(int(kPhiloxM0)), m1 = _mm512_set1_epi32(int(kPhiloxM1));
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; round++) {
    __m512i h0, l0, h1, l1;
    philox_multiply(c0, m0, h0, l0);
    philox_multiply(c2, m1, h1, l1);
    c0 = _mm512_ternarylogic_epi32(h1, c1, _mm512_set1_epi32(int(k0)), 0x96);
    c1 = l1;
    c2 = _mm512_ternarylogic_epi32(h0, c3, _mm512_set1_epi32(int(k1)), 0x96);
    c3 = l0;
    k0 += kPhiloxW0, k1 += kPhiloxW1;
  }
  const __m512i a = _mm512_unpacklo_epi32(c0, c1), b = _mm512_unpackhi_epi32(c0, c1);
  const __m512i c = _mm512_unpacklo_epi32(c2, c3), d = _mm512_unpackhi_epi32(c2, c3);
  _mm512_storeu_si512(words, _mm512_unpacklo_epi64(a, c));
  _mm512_storeu_si512(words + 16, _mm512_unpackhi_epi64(a, c));
  _mm512_storeu_si512(words + 32, _mm512_unpacklo_epi64(b, d));
  _mm512_storeu_si512(words + 48, _mm512_unpackhi_epi64(b, d));
}
static FASTNN_INLINE __mmask16 keeps(const uint32_t* words, uint32_t threshold, VecF32) {
  return _mm512_cmpge_epu32_mask(_mm512_loadu_si512(words), _mm512_set1_epi32(int(threshold)));
}
static FASTNN_INLINE __mmask8 keeps(const uint32_t* words, uint32_t threshold, VecF64) {
  const __m256i w = _mm256_loadu_si256((const __m256i*)words);
  return _mm256_cmpge_epu32_mask(w, _mm256_set1_epi32(int(threshold)));
}

#elif FASTNN_TARGET_ID == 1

constexpr int kPhiloxLanes = 8;
static FASTNN_INLINE void philox_multiply(__m256i a, __m256i m, __m256i& high, __m256i& low) {
  const __m256i even = _mm256_mul_epu32(a, m);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), m);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}
// The words of 32 elements from 4 * counter. See the form for AVX-512.
static FASTNN_INLINE void philox_block(uint64_t seed, uint64_t counter, uint32_t* words) {
  const __m256i lane = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  const __m256i start = _mm256_set1_epi32(int(uint32_t(counter)));
  __m256i c0 = _mm256_add_epi32(start, lane);
  // Comparisons are of signed numbers. True is -1, which is taken away.
  const __m256i sign = _mm256_set1_epi32(int(0x80000000u));
  const __m256i carry =
      _mm256_cmpgt_epi32(_mm256_xor_si256(start, sign), _mm256_xor_si256(c0, sign));
  __m256i c1 = _mm256_sub_epi32(_mm256_set1_epi32(int(uint32_t(counter >> 32))), carry);
  __m256i c2 = _mm256_setzero_si256(), c3 = c2;
  const __m256i m0 = _mm256_set1_epi32(int(kPhiloxM0)), m1 = _mm256_set1_epi32(int(kPhiloxM1));
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; round++) {
    __m256i h0, l0, h1, l1;
    philox_multiply(c0, m0, h0, l0);
    philox_multiply(c2, m1, h1, l1);
    c0 = _mm256_xor_si256(_mm256_xor_si256(h1, c1), _mm256_set1_epi32(int(k0)));
    c1 = l1;
    c2 = _mm256_xor_si256(_mm256_xor_si256(h0, c3), _mm256_set1_epi32(int(k1)));
    c3 = l0;
    k0 += kPhiloxW0, k1 += kPhiloxW1;
  }
  const __m256i a = _mm256_unpacklo_epi32(c0, c1), b = _mm256_unpackhi_epi32(c0, c1);
  const __m256i c = _mm256_unpacklo_epi32(c2, c3), d = _mm256_unpackhi_epi32(c2, c3);
  _mm256_storeu_si256((__m256i*)words, _mm256_unpacklo_epi64(a, c));
  _mm256_storeu_si256((__m256i*)(words + 8), _mm256_unpackhi_epi64(a, c));
  _mm256_storeu_si256((__m256i*)(words + 16), _mm256_unpacklo_epi64(b, d));
  _mm256_storeu_si256((__m256i*)(words + 24), _mm256_unpackhi_epi64(b, d));
}
static FASTNN_INLINE VecF32::Mask keeps(const uint32_t* words, uint32_t threshold, VecF32) {
  const __m256i w = _mm256_loadu_si256((const __m256i*)words);
  const __m256i least = _mm256_max_epu32(w, _mm256_set1_epi32(int(threshold)));
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(w, least))};
}
static FASTNN_INLINE VecF64::Mask keeps(const uint32_t* words, uint32_t threshold, VecF64) {
  const __m128i w = _mm_loadu_si128((const __m128i*)words);
  const __m128i kept = _mm_cmpeq_epi32(w, _mm_max_epu32(w, _mm_set1_epi32(int(threshold))));
  return {_mm256_castsi256_pd(_mm256_cvtepi32_epi64(kept))};
}

#else

constexpr int kPhiloxLanes = 4;
static FASTNN_INLINE void philox_block(uint64_t seed, uint64_t counter, uint32_t* words) {
  for (int i = 0; i < kPhiloxLanes; i++) {
    const PhiloxWords p = philox(seed, counter + uint64_t(i));
    for (int j = 0; j < 4; j++) words[4 * i + j] = p.word[j];
  }
}
template <class V>
static FASTNN_INLINE typename V::Mask keeps(const uint32_t* words, uint32_t threshold, V) {
  typename V::Mask mask;
  for (int i = 0; i < V::width; i++) mask.m[i] = words[i] >= threshold ? -1 : 0;
  return mask;
}

#endif

template <class V>
static FASTNN_INLINE
    typename V::Mask keeps_partial(const uint32_t* words, int n, uint32_t threshold, V v) {
  uint32_t lanes[V::width] = {};
  for (int i = 0; i < n; i++) lanes[i] = words[i];
  return keeps(lanes, threshold, v);
}

static inline void philox_words(uint64_t seed, uint64_t first, int64_t n, uint32_t* words) {
  constexpr int64_t block = 4 * kPhiloxLanes;
  uint32_t some[block];
  int64_t i = 0;
  const int64_t before =
      int64_t(first % 4);  // elements of the first counter that are not asked for
  if (before || n < block) {
    if (n <= 0) return;
    philox_block(seed, first / 4, some);
    i = n < block - before ? n : block - before;
    for (int64_t j = 0; j < i; j++) words[j] = some[before + j];
  }
  // From here on whole counters.
  for (; i + block <= n; i += block) philox_block(seed, (first + uint64_t(i)) / 4, words + i);
  if (i < n) {
    philox_block(seed, (first + uint64_t(i)) / 4, some);
    for (int64_t j = 0; i + j < n; j++) words[i + j] = some[j];
  }
}

}  // namespace fastnn::FASTNN_TARGET
