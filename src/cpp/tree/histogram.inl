// The kernels of histograms. Included once by each file in kernels/, which defines FASTNN_TARGET;
// see isa/vec.hpp for why nothing here may be shared between targets.
#include "isa/vec.hpp"
#include "tree/histogram.hpp"

namespace fastnn::FASTNN_TARGET {

static float largest(const float* x, int64_t n) {
  constexpr int w = VecF32::width;
  VecF32 most = VecF32::zero(), sum = VecF32::zero();
  for (int64_t i = 0; i < n; i += w) {
    const VecF32 v = n - i >= w ? VecF32::load(x + i) : VecF32::load_partial(x + i, int(n - i));
    most = max(abs(v), most);
    sum = sum + (v - v);  // NaN of NaN and of infinity
  }
  float out = 0, m[w], s[w];
  most.store(m), sum.store(s);
  for (int i = 0; i < w; i++) {
    if (s[i] != s[i]) return s[i];
    if (m[i] > out) out = m[i];
  }
  return out;
}

// Rounded to the nearest integer, ties to even, |x| < 2^31: the low bits of x + 1.5 2^52.
FASTNN_INLINE int32_t to_integer(double x) {
  return int32_t(uint32_t(bit_cast<uint64_t>(x + 6755399441055744.0)));
}

static void count_below(const float* x, int64_t n, const float* limits, int64_t* counts) {
  int64_t a = 0, b = 0, c = 0;
  const float la = limits[0], lb = limits[1], lc = limits[2];
  constexpr int64_t kSome = 1024;  // whose counts are 32 bits
  for (int64_t i = 0; i < n;) {
    const int64_t end = n - i < kSome ? n : i + kSome;
    int32_t na = 0, nb = 0, nc = 0;
    for (; i < end; i++) {
      const float v = __builtin_fabsf(x[i]);
      const int32_t some = v > 0;
      na += some & int32_t(v < la), nb += some & int32_t(v < lb), nc += some & int32_t(v < lc);
    }
    a += na, b += nb, c += nc;
  }
  counts[0] = a, counts[1] = b, counts[2] = c;
}

// The same for |x| < 2^62. From 2^51 on x, which was a float32, has no fraction.
FASTNN_INLINE int64_t to_long_integer(double x) {
  constexpr double kFractions = 2251799813685248.0;
  if (!(x < kFractions && x > -kFractions)) return int64_t(x);
  return int64_t((x + 6755399441055744.0) - 6755399441055744.0);
}

static void integers(const SumFormat& format, const float* gradient, const float* hessian,
                     int64_t n, int32_t* out) {
  const double g = 1 / format.gradient_unit, h = 1 / format.hessian_unit;
  if (format.words == 1)
    for (int64_t i = 0; i < n; i++) out[i] = to_integer(gradient[i] * g);
  else if (format.words == 2)
    for (int64_t i = 0; i < n; i++) {
      out[2 * i] = to_integer(gradient[i] * g);
      out[2 * i + 1] = to_integer(hessian[i] * h);
    }
  else
    for (int64_t i = 0; i < n; i++) {
      const int64_t of_gradient = to_long_integer(gradient[i] * g);
      const int64_t of_hessian = to_long_integer(hessian[i] * h);
      out[4 * i] = int32_t(of_gradient >> kLowBits);
      out[4 * i + 1] = int32_t(of_gradient & kLowMask);
      out[4 * i + 2] = int32_t(of_hessian >> kLowBits);
      out[4 * i + 3] = int32_t(of_hessian & kLowMask);
    }
}

typedef int64_t Pair __attribute__((vector_size(16)));
typedef int64_t Quad __attribute__((vector_size(32), aligned(16)));

template <int words>
struct Sums;
template <>
struct Sums<4> {
  using T = Quad;
  static FASTNN_INLINE void get(const int32_t* integers, int64_t row, int bits, T& out) {
    const int32_t* i = integers + 4 * row;
    out = T{i[0], i[1], (int64_t(i[2]) << bits) + 1, i[3]};
  }
};
template <>
struct Sums<2> {
  using T = Pair;
  static FASTNN_INLINE void get(const int32_t* integers, int64_t row, int bits, T& out) {
    out = T{integers[2 * row], (int64_t(integers[2 * row + 1]) << bits) + 1};
  }
};
template <>
struct Sums<1> {
  using T = int64_t;
  static FASTNN_INLINE void get(const int32_t* integers, int64_t row, int bits, T& out) {
    out = (int64_t(integers[row]) << bits) + 1;
  }
};

template <int words, bool indexed>
static void add_rows(const HistogramKernels::Rows& rows, int bits) {
  using T = typename Sums<words>::T;
  constexpr int kAhead = 16;
  T* sums = reinterpret_cast<T*>(rows.sums);
  const int quads = rows.features / 4;
  for (int64_t i = 0; i < rows.count; i++) {
    const int64_t row = indexed ? rows.index[i] : rows.first + i;
    if (indexed && i + kAhead < rows.count) {
      const int64_t next = rows.index[i + kAhead];
      __builtin_prefetch(rows.bins + next * rows.width);
      __builtin_prefetch(rows.integers + next * words);
    }
    T add;
    Sums<words>::get(rows.integers, row, bits, add);
    const uint8_t* bins = rows.bins + row * rows.width;
    T* s = sums;
    for (int q = 0; q < quads; q++, s += 4 * HistogramKernels::kEntries, bins += 4) {
      uint32_t four;
      __builtin_memcpy(&four, bins, 4);
      s[four & 255] += add;
      s[HistogramKernels::kEntries + (four >> 8 & 255)] += add;
      s[2 * HistogramKernels::kEntries + (four >> 16 & 255)] += add;
      s[3 * HistogramKernels::kEntries + (four >> 24)] += add;
    }
  }
}
template <int words>
static void add_either(const HistogramKernels::Rows& rows, int bits) {
  rows.index ? add_rows<words, true>(rows, bits) : add_rows<words, false>(rows, bits);
}
static void add(const SumFormat& format, const HistogramKernels::Rows& rows) {
  const int bits = format.count_bits;
  if (format.words == 1)
    add_either<1>(rows, bits);
  else if (format.words == 2)
    add_either<2>(rows, bits);
  else
    add_either<4>(rows, bits);
}

static void subtract(const SumFormat& format, const FeatureBins& feature, int64_t* parent,
                     const int64_t* child) {
  const int words = format.words, n = feature.bins * words;
  for (int i = 0; i < n; i++) parent[i] -= child[i];
  for (int i = feature.missing * words; i < (feature.missing + 1) * words; i++)
    parent[i] -= child[i];
}

// The nearest float64, or the one beside it, whichever instructions compute it: the product is
// exact.
FASTNN_INLINE double of_limbs(int64_t high, int64_t low) {
  return double(high + (low >> kLowBits)) * double(kLowMask + 1) + double(low & kLowMask);
}

// Sums of the rows on the left of a split, in their units; with hessians of 1, their count.
struct LeftSums {
  int64_t gradient, hessian, count;
  int64_t gradient_low, hessian_low;  // of 4 words
};
struct SumReader {
  int words, bits;
  int64_t count_mask;
  double gradient_unit, hessian_unit;
  explicit SumReader(const SumFormat& f)
      : words(f.words),
        bits(f.count_bits),
        count_mask((int64_t(1) << f.count_bits) - 1),
        gradient_unit(f.gradient_unit),
        hessian_unit(f.words > 1 ? f.hessian_unit : 1) {}
  FASTNN_INLINE void add(const int64_t* sums, int bin, LeftSums& to) const {
    if (words == 4) {
      const int64_t third = sums[4 * bin + 2];
      to.gradient += sums[4 * bin];
      to.gradient_low += sums[4 * bin + 1];
      to.hessian += third >> bits;
      to.hessian_low += sums[4 * bin + 3];
      to.count += third & count_mask;
    } else if (words == 2) {
      const int64_t second = sums[2 * bin + 1];
      to.gradient += sums[2 * bin];
      to.hessian += second >> bits;
      to.count += second & count_mask;
    } else {
      const int64_t word = sums[bin];
      to.gradient += word >> bits;
      to.hessian += word & count_mask;
      to.count += word & count_mask;
    }
  }
  FASTNN_INLINE double gradient(const LeftSums& s) const {
    return words == 4 ? of_limbs(s.gradient, s.gradient_low) : double(s.gradient);
  }
  FASTNN_INLINE double hessian(const LeftSums& s) const {
    return words == 4 ? of_limbs(s.hessian, s.hessian_low) : double(s.hessian);
  }
};

static void total(const SumFormat& format, const int64_t* sums, double& gradient, double& hessian) {
  const SumReader reader(format);
  LeftSums all{};
  for (int bin = 0; bin < kMostBins; bin++) reader.add(sums, bin, all);
  gradient = reader.gradient(all) * reader.gradient_unit;
  hessian = reader.hessian(all) * reader.hessian_unit;
}

// A node's value: Equation 5 of Chen and Guestrin, XGBoost (2016).
FASTNN_INLINE double value_of(double gradient, double hessian, double lower, double upper,
                              double l2) {
  const double value = -gradient / (hessian + l2 + 1e-15);
  return value < lower ? lower : value > upper ? upper : value;
}

struct Candidate {
  double gradient, hessian, gain;
  int64_t count;
};

struct OneByOne {
  const SplitRules& rules;
  const SplitNode& node;
  int monotonic;
  double loss;  // of the node itself

