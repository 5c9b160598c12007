// The loops of random splits, once for each instruction set; see isa/vec.hpp for why nothing here
// may be shared between targets.
#include "tree/random_kernels.hpp"

#define FASTNN_INLINE inline __attribute__((always_inline))

#if FASTNN_TARGET_ID >= 1
#include <immintrin.h>
#endif

namespace fastnn::FASTNN_TARGET {

constexpr float kFar = __builtin_inff();

FASTNN_INLINE bool goes_left(const RandomCut& c, int64_t i) {
  const float x = c.values[i];
  return (x <= c.cut) | ((x != x) & c.missing_left);
}

// Additions go to 8 sums in turn, which are added up in this order.
FASTNN_INLINE double total_of(const double* s) {
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

#if FASTNN_TARGET_ID == 2

FASTNN_INLINE __mmask16 there(int64_t n, int64_t i) {
  return n - i >= 16 ? __mmask16(0xffff) : __mmask16((1u << (n - i)) - 1);
}
FASTNN_INLINE __mmask16 left_of(const RandomCut& c, __mmask16 m, int64_t i) {
  const __m512 x = _mm512_maskz_loadu_ps(m, c.values + i);
  const __mmask16 below = _mm512_mask_cmp_ps_mask(m, x, _mm512_set1_ps(c.cut), _CMP_LE_OQ);
  return c.missing_left ? below | _mm512_mask_cmp_ps_mask(m, x, x, _CMP_UNORD_Q) : below;
}

static ValueRange gather(const RandomRows& r, const float* column, float* values) {
  const __m128i by = _mm_cvtsi32_si128(r.shift);
  __m512 least = _mm512_set1_ps(kFar), most = _mm512_set1_ps(-kFar);
  int64_t missing = 0;
  for (int64_t i = 0; i < r.n; i += 16) {
    const __mmask16 m = there(r.n, i);
    const __m512i row = _mm512_srl_epi32(_mm512_maskz_loadu_epi32(m, r.keys + i), by);
    const __m512 x = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), m, row, column, 4);
    _mm512_storeu_ps(values + i, x);
    const __mmask16 known = _mm512_mask_cmp_ps_mask(m, x, x, _CMP_ORD_Q);
    missing += __builtin_popcount(m ^ known);
    least = _mm512_mask_min_ps(least, known, least, x);
    most = _mm512_mask_max_ps(most, known, most, x);
  }
  return {_mm512_reduce_min_ps(least), _mm512_reduce_max_ps(most), missing};
}

static LeftSums sum_left(const RandomRows& r, const RandomCut& c, const double* targets,
                         const double* weights) {
  const __m128i by = _mm_cvtsi32_si128(r.shift);
  const __m512d zero = _mm512_setzero_pd();
  __m512d sum = zero, weight = zero;
  int64_t left = 0;
  for (int64_t i = 0; i < r.n; i += 16) {
    const __mmask16 go = left_of(c, there(r.n, i), i);
    left += __builtin_popcount(go);
    const __m512i row = _mm512_srl_epi32(_mm512_maskz_loadu_epi32(go, r.keys + i), by);
    const __m256i low = _mm512_castsi512_si256(row), high = _mm512_extracti64x4_epi64(row, 1);
    const __mmask8 first = __mmask8(go), second = __mmask8(go >> 8);
    sum = _mm512_add_pd(sum, _mm512_mask_i32gather_pd(zero, first, low, targets, 8));
    sum = _mm512_add_pd(sum, _mm512_mask_i32gather_pd(zero, second, high, targets, 8));
    if (weights) {
      weight = _mm512_add_pd(weight, _mm512_mask_i32gather_pd(zero, first, low, weights, 8));
      weight = _mm512_add_pd(weight, _mm512_mask_i32gather_pd(zero, second, high, weights, 8));
    }
  }
  alignas(64) double sums[8], weighed[8];
  _mm512_store_pd(sums, sum);
  _mm512_store_pd(weighed, weight);
  return {left, weights ? total_of(weighed) : double(left), total_of(sums)};
}

// Two classes.
static int64_t count_two(const RandomRows& r, const RandomCut& c, int weight_bits,
                         int64_t* classes) {
  const __m512i one = _mm512_set1_epi32(1), mask = _mm512_set1_epi32((1 << weight_bits) - 1);
  __m512i all = _mm512_setzero_si512(), ones = all;
  int64_t left = 0, second = 0;
  for (int64_t i = 0; i < r.n; i += 16) {
    const __mmask16 m = there(r.n, i), go = left_of(c, m, i);
    const __m512i key = _mm512_maskz_loadu_epi32(m, r.keys + i);
    const __mmask16 in_second = _mm512_mask_test_epi32_mask(go, key, one);
    left += __builtin_popcount(go);
    if (weight_bits) {
      const __m512i w = _mm512_and_si512(_mm512_srli_epi32(key, 1), mask);
      all = _mm512_mask_add_epi32(all, go, all, w);
      ones = _mm512_mask_add_epi32(ones, in_second, ones, w);
    } else {
      second += __builtin_popcount(in_second);
    }
  }
  int64_t weight = left;
  if (weight_bits) weight = _mm512_reduce_add_epi32(all), second = _mm512_reduce_add_epi32(ones);
  classes[0] += weight - second, classes[1] += second;
  return left;
}

