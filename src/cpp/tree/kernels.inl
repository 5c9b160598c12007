// The loops of the exact search, once for each instruction set. What depends on the element before
// runs first and fills a block; what does not is computed on the whole block, in vectors.
#include "tree/kernels.hpp"

#define FASTNN_INLINE inline __attribute__((always_inline))

#if FASTNN_TARGET_ID >= 1
#include <immintrin.h>
#endif

namespace fastnn::FASTNN_TARGET {

constexpr int64_t kBlock = 128;

struct Candidates {
  double left[kBlock], a[kBlock], b[kBlock], proxy[kBlock];
};

// Takes the best of `count` proxies; the first of them is candidate `j`.
FASTNN_INLINE void take_best(const SplitRange& r, const double* proxy, int64_t j, int64_t count,
                             BestCandidate& best) {
  for (int64_t i = 0; i < count; i++) {
    const bool border = r.values[j + i] > r.values[j + i - 1] + kFeatureThreshold;
    if (border && proxy[i] > best.proxy) best = {proxy[i], j + i};
  }
}

// Of candidates j .. j + count, whether any separates two values.
FASTNN_INLINE bool any_border(const SplitRange& r, int64_t j, int64_t count) {
  int any = 0;
  for (int64_t i = 0; i < count; i++)
    any |= r.values[j + i] > r.values[j + i - 1] + kFeatureThreshold;
  return any != 0;
}

constexpr double kNone = -__builtin_inf();

struct Bounds {
  int64_t first, last;  // candidates first .. last
};
FASTNN_INLINE Bounds bounds_of(const SplitRange& r) {
  int64_t first = r.least - r.first_left, last = r.most - r.first_left;
  if (first < 1) first = 1;
  if (last > r.n - 1) last = r.n - 1;
  return {first, last};
}

#if FASTNN_TARGET_ID == 2

// Byte i of entry m counts the bits 0 .. i of m.
struct PrefixCounts {
  uint64_t of[256];
  constexpr PrefixCounts() : of() {
    for (int m = 0; m < 256; m++) {
      uint64_t bytes = 0, sum = 0;
      for (int i = 0; i < 8; i++) {
        sum += uint64_t(m >> i & 1);
        bytes |= sum << (8 * i);
      }
      of[m] = bytes;
    }
  }
};
static constexpr PrefixCounts kPrefix;

static int64_t partition(float* values, uint32_t* keys, int64_t n, int shift, const uint32_t* side,
                         uint32_t flip, float* spare_values, uint32_t* spare_keys) {
  int64_t left = 0, right = 0;
  const __m512i bit = _mm512_set1_epi32(1), low = _mm512_set1_epi32(31);
  const __m128i by = _mm_cvtsi32_si128(shift);
  const __mmask16 turned = flip ? 0xffff : 0;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512i key = _mm512_loadu_si512(keys + i);
    const __m512 value = _mm512_loadu_ps(values + i);
    const __m512i row = _mm512_srl_epi32(key, by);
    const __m512i word = _mm512_i32gather_epi32(_mm512_srli_epi32(row, 5), (const int*)side, 4);
    const __m512i mine = _mm512_sllv_epi32(bit, _mm512_and_si512(row, low));
    const __mmask16 go = _mm512_test_epi32_mask(word, mine) ^ turned;
    _mm512_storeu_si512(keys + left, _mm512_maskz_compress_epi32(go, key));
    _mm512_storeu_ps(values + left, _mm512_maskz_compress_ps(go, value));
    const __mmask16 stay = __mmask16(~go);
    _mm512_storeu_si512(spare_keys + right, _mm512_maskz_compress_epi32(stay, key));
    _mm512_storeu_ps(spare_values + right, _mm512_maskz_compress_ps(stay, value));
    const int moved = __builtin_popcount(go);
    left += moved, right += 16 - moved;
  }
  if (i < n) {
    const __mmask16 there = __mmask16((1u << (n - i)) - 1);
    const __m512i key = _mm512_maskz_loadu_epi32(there, keys + i);
    const __m512 value = _mm512_maskz_loadu_ps(there, values + i);
    const __m512i row = _mm512_srl_epi32(key, by);
    const __m512i word = _mm512_mask_i32gather_epi32(
        _mm512_setzero_si512(), there, _mm512_srli_epi32(row, 5), (const int*)side, 4);
    const __m512i mine = _mm512_sllv_epi32(bit, _mm512_and_si512(row, low));
    const __mmask16 go = (_mm512_test_epi32_mask(word, mine) ^ turned) & there;
    const __mmask16 stay = there & __mmask16(~go);
    const int moved = __builtin_popcount(go), stayed = __builtin_popcount(stay);
    const __mmask16 to_left = __mmask16((1u << moved) - 1),
                    to_right = __mmask16((1u << stayed) - 1);
    _mm512_mask_storeu_epi32(keys + left, to_left, _mm512_maskz_compress_epi32(go, key));
    _mm512_mask_storeu_ps(values + left, to_left, _mm512_maskz_compress_ps(go, value));
    _mm512_mask_storeu_epi32(spare_keys + right, to_right, _mm512_maskz_compress_epi32(stay, key));
    _mm512_mask_storeu_ps(spare_values + right, to_right, _mm512_maskz_compress_ps(stay, value));
    left += moved, right += stayed;
  }
  __builtin_memcpy(keys + left, spare_keys, size_t(right) * 4);
  __builtin_memcpy(values + left, spare_values, size_t(right) * 4);
  return left;
}