  // Whether this is a split at all; `gain` of it.
  FASTNN_INLINE bool gain_of(Candidate& c) const {
    const double gradient_right = node.gradient - c.gradient;
    const double hessian_right = node.hessian - c.hessian;
    if (c.count < rules.min_samples || node.count - c.count < rules.min_samples ||
        c.hessian < rules.min_hessian || hessian_right < rules.min_hessian)
      return false;
    const double left = value_of(c.gradient, c.hessian, node.lower, node.upper, rules.l2);
    const double right = value_of(gradient_right, hessian_right, node.lower, node.upper, rules.l2);
    if ((monotonic > 0 && left > right) || (monotonic < 0 && left < right)) return false;
    c.gain = loss - c.gradient * left - gradient_right * right;
    return c.gain > rules.min_gain;
  }
  FASTNN_INLINE void take(const Candidate& c, int bin, bool missing_left,
                          FeatureSplit& best) const {
    best.gain = c.gain;
    best.gradient_left = c.gradient;
    best.hessian_left = c.hessian;
    best.count_left = c.count;
    best.bin = bin;
    best.missing_left = missing_left;
  }
};

// Bins are looked at in vectors. What is equal goes to the first of them, or where missing values
// go left to the last, as in a search from the right.
static void split_ordered(const SumFormat& format, const SplitRules& rules, const SplitNode& node,
                          const FeatureBins& feature, const int64_t* sums, FeatureSplit& best) {
  using V = VecF64;
  constexpr int w = V::width;
  const SumReader reader(format);
  const OneByOne one{rules, node, feature.monotonic, node.gradient * node.value};
  const V all_g = V::set1(node.gradient), all_h = V::set1(node.hessian),
          all_n = V::set1(double(node.count));
  const V l2 = V::set1(rules.l2), tiny = V::set1(1e-15), loss = V::set1(one.loss);
  const V lower = V::set1(node.lower), upper = V::set1(node.upper);
  const V min_n = V::set1(double(rules.min_samples)), min_h = V::set1(rules.min_hessian);
  const V none = V::set1(-1);
  for (int pass = 0; pass < 1 + feature.has_missing; pass++) {
    const int end = feature.bins - 1 + (feature.has_missing && pass == 0);
    LeftSums left{};
    if (pass) reader.add(sums, feature.missing, left);
    double top = best.gain > rules.min_gain ? best.gain : rules.min_gain;
    int top_bin = -1;
    for (int bin = 0; bin < end; bin += w) {
      double g[w], h[w], n[w];
      const int64_t count_before = left.count;
      const int some = end - bin < w ? end - bin : w;
      for (int i = 0; i < some; i++) {
        reader.add(sums, bin + i, left);
        g[i] = reader.gradient(left), h[i] = reader.hessian(left), n[i] = double(left.count);
      }
      if (left.count < rules.min_samples) continue;
      if (!pass && left.count == count_before) continue;  // nothing new
      if (node.count - count_before < rules.min_samples) break;
      for (int i = some; i < w; i++) g[i] = h[i] = n[i] = 0;
      const V gl = V::load(g) * V::set1(reader.gradient_unit);
      const V hl = V::load(h) * V::set1(reader.hessian_unit), nl = V::load(n);
      const V gr = all_g - gl, hr = all_h - hl, nr = all_n - nl;
      V vl = neg(gl) / (hl + l2 + tiny), vr = neg(gr) / (hr + l2 + tiny);
      vl = select(lt(vl, lower), lower, select(lt(upper, vl), upper, vl));
      vr = select(lt(vr, lower), lower, select(lt(upper, vr), upper, vr));
      V gain = loss - gl * vl - gr * vr;
      gain = select(lt(nl, min_n), none, gain);
      gain = select(lt(nr, min_n), none, gain);
      gain = select(lt(hl, min_h), none, gain);
      gain = select(lt(hr, min_h), none, gain);
      if (feature.monotonic > 0) gain = select(lt(vr, vl), none, gain);
      if (feature.monotonic < 0) gain = select(lt(vl, vr), none, gain);
      double gains[w];
      gain.store(gains);
      for (int i = 0; i < some; i++)
        if (gains[i] > top || (pass && top_bin >= 0 && gains[i] == top))
          top = gains[i], top_bin = bin + i;
    }
    if (top_bin < 0) continue;
    LeftSums at{};
    if (pass) reader.add(sums, feature.missing, at);
    for (int bin = 0; bin <= top_bin; bin++) reader.add(sums, bin, at);
    one.take({reader.gradient(at) * reader.gradient_unit, reader.hessian(at) * reader.hessian_unit,
              top, at.count},
             top_bin, pass, best);
  }
}

#if FASTNN_TARGET_ID == 2
// The same for values that nothing bounds. That a split gains more than another,
//   gl^2 / hl + gr^2 / hr > least,   gl^2 hr + gr^2 hl > least hl hr,
// is asked without a division; the few that may are computed as the others are.
template <bool wide>
static void split_unbounded(const SumFormat& format, const SplitRules& rules, const SplitNode& node,
                            const FeatureBins& feature, const int64_t* sums, double enough,
                            FeatureSplit& best) {
  constexpr double kMargin = 1 + 1e-9;  // many roundings
  const SumReader reader(format);
  const OneByOne one{rules, node, 0, node.gradient * node.value};
  const __m128i bits = _mm_cvtsi32_si128(format.count_bits);
  const __m512i count_mask = _mm512_set1_epi64(reader.count_mask), zero = _mm512_setzero_si512();
  const __m512i even = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
  const __m512i odd = _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15), last = _mm512_set1_epi64(7);
  const __m512d g_unit = _mm512_set1_pd(reader.gradient_unit);
  const __m512d h_unit = _mm512_set1_pd(reader.hessian_unit);
  const __m512d all_g = _mm512_set1_pd(node.gradient), all_h = _mm512_set1_pd(node.hessian);
  const __m512d l2 = _mm512_set1_pd(rules.l2), tiny = _mm512_set1_pd(1e-15);
  const __m512d min_h = _mm512_set1_pd(rules.min_hessian), none = _mm512_setzero_pd();
  const __m512i least_n = _mm512_set1_epi64(rules.min_samples);
  const __m512i most_n = _mm512_set1_epi64(node.count - rules.min_samples);
  const auto running = [&](__m512i v) __attribute__((always_inline)) {
    v = _mm512_add_epi64(v, _mm512_alignr_epi64(v, zero, 7));
    v = _mm512_add_epi64(v, _mm512_alignr_epi64(v, zero, 6));
    return _mm512_add_epi64(v, _mm512_alignr_epi64(v, zero, 4));
  };
  for (int pass = 0; pass < 1 + feature.has_missing; pass++) {
    const int end = feature.bins - 1 + (feature.has_missing && pass == 0);
    __m512i carry0 = zero, carry1 = zero;  // the words of the bins before
    if (pass) {
      carry0 = _mm512_set1_epi64(sums[feature.missing * (wide ? 2 : 1)]);
      if (wide) carry1 = _mm512_set1_epi64(sums[feature.missing * 2 + 1]);
    }
    double top = best.gain > rules.min_gain ? best.gain : rules.min_gain;
    int top_bin = -1;
    Candidate found{0, 0, 0, 0};
    for (int bin = 0; bin < end; bin += 8) {
      __m512i word0, word1 = zero;
      if (wide) {
        const __m512i a = _mm512_loadu_si512(sums + 2 * bin);
        const __m512i b = _mm512_loadu_si512(sums + 2 * bin + 8);
        word1 = _mm512_permutex2var_epi64(a, odd, b);
        if (!pass && !_mm512_test_epi64_mask(word1, count_mask)) continue;  // nothing new
        word0 = _mm512_permutex2var_epi64(a, even, b);
        word1 = _mm512_add_epi64(running(word1), carry1);
        carry1 = _mm512_permutexvar_epi64(last, word1);
      } else {
        word0 = _mm512_loadu_si512(sums + bin);
        if (!pass && !_mm512_test_epi64_mask(word0, count_mask)) continue;
      }
      word0 = _mm512_add_epi64(running(word0), carry0);
      carry0 = _mm512_permutexvar_epi64(last, word0);
      const __m512i n = _mm512_and_si512(wide ? word1 : word0, count_mask);
      const __mmask8 lanes = end - bin >= 8 ? __mmask8(255) : __mmask8((1u << (end - bin)) - 1);
      __mmask8 valid = _mm512_mask_cmpge_epi64_mask(lanes, n, least_n);
      valid = _mm512_mask_cmple_epi64_mask(valid, n, most_n);
      if (!valid) continue;
      const __m512d gl =
          _mm512_mul_pd(_mm512_cvtepi64_pd(wide ? word0 : _mm512_sra_epi64(word0, bits)), g_unit);
      const __m512d hl =
          _mm512_mul_pd(_mm512_cvtepi64_pd(wide ? _mm512_sra_epi64(word1, bits) : n), h_unit);
      const __m512d gr = _mm512_sub_pd(all_g, gl), hr = _mm512_sub_pd(all_h, hl);
      valid = _mm512_mask_cmp_pd_mask(valid, hl, min_h, _CMP_NLT_UQ);
      valid = _mm512_mask_cmp_pd_mask(valid, hr, min_h, _CMP_NLT_UQ);
      const __m512d dl = _mm512_add_pd(_mm512_add_pd(hl, l2), tiny);
      const __m512d dr = _mm512_add_pd(_mm512_add_pd(hr, l2), tiny);
      const __m512d both = _mm512_mul_pd(dl, dr);
      const __m512d gains =
          _mm512_fmadd_pd(_mm512_mul_pd(gl, gl), dr, _mm512_mul_pd(_mm512_mul_pd(gr, gr), dl));
      const double least = (top > enough ? top : enough) - one.loss;
      const __mmask8 may =
          _mm512_mask_cmp_pd_mask(valid, _mm512_mul_pd(gains, _mm512_set1_pd(kMargin)),
                                  _mm512_mul_pd(_mm512_set1_pd(least), both), _CMP_NLT_UQ) |
          _mm512_mask_cmp_pd_mask(valid, both, none, _CMP_NGT_UQ);
      if (!may) continue;
      const __m512d sign = _mm512_set1_pd(-0.0);
      const __m512d vl = _mm512_div_pd(_mm512_xor_pd(gl, sign), dl);
      const __m512d vr = _mm512_div_pd(_mm512_xor_pd(gr, sign), dr);
      double gain[8], g[8], h[8];
      int64_t count[8];
      _mm512_storeu_pd(gain,
                       _mm512_sub_pd(_mm512_sub_pd(_mm512_set1_pd(one.loss), _mm512_mul_pd(gl, vl)),
                                     _mm512_mul_pd(gr, vr)));
      _mm512_storeu_pd(g, gl), _mm512_storeu_pd(h, hl), _mm512_storeu_si512(count, n);
      for (unsigned rest = may; rest; rest &= rest - 1) {
        const int i = __builtin_ctz(rest);
        if (!(gain[i] > top || (pass && top_bin >= 0 && gain[i] == top))) continue;
        top = gain[i], top_bin = bin + i;
        found = {g[i], h[i], top, count[i]};
      }
    }
    if (top_bin >= 0) one.take(found, top_bin, pass, best);
  }
}
#endif