static int64_t part(const RandomRows& r, const RandomCut& c, uint32_t* left, uint32_t* right) {
  int64_t l = 0, o = 0;
  for (int64_t i = 0; i < r.n; i += 16) {
    const __mmask16 m = there(r.n, i), go = left_of(c, m, i), stay = m & __mmask16(~go);
    const __m512i key = _mm512_maskz_loadu_epi32(m, r.keys + i);
    const int gone = __builtin_popcount(go), stayed = __builtin_popcount(stay);
    _mm512_mask_storeu_epi32(left + l, __mmask16((1u << gone) - 1),
                             _mm512_maskz_compress_epi32(go, key));
    _mm512_mask_storeu_epi32(right + o, __mmask16((1u << stayed) - 1),
                             _mm512_maskz_compress_epi32(stay, key));
    l += gone, o += stayed;
  }
  return l;
}

#else

#if FASTNN_TARGET_ID == 1

static ValueRange gather(const RandomRows& r, const float* column, float* values) {
  const __m128i by = _mm_cvtsi32_si128(r.shift);
  __m256 least = _mm256_set1_ps(kFar), most = _mm256_set1_ps(-kFar);
  __m256i known_rows = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 8 <= r.n; i += 8) {
    const __m256i row = _mm256_srl_epi32(_mm256_loadu_si256((const __m256i*)(r.keys + i)), by);
    const __m256 x = _mm256_i32gather_ps(column, row, 4);
    _mm256_storeu_ps(values + i, x);
    // The second operand where one is NaN: what was found stays.
    least = _mm256_min_ps(x, least), most = _mm256_max_ps(x, most);
    known_rows = _mm256_sub_epi32(known_rows, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_ORD_Q)));
  }
  alignas(32) float low[8], high[8];
  alignas(32) int32_t known[8];
  _mm256_store_ps(low, least);
  _mm256_store_ps(high, most);
  _mm256_store_si256((__m256i*)known, known_rows);
  ValueRange found{kFar, -kFar, i};
  for (int j = 0; j < 8; j++) {
    found.least = low[j] < found.least ? low[j] : found.least;
    found.most = high[j] > found.most ? high[j] : found.most;
    found.missing -= known[j];
  }
  for (; i < r.n; i++) {
    const float x = values[i] = column[r.keys[i] >> r.shift];
    found.least = x < found.least ? x : found.least;
    found.most = x > found.most ? x : found.most;
    found.missing += x != x;
  }
  return found;
}

#else

static ValueRange gather(const RandomRows& r, const float* column, float* values) {
  ValueRange found{kFar, -kFar, 0};
  for (int64_t i = 0; i < r.n; i++) {
    const float x = values[i] = column[r.keys[i] >> r.shift];
    found.least = x < found.least ? x : found.least;
    found.most = x > found.most ? x : found.most;
    found.missing += x != x;
  }
  return found;
}

#endif

static LeftSums sum_left(const RandomRows& r, const RandomCut& c, const double* targets,
                         const double* weights) {
  double sums[8] = {}, weighed[8] = {};
  int64_t left = 0;
  // Where no row goes left, row 0's target is read and not used.
  for (int64_t i = 0; i < r.n; i++) {
    const bool go = goes_left(c, i);
    const uint32_t row = r.keys[i] >> r.shift;
    left += go;
    sums[i & 7] += go ? targets[row] : 0.0;
    if (weights) weighed[i & 7] += go ? weights[row] : 0.0;
  }
  return {left, weights ? total_of(weighed) : double(left), total_of(sums)};
}

static int64_t count_two(const RandomRows& r, const RandomCut& c, int weight_bits,
                         int64_t* classes) {
  const uint32_t mask = (1u << weight_bits) - 1;
  int64_t left = 0, weight = 0, second = 0;
  for (int64_t i = 0; i < r.n; i++) {
    const uint32_t key = r.keys[i], go = goes_left(c, i);
    const uint32_t w = weight_bits ? (key >> 1 & mask) : 1;
    left += go, weight += go * w, second += (go & key & 1) * w;
  }
  classes[0] += weight - second, classes[1] += second;
  return left;
}

static int64_t part(const RandomRows& r, const RandomCut& c, uint32_t* left, uint32_t* right) {
  int64_t l = 0;
  for (int64_t i = 0; i < r.n; i++) {
    const bool go = goes_left(c, i);
    const uint32_t key = r.keys[i];
    left[l] = key, right[i - l] = key;
    l += go;
  }
  return l;
}

#endif

static int64_t count_left(const RandomRows& r, const RandomCut& c, KeyBits bits, int64_t* classes) {
  if (bits.class_bits == 1) return count_two(r, c, bits.weight_bits, classes);
  const uint32_t mask = (1u << bits.class_bits) - 1, weights = (1u << bits.weight_bits) - 1;
  int64_t left = 0;
  for (int64_t i = 0; i < r.n; i++) {
    const uint32_t key = r.keys[i], go = goes_left(c, i);
    left += go;
    classes[key & mask] += bits.weight_bits ? go * (key >> bits.class_bits & weights) : go;
  }
  return left;
}

static const RandomKernels random_table = {gather, count_left, sum_left, part};

}  // namespace fastnn::FASTNN_TARGET