// 8 proxies: -(nr * gini_right) - nl * gini_left, in scikit-learn's order of operations.
FASTNN_INLINE __m512d two_class_proxy(__m512d nl, __m512d left1, __m512d total, __m512d ones) {
  const __m512d one = _mm512_set1_pd(1.0);
  const __m512d nr = _mm512_sub_pd(total, nl);
  const __m512d left0 = _mm512_sub_pd(nl, left1), right1 = _mm512_sub_pd(ones, left1);
  const __m512d right0 = _mm512_sub_pd(nr, right1);
  const __m512d sl = _mm512_add_pd(_mm512_mul_pd(left0, left0), _mm512_mul_pd(left1, left1));
  const __m512d sr = _mm512_add_pd(_mm512_mul_pd(right0, right0), _mm512_mul_pd(right1, right1));
  const __m512d gl = _mm512_sub_pd(one, _mm512_div_pd(sl, _mm512_mul_pd(nl, nl)));
  const __m512d gr = _mm512_sub_pd(one, _mm512_div_pd(sr, _mm512_mul_pd(nr, nr)));
  const __m512d right = _mm512_mul_pd(_mm512_sub_pd(_mm512_setzero_pd(), nr), gr);
  return _mm512_sub_pd(right, _mm512_mul_pd(nl, gl));
}