// Categories in the order of gradient / hessian, then as numbers, from both ends to the middle.
static void split_categories(const SumFormat& format, const SplitRules& rules,
                             const SplitNode& node, const FeatureBins& feature, const int64_t* sums,
                             FeatureSplit& best) {
  constexpr double kMinSupport = 10;
  const SumReader reader(format);
  const OneByOne one{rules, node, feature.monotonic, node.gradient * node.value};
  const double support = double(node.count) / node.hessian;
  int order[kMostBins], used = 0;
  double key[kMostBins];
  for (int i = 0; i < feature.bins + feature.has_missing; i++) {
    const int bin = i < feature.bins ? i : feature.missing;
    LeftSums s{};
    reader.add(sums, bin, s);
    const double hessian = reader.hessian(s) * reader.hessian_unit;
    if (!(hessian * support >= kMinSupport)) continue;
    const double k = reader.gradient(s) * reader.gradient_unit / (hessian + kMinSupport);
    int at = used++;  // stable
    for (; at > 0 && key[at - 1] > k; at--) key[at] = key[at - 1], order[at] = order[at - 1];
    key[at] = k, order[at] = bin;
  }
  if (used <= 1) return;
  int threshold = -1, direction = 0;
  for (int step = 1; step >= -1; step -= 2) {
    const int middle = (used + 1) / 2 - (step < 0);
    LeftSums left{};
    for (int i = 0; i < middle; i++) {
      const int at = step > 0 ? i : used - 1 - i;
      reader.add(sums, order[at], left);
      Candidate c{reader.gradient(left) * reader.gradient_unit,
                  reader.hessian(left) * reader.hessian_unit, 0, left.count};
      if (one.gain_of(c) && c.gain > best.gain) {
        one.take(c, 0, false, best);
        threshold = at, direction = step;
      }
    }
  }
  if (threshold < 0) return;
  for (int i = direction > 0 ? 0 : threshold; i < (direction > 0 ? threshold + 1 : used); i++)
    best.left[order[i] / 32] |= 1u << order[i] % 32;
  best.missing_left =
      feature.has_missing && (best.left[feature.missing / 32] >> feature.missing % 32 & 1);
}

