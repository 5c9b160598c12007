// The kernels of the search among bins. Included once by each file in kernels/, which defines
// FASTNN_TARGET; see isa/vec.hpp for why nothing here may be shared between targets.
#include "tree/binned.hpp"

#ifndef FASTNN_INLINE
#define FASTNN_INLINE inline __attribute__((always_inline))
#endif
#if FASTNN_TARGET_ID >= 1
#include <immintrin.h>
#endif

namespace fastnn::FASTNN_TARGET {

static void add_two_classes(const BinnedRows& r, const uint64_t* word_of, uint64_t* sums) {
  const uint32_t mask = (1u << r.shift) - 1;
  for (int64_t i = 0; i < r.n; i++) {
    const uint32_t key = r.keys[i];
    sums[r.column[key >> r.shift]] += word_of[key & mask];
  }
}

static void add_many_classes(const BinnedRows& r, int class_bits, const uint64_t* word_of,
                             uint64_t* sums) {
  const uint32_t mask = (1u << r.shift) - 1, classes = (1u << class_bits) - 1;
  for (int64_t i = 0; i < r.n; i++) {
    const uint32_t key = r.keys[i];
    sums[(key & classes) * kBinSlots + r.column[key >> r.shift]] +=
        word_of[(key & mask) >> class_bits];
  }
}

typedef int64_t PairOfSums __attribute__((vector_size(16)));

static void add_pairs(const BinnedRows& r, const int64_t* pairs, int64_t* sums) {
  const auto* from = (const PairOfSums*)pairs;
  auto* to = (PairOfSums*)sums;
  for (int64_t i = 0; i < r.n; i++) to[r.column[r.keys[i] >> r.shift]] += from[i];
}

static void subtract_words(uint64_t* parent, const uint64_t* child, int64_t words) {
  for (int64_t i = 0; i < words; i++) parent[i] -= child[i];
}

constexpr double kNoProxy = -__builtin_inf();

// First and last bin of a node that have rows.
struct FilledBins {
  int first = kBinSlots, last = -1;
  FASTNN_INLINE void add(int group, uint32_t mask) {
    if (first == kBinSlots) first = group + __builtin_ctz(mask);
    last = group + 31 - __builtin_clz(mask);
  }
  FASTNN_INLINE bool constant(bool any_missing) const {
    return last < 0 || (!any_missing && first == last);
  }
};

// How many rows may go left. A side has a row at least; where missing values go left, one of the
// others goes with them.
struct LeftLimits {
  int64_t least, most;
  FASTNN_INLINE LeftLimits(const BinScan& s, int64_t missing_before)
      : least(missing_before + 1), most(s.n - s.least) {
    if (least < s.least) least = s.least;
  }
};

// -(nr * gini_right) - nl * gini_left, in scikit-learn's order of operations.
FASTNN_INLINE double gini_proxy(double nl, double square_left, double nr, double square_right) {
  const double gl = 1.0 - square_left / (nl * nl), gr = 1.0 - square_right / (nr * nr);
  return -nr * gr - nl * gl;
}

constexpr uint64_t kField = (uint64_t(1) << kFieldBits) - 1;

// The decrease of the impurity, up to factors, is d^2 / (nl nr) with d = total left1 - ones nl,
// which is exact; that it reaches another is asked without a division, with a margin for the
// roundings of the proxies. The proxies are computed of the few bins that reach the best so far.
struct Reach {
  double slack, best, least;
  FASTNN_INLINE Reach(double total, double enough)
      : slack(4e-15 * total * total), best(-1), least(0) {
    raise(enough);
  }
  FASTNN_INLINE void raise(double decrease) {
    if (!(decrease > best)) return;
    best = decrease;
    least = decrease * (1 - 1e-12) - slack;
  }
};

#if FASTNN_TARGET_ID == 2

// Sums of the lanes up to each.
FASTNN_INLINE __m512i running_sums(__m512i v) {
  const __m512i zero = _mm512_setzero_si512();
  v = _mm512_add_epi64(v, _mm512_alignr_epi64(v, zero, 7));
  v = _mm512_add_epi64(v, _mm512_alignr_epi64(v, zero, 6));
  return _mm512_add_epi64(v, _mm512_alignr_epi64(v, zero, 4));
}

static BestBorder two_classes_in_bins(const TwoClassScan& scan) {
  const BinScan& s = scan.of;
  BestBorder best{kNoProxy, -1, -1, 0, false, false, 0};
  const uint64_t missing = s.missing ? s.sums[kMissingBin] : 0;
  const double total_scalar = double(int64_t(scan.all >> kFieldBits & kField));
  const __m512d total = _mm512_set1_pd(total_scalar);
  const __m512d ones = _mm512_set1_pd(double(int64_t(scan.all >> (2 * kFieldBits))));
  const __m512d least_weight = _mm512_set1_pd(s.least_weight), one = _mm512_set1_pd(1);
  const __m512i field = _mm512_set1_epi64(int64_t(kField)), last_lane = _mm512_set1_epi64(7);
  FilledBins filled;
  Reach reach(total_scalar, scan.enough);
  for (int pass = 0; pass < (missing ? 2 : 1); pass++) {
    const LeftLimits limits(s, pass ? int64_t(missing & kField) : 0);
    const __m512i least = _mm512_set1_epi64(limits.least), most = _mm512_set1_epi64(limits.most);
    __m512i carry = _mm512_set1_epi64(pass ? int64_t(missing) : 0);
    for (int bin = 0; bin < s.bins; bin += 8) {
      __m512i word = _mm512_loadu_si512(s.sums + bin);
      __mmask8 there = _mm512_test_epi64_mask(word, word);
      if (bin == 248) {
        there &= 127;
        word = _mm512_maskz_mov_epi64(there, word);
      }
      if (!there) continue;
      if (!pass) filled.add(bin, there);
      word = _mm512_add_epi64(running_sums(word), carry);
      carry = _mm512_permutexvar_epi64(last_lane, word);
      const __m512i count = _mm512_and_si512(word, field);
      __mmask8 valid = _mm512_mask_cmpge_epi64_mask(there, count, least);
      valid = _mm512_mask_cmple_epi64_mask(valid, count, most);
      if (!valid) continue;
      const __m512d nl =
          _mm512_cvtepi64_pd(_mm512_and_si512(_mm512_srli_epi64(word, kFieldBits), field));
      const __m512d left1 = _mm512_cvtepi64_pd(_mm512_srli_epi64(word, 2 * kFieldBits));
      const __m512d nr = _mm512_sub_pd(total, nl);
      const __m512d d = _mm512_fmsub_pd(total, left1, _mm512_mul_pd(ones, nl));
      const __m512d square = _mm512_mul_pd(d, d), product = _mm512_mul_pd(nl, nr);
      valid = _mm512_mask_cmp_pd_mask(
          valid, square, _mm512_mul_pd(_mm512_set1_pd(reach.least), product), _CMP_GE_OQ);
      if (!valid) continue;
      valid = _mm512_mask_cmp_pd_mask(valid, nl, least_weight, _CMP_GE_OQ);
      valid = _mm512_mask_cmp_pd_mask(valid, nr, least_weight, _CMP_GE_OQ);
      if (!valid) continue;
      const __m512d left0 = _mm512_sub_pd(nl, left1), right1 = _mm512_sub_pd(ones, left1);
      const __m512d right0 = _mm512_sub_pd(nr, right1);
      const __m512d sl = _mm512_add_pd(_mm512_mul_pd(left0, left0), _mm512_mul_pd(left1, left1));
      const __m512d sr =
          _mm512_add_pd(_mm512_mul_pd(right0, right0), _mm512_mul_pd(right1, right1));
      const __m512d gl = _mm512_sub_pd(one, _mm512_div_pd(sl, _mm512_mul_pd(nl, nl)));
      const __m512d gr = _mm512_sub_pd(one, _mm512_div_pd(sr, _mm512_mul_pd(nr, nr)));
      const __m512d proxy = _mm512_sub_pd(_mm512_mul_pd(_mm512_sub_pd(_mm512_setzero_pd(), nr), gr),
                                          _mm512_mul_pd(nl, gl));
      reach.raise(_mm512_mask_reduce_max_pd(valid, _mm512_div_pd(square, product)));
      const double largest = _mm512_mask_reduce_max_pd(valid, proxy);
      if (!(largest > best.proxy)) continue;
      const __mmask8 at =
          _mm512_mask_cmp_pd_mask(valid, proxy, _mm512_set1_pd(largest), _CMP_EQ_OQ);
      const int lane = __builtin_ctz(at);
      alignas(64) uint64_t words[8];
      _mm512_store_si512(words, word);
      best.proxy = largest, best.bin = bin + lane, best.word = words[lane];
      best.missing_left = pass != 0;
    }
  }
  best.constant = filled.constant(missing != 0);
  best.decrease = reach.best;
  best.left = int64_t(best.word & kField);
  return best;
}

#else

static BestBorder two_classes_in_bins(const TwoClassScan& scan) {
  const BinScan& s = scan.of;
  BestBorder best{kNoProxy, -1, -1, 0, false, false, 0};
  const uint64_t missing = s.missing ? s.sums[kMissingBin] : 0;
  const double total = double(int64_t(scan.all >> kFieldBits & kField));
  const double ones = double(int64_t(scan.all >> (2 * kFieldBits)));
  FilledBins filled;
  Reach reach(total, scan.enough);
  for (int pass = 0; pass < (missing ? 2 : 1); pass++) {
    const LeftLimits limits(s, pass ? int64_t(missing & kField) : 0);
    uint64_t word = pass ? missing : 0;
    for (int bin = 0; bin < s.bins; bin++) {
      if (!s.sums[bin]) continue;
      if (!pass) filled.add(bin, 1);
      word += s.sums[bin];
      const auto count = int64_t(word & kField);
      if (count < limits.least || count > limits.most) continue;
      const double nl = double(int64_t(word >> kFieldBits & kField)), nr = total - nl;
      const double left1 = double(int64_t(word >> (2 * kFieldBits)));
      const double d = total * left1 - ones * nl, square = d * d, product = nl * nr;
      if (!(square >= reach.least * product)) continue;
      if (nl < s.least_weight || nr < s.least_weight) continue;
      const double left0 = nl - left1, right1 = ones - left1, right0 = nr - right1;
      const double proxy =
          gini_proxy(nl, left0 * left0 + left1 * left1, nr, right0 * right0 + right1 * right1);
      reach.raise(square / product);
      if (!(proxy > best.proxy)) continue;
      best.proxy = proxy, best.bin = bin, best.word = word;
      best.missing_left = pass != 0;
    }
  }
  best.constant = filled.constant(missing != 0);
  best.decrease = reach.best;
  best.left = int64_t(best.word & kField);
  return best;
}

#endif

// Eight bins at a time.
struct EightBins {
  uint64_t weight_and_rows[8], square_left[8], square_right[8];
};

// What one class adds to eight bins; `left` is its word before them.
FASTNN_INLINE void add_class(const uint64_t* words, uint64_t& left, uint64_t all, EightBins& to) {
#if FASTNN_TARGET_ID == 2
  const __m512i low = _mm512_set1_epi64(0xffffffff);
  const __m512i word =
      _mm512_add_epi64(running_sums(_mm512_loadu_si512(words)), _mm512_set1_epi64(int64_t(left)));
  const __m512i l = _mm512_and_si512(word, low);
  const __m512i o = _mm512_sub_epi64(_mm512_set1_epi64(int64_t(all & 0xffffffff)), l);
  const auto add = [](uint64_t* p, __m512i v) __attribute__((always_inline)) {
    _mm512_storeu_si512(p, _mm512_add_epi64(_mm512_loadu_si512(p), v));
  };
  add(to.weight_and_rows, word);
  add(to.square_left, _mm512_mul_epu32(l, l));
  add(to.square_right, _mm512_mul_epu32(o, o));
  left = uint64_t(_mm_cvtsi128_si64(_mm512_castsi512_si128(_mm512_alignr_epi64(word, word, 7))));
#else
  for (int i = 0; i < 8; i++) {
    left += words[i];
    const uint64_t l = left & 0xffffffff, o = (all & 0xffffffff) - l;
    to.weight_and_rows[i] += left, to.square_left[i] += l * l, to.square_right[i] += o * o;
  }
#endif
}

static BestBorder many_classes_in_bins(const ManyClassScan& scan) {
  const BinScan& s = scan.of;
  BestBorder best{kNoProxy, -1, -1, 0, false, false, 0};
  constexpr int kMost = 64;
  uint64_t left[kMost], missing = 0, all = 0;
  for (int c = 0; c < scan.classes; c++) {
    if (s.missing) missing += s.sums[c * kBinSlots + kMissingBin];
    all += scan.all[c];
  }
  const double total = double(all & 0xffffffff);
  FilledBins filled;
  for (int pass = 0; pass < (missing ? 2 : 1); pass++) {
    const LeftLimits limits(s, pass ? int64_t(missing >> 32) : 0);
    for (int c = 0; c < scan.classes; c++) left[c] = pass ? s.sums[c * kBinSlots + kMissingBin] : 0;
    for (int bin = 0; bin < s.bins; bin += 8) {
      uint64_t any[8] = {};
      for (int c = 0; c < scan.classes; c++)
        for (int i = 0; i < 8; i++) any[i] |= s.sums[c * kBinSlots + bin + i];
      if (bin == 248) any[7] = 0;
      uint32_t there = 0;
      for (int i = 0; i < 8; i++) there |= uint32_t(any[i] != 0) << i;
      if (!there) continue;
      if (!pass) filled.add(bin, there);
      EightBins e = {};
      for (int c = 0; c < scan.classes; c++)
        add_class(s.sums + c * kBinSlots + bin, left[c], scan.all[c], e);
      double proxy[8];
      for (int i = 0; i < 8; i++) {
        const double nl = double(int64_t(e.weight_and_rows[i] & 0xffffffff)), nr = total - nl;
        proxy[i] = gini_proxy(nl, double(int64_t(e.square_left[i])), nr,
                              double(int64_t(e.square_right[i])));
      }
      for (uint32_t rest = there; rest; rest &= rest - 1) {
        const int i = __builtin_ctz(rest);
        const auto count = int64_t(e.weight_and_rows[i] >> 32);
        if (count < limits.least || count > limits.most || !(proxy[i] > best.proxy)) continue;
        const double nl = double(int64_t(e.weight_and_rows[i] & 0xffffffff));
        if (nl < s.least_weight || total - nl < s.least_weight) continue;
        best.proxy = proxy[i], best.bin = bin + i, best.left = count;
        best.missing_left = pass != 0;
      }
    }
  }
  best.constant = filled.constant(missing != 0);
  return best;
}

static BestBorder one_target_in_bins(const OneTargetScan& scan) {
  const BinScan& s = scan.of;
  BestBorder best{kNoProxy, -1, -1, 0, false, false, 0};
  const auto* sums = (const int64_t*)s.sums;
  const int64_t missing = s.missing ? sums[2 * kMissingBin + 1] : 0;
  const double total = double(scan.weight);
  FilledBins filled;
  for (int pass = 0; pass < (missing ? 2 : 1); pass++) {
    const LeftLimits limits(s, pass ? missing >> 32 : 0);
    int64_t sum = pass ? sums[2 * kMissingBin] : 0, left = pass ? missing : 0;
    for (int bin = 0; bin < s.bins; bin += 8) {
      double a[8], nl[8], proxy[8];
      int64_t count[8];
      uint32_t there = 0;
      const int some = s.bins - bin < 8 ? s.bins - bin : 8;
      for (int i = 0; i < some; i++) {
        const int64_t word = sums[2 * (bin + i) + 1];
        there |= uint32_t(word != 0) << i;
        sum += sums[2 * (bin + i)], left += word;
        a[i] = double(sum), nl[i] = double(left & 0xffffffff), count[i] = left >> 32;
      }
      if (!there) continue;
      if (!pass) filled.add(bin, there);
      for (int i = some; i < 8; i++) a[i] = nl[i] = 0;
      for (int i = 0; i < 8; i++) {
        const double l = a[i] * scan.unit, r = double(scan.sum) * scan.unit - l;
        proxy[i] = l * l / nl[i] + r * r / (total - nl[i]);
      }
      for (uint32_t rest = there; rest; rest &= rest - 1) {
        const int i = __builtin_ctz(rest);
        if (count[i] < limits.least || count[i] > limits.most || !(proxy[i] > best.proxy)) continue;
        if (nl[i] < s.least_weight || total - nl[i] < s.least_weight) continue;
        best.proxy = proxy[i], best.bin = bin + i, best.left = count[i];
        best.missing_left = pass != 0;
      }
    }
  }
  best.constant = filled.constant(missing != 0);
  return best;
}

// A handful by insertion, more by counting.
static void sort_by_bins(const BinnedRows& r, uint32_t* counts, uint32_t* sorted) {
  constexpr int64_t kHandfulOfRows = 24;
  if (r.n <= kHandfulOfRows) {
    uint8_t bins[kHandfulOfRows];
    for (int64_t i = 0; i < r.n; i++) {
      const uint32_t key = r.keys[i];
      const uint8_t bin = r.column[key >> r.shift];
      int64_t at = i;
      for (; at > 0 && bins[at - 1] > bin; at--)
        bins[at] = bins[at - 1], sorted[at] = sorted[at - 1];
      bins[at] = bin, sorted[at] = key;
    }
    return;
  }
  for (int b = 0; b < kBinSlots; b++) counts[b] = 0;
  for (int64_t i = 0; i < r.n; i++) counts[r.column[r.keys[i] >> r.shift]]++;
  uint32_t sum = 0;
  for (int b = 0; b < kBinSlots; b++) {
    const uint32_t count = counts[b];
    counts[b] = sum, sum += count;
  }
  for (int64_t i = 0; i < r.n; i++) sorted[counts[r.column[r.keys[i] >> r.shift]]++] = r.keys[i];
}

static int64_t partition_by_bins(const BinnedRows& r, uint32_t below, uint32_t from, uint32_t* keys,
                                 uint32_t* spare) {
  int64_t left = 0, right = 0, i = 0;
#if FASTNN_TARGET_ID == 2
  const __m128i by = _mm_cvtsi32_si128(r.shift);
  const __m512i byte = _mm512_set1_epi32(255);
  const __m512i low = _mm512_set1_epi32(int(below)), high = _mm512_set1_epi32(int(from));
  for (; i + 16 <= r.n; i += 16) {
    const __m512i key = _mm512_loadu_si512(keys + i);
    // Reads three bytes beyond the row's: columns have room for them.
    const __m512i bin =
        _mm512_and_si512(_mm512_i32gather_epi32(_mm512_srl_epi32(key, by), r.column, 1), byte);
    const __mmask16 go = _mm512_cmplt_epu32_mask(bin, low) | _mm512_cmpge_epu32_mask(bin, high);
    _mm512_storeu_si512(keys + left, _mm512_maskz_compress_epi32(go, key));
    _mm512_storeu_si512(spare + right, _mm512_maskz_compress_epi32(__mmask16(~go), key));
    const int moved = __builtin_popcount(go);
    left += moved, right += 16 - moved;
  }
#endif
  for (; i < r.n; i++) {
    const uint32_t key = keys[i], bin = r.column[key >> r.shift];
    const bool go = (bin < below) | (bin >= from);
    keys[left] = key, spare[right] = key;
    left += go, right += !go;
  }
  __builtin_memcpy(keys + left, spare, size_t(right) * 4);
  return left;
}

static const BinnedKernels binned_table = {
    add_two_classes,      add_many_classes,   add_pairs,    subtract_words,   two_classes_in_bins,
    many_classes_in_bins, one_target_in_bins, sort_by_bins, partition_by_bins};

}  // namespace fastnn::FASTNN_TARGET