static BestCandidate two_classes(const TwoClasses& s) {
  const SplitRange& r = s.range;
  const Bounds b = bounds_of(r);
  if (b.first > b.last) return {kNone, 0};
  const __m512i class_bit = _mm512_set1_epi32(1);
  const __m512 apart = _mm512_set1_ps(kFeatureThreshold);
  const __m512d total = _mm512_set1_pd(double(s.total)), ones = _mm512_set1_pd(double(s.ones));
  const __m512d lanes = _mm512_setr_pd(1, 2, 3, 4, 5, 6, 7, 8);
  __m512d best = _mm512_set1_pd(kNone);
  __m512i best_at = _mm512_setzero_si512();  // 16 * step + 8 * half, of each lane
  int64_t left1 = s.first_ones;
  // Lane l of step i is the candidate i + l + 1, whose left side ends with element i + l.
  for (int64_t i = 0; i < b.last; i += 16) {
    const int64_t count = r.n - i < 16 ? r.n - i : 16;
    const __mmask16 there = __mmask16((1u << count) - 1);
    const __m512i key = _mm512_maskz_loadu_epi32(there, r.keys + i);
    const uint32_t is1 = _mm512_mask_test_epi32_mask(there, key, class_bit);
    const int64_t before = left1;
    left1 += __builtin_popcount(is1);
    if (i + 16 < b.first) continue;
    // Element i + l + 1 is there for all candidates up to last.
    const int64_t usable = b.last - i < 16 ? b.last - i : 16;
    __mmask16 candidates = __mmask16((1u << usable) - 1);
    if (i + 1 < b.first) candidates &= __mmask16(0xffffu << (b.first - i - 1));
    const __m512 low = _mm512_maskz_loadu_ps(candidates, r.values + i);
    const __m512 high = _mm512_maskz_loadu_ps(candidates, r.values + i + 1);
    const uint32_t border =
        _mm512_mask_cmp_ps_mask(candidates, high, _mm512_add_ps(low, apart), _CMP_GT_OQ);
    if (!border) continue;
    const __m128i bytes = _mm_set_epi64x(
        int64_t(kPrefix.of[is1 >> 8] + 0x0101010101010101ull * (kPrefix.of[is1 & 255] >> 56)),
        int64_t(kPrefix.of[is1 & 255]));
    for (int half = 0; half < 2; half++) {
      const __mmask8 valid = __mmask8(border >> (8 * half));
      if (!valid) continue;
      const __m128i part = half ? _mm_unpackhi_epi64(bytes, bytes) : bytes;
      const __m512d l1 = _mm512_add_pd(_mm512_set1_pd(double(before)),
                                       _mm512_cvtepi32_pd(_mm256_cvtepu8_epi32(part)));
      const __m512d nl = _mm512_add_pd(_mm512_set1_pd(double(r.first_left + i + 8 * half)), lanes);
      const __m512d proxy = two_class_proxy(nl, l1, total, ones);
      const __mmask8 better = _mm512_mask_cmp_pd_mask(valid, proxy, best, _CMP_GT_OQ);
      best = _mm512_mask_mov_pd(best, better, proxy);
      best_at = _mm512_mask_mov_epi64(best_at, better, _mm512_set1_epi64(i + 8 * half));
    }
  }
  double proxies[8];
  int64_t at[8];
  _mm512_storeu_pd(proxies, best);
  _mm512_storeu_si512(at, best_at);
  BestCandidate found{kNone, 0};
  for (int l = 0; l < 8; l++) {
    const int64_t j = at[l] + l + 1;
    if (proxies[l] > found.proxy || (proxies[l] == found.proxy && found.j && j < found.j))
      found = {proxies[l], j};
  }
  return found;
}

#else

static int64_t partition(float* values, uint32_t* keys, int64_t n, int shift, const uint32_t* side,
                         uint32_t flip, float* spare_values, uint32_t* spare_keys) {
  int64_t left = 0, right = 0;
  for (int64_t i = 0; i < n; i++) {
    const uint32_t key = keys[i], row = key >> shift;
    const float value = values[i];
    const uint32_t go = (side[row >> 5] >> (row & 31) & 1) ^ flip;
    keys[left] = key, values[left] = value;
    spare_keys[right] = key, spare_values[right] = value;
    left += go, right += go ^ 1;
  }
  __builtin_memcpy(keys + left, spare_keys, size_t(right) * 4);
  __builtin_memcpy(values + left, spare_values, size_t(right) * 4);
  return left;
}