static void split(const SumFormat& format, const SplitRules& rules, const SplitNode& node,
                  const FeatureBins& feature, const int64_t* sums, double enough,
                  FeatureSplit& best) {
  best = {-1, 0, 0, 0, 0, false, {}};
  if (feature.categorical) return split_categories(format, rules, node, feature, sums, best);
#if FASTNN_TARGET_ID == 2
  if (format.words < 4 && !feature.monotonic && node.lower == -__builtin_inf() &&
      node.upper == __builtin_inf())
    return (format.words == 2 ? split_unbounded<true> : split_unbounded<false>)(format, rules, node,
                                                                                feature, sums,
                                                                                enough, best);
#else
  (void)enough;
#endif
  split_ordered(format, rules, node, feature, sums, best);
}

static int64_t part(const uint8_t* column, const uint32_t* set, const uint32_t* index,
                    uint32_t first, int64_t count, uint32_t* left, uint32_t* right) {
  int64_t l = 0, i = 0;
#if FASTNN_TARGET_ID == 2
  const __m512i words = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)set));
  const __m512i low5 = _mm512_set1_epi32(31), byte = _mm512_set1_epi32(255);
  const __m512i one = _mm512_set1_epi32(1);
  __m512i row =
      _mm512_add_epi32(_mm512_set1_epi32(int(first)),
                       _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (; i + 16 <= count; i += 16) {
    __m512i bin;
    if (index) {
      row = _mm512_loadu_si512(index + i);
      // Reads three bytes beyond the row's: columns have room for them.
      bin = _mm512_and_si512(_mm512_i32gather_epi32(row, column, 1), byte);
    } else {
      bin = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(column + first + i)));
    }
    const __m512i word = _mm512_permutexvar_epi32(_mm512_srli_epi32(bin, 5), words);
    const __mmask16 goes_left =
        _mm512_test_epi32_mask(_mm512_srlv_epi32(word, _mm512_and_si512(bin, low5)), one);
    _mm512_storeu_si512(left + l, _mm512_maskz_compress_epi32(goes_left, row));
    _mm512_storeu_si512(right + (i - l), _mm512_maskz_compress_epi32(__mmask16(~goes_left), row));
    l += __builtin_popcount(goes_left);
    if (!index) row = _mm512_add_epi32(row, _mm512_set1_epi32(16));
  }
#endif
  for (; i < count; i++) {
    const uint32_t row = index ? index[i] : first + uint32_t(i);
    const uint32_t bin = column[row];
    left[l] = row;
    right[i - l] = row;
    l += set[bin >> 5] >> (bin & 31) & 1;
  }
  return l;
}

static const HistogramKernels histogram_table = {
    largest, squared_error, half_binomial, count_below, integers,
    add,     subtract,      total,         split,       part};

}  // namespace fastnn::FASTNN_TARGET
