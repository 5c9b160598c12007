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

FASTNN_INLINE uint32_t rank_of(const ColumnRanks& r, uint32_t key, int shift) {
  return r.rank[int64_t(key >> shift) * r.stride];
}
template <class Node>
FASTNN_INLINE float value_of(const Node& s, uint32_t key, uint32_t rank) {
  return s.ranks.value ? s.ranks.value[int64_t(key >> s.shift) * s.ranks.stride] : s.values[rank];
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

// Sums of the lanes up to each.
FASTNN_INLINE __m512i sums_up_to(__m512i x) {
  const __m512i zero = _mm512_setzero_si512();
  x = _mm512_add_epi32(x, _mm512_alignr_epi32(x, zero, 15));
  x = _mm512_add_epi32(x, _mm512_alignr_epi32(x, zero, 14));
  x = _mm512_add_epi32(x, _mm512_alignr_epi32(x, zero, 12));
  return _mm512_add_epi32(x, _mm512_alignr_epi32(x, zero, 8));
}

// First the decrease of the impurity in float32, d^2 / (nl nr) with d = left1 - nl ones / total,
// for a chunk; then the proxy, in double, of the few that may be the best. Counts are exact in
// float32, and so is d but for two roundings, with ones / total in two parts: the decrease is right
// to 6e-7.
static BestCandidate two_classes(const TwoClasses& s) {
  const SplitRange& r = s.range;
  const Bounds b = bounds_of(r);
  if (b.first > b.last) return {kNone, 0};
  constexpr int64_t kChunk = 32;  // vectors
  alignas(64) int32_t weights[kChunk][16], ones[kChunk][16];
  alignas(64) float decreases[kChunk][16];
  const __m512 apart = _mm512_set1_ps(kFeatureThreshold);
  const double share = double(s.ones) / double(s.total);
  const __m512 share_high = _mm512_set1_ps(float(share));
  const __m512 share_low = _mm512_set1_ps(float(share - double(float(share))));
  const __m512 total = _mm512_set1_ps(float(s.total));
  const __m512 least = _mm512_set1_ps(float(__builtin_ceil(s.least_weight)));
  const __m512d total_double = _mm512_set1_pd(double(s.total));
  const __m512d ones_double = _mm512_set1_pd(double(s.ones));
  const __m512i class_bit = _mm512_set1_epi32(1), last_lane = _mm512_set1_epi32(15);
  const __m512i lanes = _mm512_setr_epi32(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16);
  const __m512i weight_mask = _mm512_set1_epi32((1 << s.weight_bits) - 1);
  __m512i weight_before = _mm512_set1_epi32(int(s.first_weight));
  __m512i ones_before = _mm512_set1_epi32(int(s.first_ones));
  __m512d best = _mm512_set1_pd(kNone);
  __m512i best_at = _mm512_setzero_si512();  // 16 * step + 8 * half, of each lane
  __m512 most = _mm512_set1_ps(-1.0f);
  // Lane l of step i is the candidate i + l + 1, whose left side ends with element i + l.
  for (int64_t begin = 0; begin < b.last; begin += 16 * kChunk) {
    const int64_t end = b.last < begin + 16 * kChunk ? b.last : begin + 16 * kChunk;
    for (int64_t i = begin, step = 0; i < end; i += 16, step++) {
      const int64_t count = r.n - i < 16 ? r.n - i : 16;
      const __mmask16 there = __mmask16((1u << count) - 1);
      const __m512i key = _mm512_maskz_loadu_epi32(there, r.keys + i);
      const uint32_t is1 = _mm512_mask_test_epi32_mask(there, key, class_bit);
      __m512i weight, one;
      if (s.weight_bits) {
        const __m512i w = _mm512_and_si512(_mm512_srli_epi32(key, 1), weight_mask);
        weight = _mm512_add_epi32(weight_before, sums_up_to(w));
        one = _mm512_add_epi32(ones_before, sums_up_to(_mm512_maskz_mov_epi32(__mmask16(is1), w)));
      } else {
        const uint64_t low = kPrefix.of[is1 & 255];
        const uint64_t high = kPrefix.of[is1 >> 8] + 0x0101010101010101ull * (low >> 56);
        weight = _mm512_add_epi32(weight_before, lanes);
        one = _mm512_add_epi32(ones_before,
                               _mm512_cvtepu8_epi32(_mm_set_epi64x(int64_t(high), int64_t(low))));
      }
      weight_before = _mm512_permutexvar_epi32(last_lane, weight);
      ones_before = _mm512_permutexvar_epi32(last_lane, one);
      // Element i + l + 1 is there for all candidates up to last.
      const int64_t usable = b.last - i < 16 ? b.last - i : 16;
      __mmask16 candidates = __mmask16((1u << usable) - 1);
      if (i + 1 < b.first)
        candidates &= i + 16 < b.first ? __mmask16(0) : __mmask16(0xffffu << (b.first - i - 1));
      const __m512 before = _mm512_maskz_loadu_ps(candidates, r.values + i);
      const __m512 behind = _mm512_maskz_loadu_ps(candidates, r.values + i + 1);
      const __mmask16 border =
          _mm512_mask_cmp_ps_mask(candidates, behind, _mm512_add_ps(before, apart), _CMP_GT_OQ);
      const __m512 nl = _mm512_cvtepi32_ps(weight), nr = _mm512_sub_ps(total, nl);
      __mmask16 valid = _mm512_mask_cmp_ps_mask(border, nl, least, _CMP_GE_OQ);
      valid = _mm512_mask_cmp_ps_mask(valid, nr, least, _CMP_GE_OQ);
      __m512 d = _mm512_fnmadd_ps(nl, share_high, _mm512_cvtepi32_ps(one));
      d = _mm512_fnmadd_ps(nl, share_low, d);
      const __m512 decrease = _mm512_mask_div_ps(_mm512_set1_ps(-1.0f), valid, _mm512_mul_ps(d, d),
                                                 _mm512_mul_ps(nl, nr));
      most = _mm512_max_ps(most, decrease);
      _mm512_store_si512(weights[step], weight);
      _mm512_store_si512(ones[step], one);
      _mm512_store_ps(decreases[step], decrease);
    }
    const float largest = _mm512_reduce_max_ps(most);
    most = _mm512_set1_ps(largest);
    // Proxies of decreases below 1e-14 are equal but for rounding.
    float bound = largest * (1 - 4e-6f) - 1e-14f;
    if (bound < 0) bound = 0;
    const __m512 enough = _mm512_set1_ps(bound);
    for (int64_t i = begin, step = 0; i < end; i += 16, step++) {
      const uint32_t near = _mm512_cmp_ps_mask(_mm512_load_ps(decreases[step]), enough, _CMP_GE_OQ);
      if (!near) continue;
      for (int half = 0; half < 2; half++) {
        const __mmask8 valid = __mmask8(near >> (8 * half));
        if (!valid) continue;
        const __m256i weight = _mm256_load_si256((const __m256i*)(weights[step] + 8 * half));
        const __m256i one = _mm256_load_si256((const __m256i*)(ones[step] + 8 * half));
        const __m512d proxy = two_class_proxy(_mm512_cvtepi32_pd(weight), _mm512_cvtepi32_pd(one),
                                              total_double, ones_double);
        const __mmask8 better = _mm512_mask_cmp_pd_mask(valid, proxy, best, _CMP_GT_OQ);
        best = _mm512_mask_mov_pd(best, better, proxy);
        best_at = _mm512_mask_mov_epi64(best_at, better, _mm512_set1_epi64(i + 8 * half));
      }
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

static int64_t partition_rows(uint32_t* keys, int64_t n, int shift, ColumnRanks ranks,
                              uint32_t below, uint32_t from, uint32_t* spare) {
  const __m128i by = _mm_cvtsi32_si128(shift);
  const __m512i low = _mm512_set1_epi32(int(below)), high = _mm512_set1_epi32(int(from));
  const __m512i stride = _mm512_set1_epi32(int(ranks.stride));
  int64_t left = 0, right = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 there = n - i < 16 ? __mmask16((1u << (n - i)) - 1) : __mmask16(0xffff);
    const __m512i key = _mm512_maskz_loadu_epi32(there, keys + i);
    const __m512i place = _mm512_mask_i32gather_epi32(
        _mm512_setzero_si512(), there, _mm512_mullo_epi32(_mm512_srl_epi32(key, by), stride),
        (const int*)ranks.rank, 4);
    const __mmask16 go =
        there & (_mm512_cmplt_epu32_mask(place, low) | _mm512_cmpge_epu32_mask(place, high));
    const __mmask16 stay = there & __mmask16(~go);
    const int moved = __builtin_popcount(go), stayed = __builtin_popcount(stay);
    _mm512_mask_storeu_epi32(keys + left, __mmask16((1u << moved) - 1),
                             _mm512_maskz_compress_epi32(go, key));
    _mm512_mask_storeu_epi32(spare + right, __mmask16((1u << stayed) - 1),
                             _mm512_maskz_compress_epi32(stay, key));
    left += moved, right += stayed;
  }
  __builtin_memcpy(keys + left, spare, size_t(right) * 4);
  return left;
}

static int64_t partition_codes(uint32_t* keys, int64_t n, int shift, const uint8_t* codes, int last,
                               uint32_t* spare) {
  const __m128i by = _mm_cvtsi32_si128(shift);
  const __m512i most = _mm512_set1_epi32(last), byte = _mm512_set1_epi32(255);
  int64_t left = 0, right = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 there = n - i < 16 ? __mmask16((1u << (n - i)) - 1) : __mmask16(0xffff);
    const __m512i key = _mm512_maskz_loadu_epi32(there, keys + i);
    const __m512i code = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there,
                                                     _mm512_srl_epi32(key, by), codes, 1);
    const __mmask16 go = _mm512_mask_cmple_epu32_mask(there, _mm512_and_si512(code, byte), most);
    const __mmask16 stay = there & __mmask16(~go);
    const int moved = __builtin_popcount(go), stayed = __builtin_popcount(stay);
    _mm512_mask_storeu_epi32(keys + left, __mmask16((1u << moved) - 1),
                             _mm512_maskz_compress_epi32(go, key));
    _mm512_mask_storeu_epi32(spare + right, __mmask16((1u << stayed) - 1),
                             _mm512_maskz_compress_epi32(stay, key));
    left += moved, right += stayed;
  }
  __builtin_memcpy(keys + left, spare, size_t(right) * 4);
  return left;
}

constexpr int64_t kHandful = 128;

// Each row's place is the number of smaller ranks.
static void sorted_handful(const NodeSort& s) {
  alignas(64) uint32_t ranks[kHandful];
  const int64_t vectors = (s.n + 15) / 16;
  __m512i rank[kHandful / 16];
  const __m512i stride = _mm512_set1_epi32(int(s.ranks.stride));
  const __m128i by = _mm_cvtsi32_si128(s.shift);
  for (int64_t v = 0; v < vectors; v++) {
    const int64_t left = s.n - 16 * v;
    const __mmask16 there = left < 16 ? __mmask16((1u << left) - 1) : __mmask16(0xffff);
    const __m512i key = _mm512_maskz_loadu_epi32(there, s.keys + 16 * v);
    rank[v] = _mm512_mask_i32gather_epi32(_mm512_set1_epi32(-1), there,
                                          _mm512_mullo_epi32(_mm512_srl_epi32(key, by), stride),
                                          (const int*)s.ranks.rank, 4);
    _mm512_store_si512(ranks + 16 * v, rank[v]);
  }
  for (int64_t i = 0; i < s.n; i++) {
    const __m512i mine = _mm512_set1_epi32(int(ranks[i]));
    int place = 0;
    for (int64_t v = 0; v < vectors; v++)
      place += __builtin_popcount(_mm512_cmplt_epu32_mask(rank[v], mine));
    s.sorted_keys[place] = s.keys[i];
    s.sorted_values[place] = value_of(s, s.keys[i], ranks[i]);
  }
}

// All words are read, 16 ranks at a time.
static void sorted_of_dense(const NodeSort& s) {
  int64_t to = 0;
  for (int64_t word = 0; word * 64 < s.rows; word++) {
    const uint64_t bits = s.bits[word];
    if (!bits) continue;
    s.bits[word] = 0;
    for (int part = 0; part < 4; part++) {
      const __mmask16 mask = __mmask16(bits >> (16 * part));
      if (!mask) continue;
      const int64_t at = word * 64 + 16 * part;
      const __m512i row =
          _mm512_maskz_compress_epi32(mask, _mm512_maskz_loadu_epi32(mask, s.order + at));
      const __m512 value = _mm512_maskz_loadu_ps(mask, s.values + at);
      _mm512_storeu_ps(s.sorted_values + to, _mm512_maskz_compress_ps(mask, value));
      _mm512_storeu_si512(s.sorted_keys + to, row);
      to += __builtin_popcount(mask);
    }
  }
  int64_t i = 0;
  for (; i + 16 <= to; i += 16)
    _mm512_storeu_si512(
        s.sorted_keys + i,
        _mm512_i32gather_epi32(_mm512_loadu_si512(s.sorted_keys + i), (const int*)s.key_of, 4));
  for (; i < to; i++) s.sorted_keys[i] = s.key_of[s.sorted_keys[i]];
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
  double left = double(s.first_weight), left1 = double(s.first_ones);
  const double total = double(s.total), ones = double(s.ones);
  const uint32_t mask = (1u << s.weight_bits) - 1;
  Candidates c;
  for (int64_t j = 1; j <= b.last; j += kBlock) {
    const int64_t count = b.last - j + 1 < kBlock ? b.last - j + 1 : kBlock;
    if (s.weight_bits) {
      for (int64_t i = 0; i < count; i++) {
        const uint32_t key = r.keys[j + i - 1], w = key >> 1 & mask;
        c.left[i] = left += double(w);
        c.a[i] = left1 += double(key & 1 ? w : 0);
      }
    } else {
      for (int64_t i = 0; i < count; i++) {
        c.left[i] = left += 1.0;
        c.a[i] = left1 += double(r.keys[j + i - 1] & 1);
      }
    }
    const int64_t skip = b.first > j ? b.first - j : 0;
    if (skip >= count || !any_border(r, j + skip, count - skip)) continue;
    for (int64_t i = 0; i < count; i++) {
      const double nl = c.left[i], nr = total - nl, l1 = c.a[i], l0 = nl - l1;
      const double r1 = ones - l1, r0 = nr - r1;
      const double gl = 1.0 - (l0 * l0 + l1 * l1) / (nl * nl);
      const double gr = 1.0 - (r0 * r0 + r1 * r1) / (nr * nr);
      const double proxy = -nr * gr - nl * gl;
      c.proxy[i] = (nl < s.least_weight) | (nr < s.least_weight) ? kNone : proxy;
    }
    take_best(r, c.proxy + skip, j + skip, count - skip, best);
  }
  return best;
}

static int64_t partition_rows(uint32_t* keys, int64_t n, int shift, ColumnRanks ranks,
                              uint32_t below, uint32_t from, uint32_t* spare) {
  int64_t left = 0, right = 0;
  for (int64_t i = 0; i < n; i++) {
    const uint32_t key = keys[i], place = rank_of(ranks, key, shift);
    const bool go = (place < below) | (place >= from);
    keys[left] = key, spare[right] = key;
    left += go, right += !go;
  }
  __builtin_memcpy(keys + left, spare, size_t(right) * 4);
  return left;
}

static int64_t partition_codes(uint32_t* keys, int64_t n, int shift, const uint8_t* codes, int last,
                               uint32_t* spare) {
  int64_t left = 0, right = 0;
  for (int64_t i = 0; i < n; i++) {
    const uint32_t key = keys[i];
    const bool go = codes[key >> shift] <= last;
    keys[left] = key, spare[right] = key;
    left += go, right += !go;
  }
  __builtin_memcpy(keys + left, spare, size_t(right) * 4);
  return left;
}

constexpr int64_t kHandful = 24;

static void sorted_handful(const NodeSort& s) {
  uint64_t sorted[kHandful];
  for (int64_t i = 0; i < s.n; i++) {
    const uint32_t key = s.keys[i];
    const uint64_t mine = uint64_t(rank_of(s.ranks, key, s.shift)) << 32 | key;
    int64_t at = i;
    for (; at > 0 && sorted[at - 1] > mine; at--) sorted[at] = sorted[at - 1];
    sorted[at] = mine;
  }
  for (int64_t i = 0; i < s.n; i++) {
    s.sorted_values[i] = value_of(s, uint32_t(sorted[i]), uint32_t(sorted[i] >> 32));
    s.sorted_keys[i] = uint32_t(sorted[i]);
  }
}

static void sorted_of_dense(const NodeSort& s) {
  int64_t to = 0;
  for (int64_t word = 0; word * 64 < s.rows; word++) {
    for (uint64_t bits = s.bits[word]; bits; bits &= bits - 1) {
      const int64_t at = word * 64 + __builtin_ctzll(bits);
      s.sorted_values[to] = s.values[at];
      s.sorted_keys[to++] = s.key_of[s.order[at]];
    }
    s.bits[word] = 0;
  }
}

#endif

template <int kPasses>
FASTNN_INLINE void sorted_by_digits(const NodeSort& s, int bits_of_rank) {
  constexpr int kMost = 2048;
  uint32_t place[kPasses][kMost];
  const int digit = (bits_of_rank + kPasses - 1) / kPasses;
  const uint32_t mask = (1u << digit) - 1;
  for (int p = 0; p < kPasses; p++)
    for (uint32_t i = 0; i <= mask; i++) place[p][i] = 0;
  uint64_t *from = s.records, *to = s.records + s.n;
  for (int64_t i = 0; i < s.n; i++) {
    const uint32_t key = s.keys[i], rank = rank_of(s.ranks, key, s.shift);
    from[i] = uint64_t(rank) << 32 | key;
    for (int p = 0; p < kPasses; p++) place[p][rank >> (p * digit) & mask]++;
  }
  for (int p = 0; p < kPasses; p++) {
    uint32_t sum = 0;
    for (uint32_t i = 0; i <= mask; i++) {
      const uint32_t count = place[p][i];
      place[p][i] = sum, sum += count;
    }
    const int by = 32 + p * digit;
    if (p < kPasses - 1) {
      for (int64_t i = 0; i < s.n; i++) {
        const uint64_t record = from[i];
        to[place[p][record >> by & mask]++] = record;
      }
    } else {
      for (int64_t i = 0; i < s.n; i++) {
        const uint64_t record = from[i];
        const uint32_t at = place[p][record >> by & mask]++;
        s.sorted_values[at] = value_of(s, uint32_t(record), uint32_t(record >> 32));
        s.sorted_keys[at] = uint32_t(record);
      }
    }
    uint64_t* other = from;
    from = to, to = other;
  }
}

// A large part of the column: a bit is set for every rank, and the bits are read in order. A small
// part is sorted by the ranks' digits, and a handful of rows by counting or insertion.
static void sort_node(const NodeSort& s) {
  if (s.n <= kHandful) {
    sorted_handful(s);
    return;
  }
  if (s.n * kDenseShare >= s.rows) {
    for (int64_t i = 0; i < s.n; i++) {
      const uint32_t rank = rank_of(s.ranks, s.keys[i], s.shift);
      s.bits[rank >> 6] |= uint64_t(1) << (rank & 63);
    }
    sorted_of_dense(s);
    return;
  }
  int bits = 1;
  while (s.rows >> bits) bits++;
  if (bits <= 22 && (s.n >= 512 || bits <= 14))
    sorted_by_digits<2>(s, bits);
  else
    sorted_by_digits<3>(s, bits);
}

FASTNN_INLINE int64_t weight_in(const ManyClasses& s, uint32_t key) {
  if (s.weights) return s.weights[key >> (s.class_bits + s.weight_bits)];
  return s.weight_bits ? int64_t(key >> s.class_bits & ((1u << s.weight_bits) - 1)) : 1;
}

// Few candidates among many equal values: only weights are kept up, and squared for a candidate.
// Squares of sums up to this stay below 2^31.
constexpr int64_t kMostSquared = 46340;
constexpr int kMostFew = 64;  // classes

static BestCandidate many_classes_few_borders(const ManyClasses& s, Bounds b) {
  const SplitRange& r = s.range;
  BestCandidate best{kNone, 0};
  alignas(64) int32_t left_of[kMostFew] = {}, all_of[kMostFew] = {};
  const int vectors = (s.classes + 15) / 16;
  for (int c = 0; c < s.classes; c++)
    left_of[c] = int32_t(s.left[c]), all_of[c] = int32_t(s.left[c] + s.right[c]);
  const uint32_t mask = (1u << s.class_bits) - 1;
  const double total = double(s.total);
  int64_t left = s.first_weight;
  for (int64_t j = 1; j <= b.last; j++) {
    const uint32_t key = r.keys[j - 1];
    const int32_t w = int32_t(weight_in(s, key));
    left_of[key & mask] += w, left += w;
    if (j < b.first || !(r.values[j] > r.values[j - 1] + kFeatureThreshold)) continue;
    const double nl = double(left), nr = total - nl;
    if (nl < s.least_weight || nr < s.least_weight) continue;
    int32_t sl = 0, sr = 0;
    for (int v = 0; v < vectors; v++)
      for (int c = 16 * v; c < 16 * v + 16; c++) {
        const int32_t l = left_of[c], o = all_of[c] - l;
        sl += l * l, sr += o * o;
      }
    const double gl = 1.0 - double(sl) / (nl * nl), gr = 1.0 - double(sr) / (nr * nr);
    const double proxy = -nr * gr - nl * gl;
    if (proxy > best.proxy) best = {proxy, j};
  }
  return best;
}

static BestCandidate many_classes(const ManyClasses& s) {
  const SplitRange& r = s.range;
  const Bounds b = bounds_of(r);
  BestCandidate best{kNone, 0};
  if (b.first > b.last) return best;
  int64_t borders = 0;
  for (int64_t j = b.first; j <= b.last; j++)
    borders += r.values[j] > r.values[j - 1] + kFeatureThreshold;
  if (borders == 0) return best;
  if (s.classes <= kMostFew && s.total <= kMostSquared &&
      borders * (4 + (s.classes + 15) / 16 * 4) < 2 * r.n)
    return many_classes_few_borders(s, b);
  const uint32_t classes = (1u << s.class_bits) - 1;
  int64_t left = s.first_weight, sl = s.square_left, sr = s.square_right;
  const double total = double(s.total);
  Candidates c;
  for (int64_t j = 1; j <= b.last; j += kBlock) {
    const int64_t count = b.last - j + 1 < kBlock ? b.last - j + 1 : kBlock;
    for (int64_t i = 0; i < count; i++) {
      const uint32_t key = r.keys[j + i - 1];
      const int64_t w = weight_in(s, key);
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

// 16 classes.
typedef int32_t Lanes __attribute__((vector_size(64)));

// The sums of three vectors' lanes.
FASTNN_INLINE void sums_of(Lanes a, Lanes b, Lanes c, int32_t* sums) {
#if FASTNN_TARGET_ID == 2
  const __m512i x = (__m512i)a, y = (__m512i)b, z = (__m512i)c, zero = _mm512_setzero_si512();
  const __m512i xy = _mm512_add_epi32(_mm512_unpacklo_epi32(x, y), _mm512_unpackhi_epi32(x, y));
  const __m512i z0 =
      _mm512_add_epi32(_mm512_unpacklo_epi32(z, zero), _mm512_unpackhi_epi32(z, zero));
  const __m512i all =
      _mm512_add_epi32(_mm512_unpacklo_epi64(xy, z0), _mm512_unpackhi_epi64(xy, z0));
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  _mm_storeu_si128((__m128i*)sums,
                   _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
#elif FASTNN_TARGET_ID == 1
  typedef int32_t Half __attribute__((vector_size(32)));
  union Halves {
    Lanes whole;
    Half of[2];
  };
  const Halves x{a}, y{b}, z{c};
  const __m256i first = (__m256i)(x.of[0] + x.of[1]), second = (__m256i)(y.of[0] + y.of[1]);
  const __m256i third = (__m256i)(z.of[0] + z.of[1]);
  const __m256i both = _mm256_hadd_epi32(_mm256_hadd_epi32(first, second),
                                         _mm256_hadd_epi32(third, _mm256_setzero_si256()));
  _mm_storeu_si128((__m128i*)sums,
                   _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1)));
#else
  sums[0] = sums[1] = sums[2] = 0;
  for (int i = 0; i < 16; i++) sums[0] += a[i], sums[1] += b[i], sums[2] += c[i];
#endif
}

// Each cell counts its weight below and its rows above 16 bits. Rows go into the tables by turns: a
// cell is then seldom asked for before it is written. A bit for each code that is there.
template <int kLanes, bool kWeighted>
FASTNN_INLINE uint32_t count_codes(const FewValues& s, int32_t* table) {
  const int shift = s.shift, class_bits = s.class_bits;
  const uint32_t classes = (1u << class_bits) - 1, weights = (1u << s.weight_bits) - 1;
  const uint32_t* keys = s.keys;
  const uint8_t* codes = s.codes;
  const int64_t n = s.n;
  uint32_t there = 0;
  auto count = [&](int64_t i, int32_t* to) __attribute__((always_inline)) {
    const uint32_t key = keys[i], code = codes[key >> shift];
    there |= 1u << code;
    to[code * kLanes + (key & classes)] +=
        kWeighted ? int32_t((key >> class_bits & weights) + 65536) : 65537;
  };
  int64_t i = 0;
  for (; i + kFewTables <= n; i += kFewTables)
    for (int t = 0; t < kFewTables; t++) count(i + t, table + t * kMostFewValues * kLanes);
  for (; i < n; i++) count(i, table + (i % kFewTables) * kMostFewValues * kLanes);
  return there;
}

// Weights of a side are squared class by class, a vector at a time.
template <int kVectors>
FASTNN_INLINE FewBest few_values_of(const FewValues& s) {
  constexpr int kLanes = 16 * kVectors, kTable = kMostFewValues * kLanes;
  int32_t* table = s.table;
  const uint32_t there =
      s.weight_bits ? count_codes<kLanes, true>(s, table) : count_codes<kLanes, false>(s, table);
  int codes[kMostFewValues], number = 0;
  for (uint32_t rest = there; rest; rest &= rest - 1) codes[number++] = __builtin_ctz(rest);
  FewBest best{kNone, 0, 0, 0, number == 1};
  Lanes left[kVectors] = {};
  alignas(64) int32_t squares_left[kMostFewValues], squares_right[kMostFewValues];
  alignas(64) int32_t of_left[kMostFewValues];
  alignas(64) double proxy[kMostFewValues];
  for (int k = 0; k < number; k++) {
    Lanes sl = {}, sr = {}, sum = {};
    for (int v = 0; v < kVectors; v++) {
      auto* cells = (Lanes*)(table + codes[k] * kLanes) + v;
      for (int t = 0; t < kFewTables; t++) {
        left[v] += cells[t * kTable / 16];
        cells[t * kTable / 16] = Lanes{};
      }
      const Lanes l = left[v] & 65535, o = ((const Lanes*)s.all)[v] - l;
      sum += left[v], sl += l * l, sr += o * o;
    }
    int32_t sums[4];
    sums_of(sl, sr, sum, sums);
    squares_left[k] = sums[0], squares_right[k] = sums[1], of_left[k] = sums[2];
  }
  const double total = double(s.total);
  for (int k = 0; k + 1 < number; k++) {
    const double nl = double(of_left[k] & 65535), nr = total - nl;
    const double gl = 1.0 - double(squares_left[k]) / (nl * nl);
    const double gr = 1.0 - double(squares_right[k]) / (nr * nr);
    const double p = -nr * gr - nl * gl;
    proxy[k] = (nl < s.least_weight) | (nr < s.least_weight) ? kNone : p;
  }
  for (int k = 0; k + 1 < number; k++) {
    if (!(proxy[k] > best.proxy)) continue;
    const int64_t rows = of_left[k] >> 16;
    if (rows >= s.least && rows <= s.most) best = {proxy[k], rows, codes[k], codes[k + 1], false};
  }
  return best;
}

static FewBest few_values(const FewValues& s) {
  return s.lanes == 16 ? few_values_of<1>(s) : few_values_of<4>(s);
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

#include "tree/buckets.inl"

static const TreeKernels tree_table = {partition,       partition_rows, partition_codes,
                                       sort_node,       few_values,     two_classes,
                                       best_in_buckets, many_classes,   one_target};

}  // namespace fastnn::FASTNN_TARGET