static BestCandidate two_classes(const TwoClasses& s) {
  const SplitRange& r = s.range;
  const Bounds b = bounds_of(r);
  BestCandidate best{kNone, 0};
  double left1 = double(s.first_ones);
  const double total = double(s.total), ones = double(s.ones);
  Candidates c;
  for (int64_t i = 0; i < b.first - 1; i++) left1 += double(r.keys[i] & 1);
  for (int64_t j = b.first; j <= b.last; j += kBlock) {
    const int64_t count = b.last - j + 1 < kBlock ? b.last - j + 1 : kBlock;
    for (int64_t i = 0; i < count; i++) c.a[i] = left1 += double(r.keys[j + i - 1] & 1);
    if (!any_border(r, j, count)) continue;
    const double start = double(r.first_left + j);
    for (int64_t i = 0; i < count; i++) {
      const double nl = start + double(i), nr = total - nl, l1 = c.a[i], l0 = nl - l1;
      const double r1 = ones - l1, r0 = nr - r1;
      const double gl = 1.0 - (l0 * l0 + l1 * l1) / (nl * nl);
      const double gr = 1.0 - (r0 * r0 + r1 * r1) / (nr * nr);
      c.proxy[i] = -nr * gr - nl * gl;
    }
    take_best(r, c.proxy, j, count, best);
  }
  return best;
}

#endif

static BestCandidate many_classes(const ManyClasses& s) {
  const SplitRange& r = s.range;
  const Bounds b = bounds_of(r);
  BestCandidate best{kNone, 0};
  const uint32_t classes = (1u << s.shift) - 1;
  int64_t left = s.first_weight, sl = s.square_left, sr = s.square_right;
  const double total = double(s.total);
  Candidates c;
  for (int64_t j = 1; j <= b.last; j += kBlock) {
    const int64_t count = b.last - j + 1 < kBlock ? b.last - j + 1 : kBlock;
    for (int64_t i = 0; i < count; i++) {
      const uint32_t key = r.keys[j + i - 1];
      const int64_t w = s.weights ? s.weights[key >> s.shift] : 1;
      int64_t &l = s.left[key & classes], &o = s.right[key & classes];
      sl += w * (2 * l + w), sr -= w * (2 * o - w);
      l += w, o -= w, left += w;
      c.left[i] = double(left), c.a[i] = double(sl), c.b[i] = double(sr);
    }
    const int64_t skip = b.first > j ? b.first - j : 0;
    if (skip >= count || !any_border(r, j + skip, count - skip)) continue;
    for (int64_t i = 0; i < count; i++) {
      const double nl = c.left[i], nr = total - nl;
      const double gl = 1.0 - c.a[i] / (nl * nl), gr = 1.0 - c.b[i] / (nr * nr);
      const double proxy = -nr * gr - nl * gl;
      c.proxy[i] = (nl < s.least_weight) | (nr < s.least_weight) ? kNone : proxy;
    }
    take_best(r, c.proxy + skip, j + skip, count - skip, best);
  }
  return best;
}

static BestCandidate one_target(const OneTarget& s) {
  const SplitRange& r = s.range;
  const Bounds b = bounds_of(r);
  BestCandidate best{kNone, 0};
  double left = s.first_weight, sum = s.first_sum;
  Candidates c;
  for (int64_t j = 1; j <= b.last; j += kBlock) {
    const int64_t count = b.last - j + 1 < kBlock ? b.last - j + 1 : kBlock;
    if (s.weights) {
      for (int64_t i = 0; i < count; i++) {
        const uint32_t row = r.keys[j + i - 1] >> s.shift;
        const double w = s.weights[row];
        c.left[i] = left += w;
        c.a[i] = sum += w * s.y[row];
      }
    } else {
      for (int64_t i = 0; i < count; i++) {
        c.left[i] = left += 1.0;
        c.a[i] = sum += s.y[r.keys[j + i - 1] >> s.shift];
      }
    }
    const int64_t skip = b.first > j ? b.first - j : 0;
    if (skip >= count || !any_border(r, j + skip, count - skip)) continue;
    for (int64_t i = 0; i < count; i++) {
      const double nl = c.left[i], nr = s.total - nl, a = c.a[i], o = s.sum - a;
      const double proxy = a * a / nl + o * o / nr;
      c.proxy[i] = (nl < s.least_weight) | (nr < s.least_weight) ? kNone : proxy;
    }
    take_best(r, c.proxy + skip, j + skip, count - skip, best);
  }
  return best;
}

static const TreeKernels tree_table = {partition, two_classes, many_classes, one_target};

}  // namespace fastnn::FASTNN_TARGET
