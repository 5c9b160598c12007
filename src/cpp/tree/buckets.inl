// Buckets of ranks, for each instruction set; included by kernels.inl.

constexpr int kMostBuckets = 1024;
// Where most rows are kept and some bucket holds more than this, digits sort them faster.
constexpr int64_t kMostInBucket = 256;

// Decrease of the impurity by a split, times the square of all weight: d^2 / (nl nr) with
// d = left1 all - nl ones, which is exact. Right to 3e-7.
FASTNN_INLINE float decrease_of(double nl, double left1, double all, double ones) {
  const auto d = float(left1 * all - nl * ones), product = float(nl) * float(all - nl);
  return product > 0 ? d * d / product : 0.0f;
}

// Ranks of a node's rows, the least and the largest.
struct RankSpan {
  uint32_t least, largest;
};
FASTNN_INLINE RankSpan gather_ranks(const BucketSearch& s) {
  // One load at a time: gather instructions take longer on AMD's cores, and no less on Intel's.
  constexpr int64_t kBatch = 256;
  uint32_t least = 0xffffffffu, largest = 0;
  for (int64_t begin = 0; begin < s.n; begin += kBatch) {
    const int64_t end = s.n - begin < kBatch ? s.n : begin + kBatch;
    for (int64_t i = begin; i < end; i++) s.own_ranks[i] = rank_of(s.ranks, s.keys[i], s.shift);
    for (int64_t i = begin; i < end; i++) {
      const uint32_t rank = s.own_ranks[i];
      least = rank < least ? rank : least, largest = rank > largest ? rank : largest;
    }
  }
  return {least, largest};
}

struct Buckets {
  int count, by;   // buckets, and bits of a rank within one
  uint32_t first;  // rank
  alignas(64) uint64_t cells[kMostBuckets];
  alignas(64) uint64_t before[kMostBuckets];
  alignas(64) float most[kMostBuckets], at_border[kMostBuckets];
  alignas(64) uint32_t kept[kMostBuckets / 32];
  uint32_t place[kMostBuckets];

  uint32_t border(int bucket) const { return first + (uint32_t(bucket) << by); }
  // Whether the column's values on both sides of a rank that is not 0 are apart.
  static bool apart(const BucketSearch& s, uint32_t border) {
    return s.values[border] > s.values[border - 1] + kFeatureThreshold;
  }
  bool keeps(int bucket) const { return kept[bucket >> 5] >> (bucket & 31) & 1; }
  static int64_t rows(uint64_t tally) { return int64_t(tally & kMostBucketed); }
  static int64_t weight(uint64_t tally) { return int64_t(tally >> 21 & kMostBucketed); }
  static int64_t ones(uint64_t tally) { return int64_t(tally >> 42); }
};

// Moves keys of kept buckets, behind their ranks, to `records`, bucket by bucket.
FASTNN_INLINE void take_kept(const BucketSearch& s, Buckets& b) {
  int64_t i = 0;
#if FASTNN_TARGET_ID == 2
  const __m512i low_words = _mm512_load_si512(b.kept), high_words = _mm512_load_si512(b.kept + 16);
  const __m512i first = _mm512_set1_epi32(int(b.first)), one = _mm512_set1_epi32(1);
  const __m512i five_bits = _mm512_set1_epi32(31);
  const __m128i by = _mm_cvtsi32_si128(b.by);
  alignas(64) uint32_t buckets[16], ranks[16], keys[16];
  for (; i + 16 <= s.n; i += 16) {
    const __m512i rank = _mm512_loadu_si512(s.own_ranks + i);
    const __m512i bucket = _mm512_srl_epi32(_mm512_sub_epi32(rank, first), by);
    const __m512i word =
        _mm512_permutex2var_epi32(low_words, _mm512_srli_epi32(bucket, 5), high_words);
    const __mmask16 mine =
        _mm512_test_epi32_mask(word, _mm512_sllv_epi32(one, _mm512_and_si512(bucket, five_bits)));
    if (!mine) continue;
    _mm512_store_si512(buckets, _mm512_maskz_compress_epi32(mine, bucket));
    _mm512_store_si512(ranks, _mm512_maskz_compress_epi32(mine, rank));
    _mm512_store_si512(keys, _mm512_maskz_compress_epi32(mine, _mm512_loadu_si512(s.keys + i)));
    for (int k = 0; k < __builtin_popcount(mine); k++)
      s.records[b.place[buckets[k]]++] = uint64_t(ranks[k]) << 32 | keys[k];
  }
#endif
  for (; i < s.n; i++) {
    const uint32_t rank = s.own_ranks[i], bucket = (rank - b.first) >> b.by;
    if (b.keeps(int(bucket))) s.records[b.place[bucket]++] = uint64_t(rank) << 32 | s.keys[i];
  }
}

// By gaps of Ciura (2001).
FASTNN_INLINE void shell_sort(uint64_t* records, int64_t n) {
  constexpr int64_t kGaps[] = {701, 301, 132, 57, 23, 10, 4, 1};
  for (const int64_t gap : kGaps) {
    if (gap > 1 && gap * 4 > n) continue;
    for (int64_t i = gap; i < n; i++) {
      const uint64_t mine = records[i];
      int64_t at = i;
      for (; at >= gap && records[at - gap] > mine; at -= gap) records[at] = records[at - gap];
      records[at] = mine;
    }
  }
}

// The largest of the node's ranks below one that is not its least.
FASTNN_INLINE uint32_t rank_before(const BucketSearch& s, uint32_t rank) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < s.n; i++) {
    const uint32_t below = s.own_ranks[i] < rank ? s.own_ranks[i] : 0;
    largest = below > largest ? below : largest;
  }
  return largest;
}

static BucketBest best_in_buckets(const BucketSearch& s) {
  const RankSpan span = gather_ranks(s);
  BucketBest best{kNone, 0, 0, 0, 0, false, true};
  best.constant = !(s.values[span.largest] > s.values[span.least] + kFeatureThreshold);
  if (best.constant) return best;
  Buckets b;
  b.first = span.least, b.by = 0;
  int64_t wanted = s.n / 4;
  if (wanted > kMostBuckets) wanted = kMostBuckets;
  while (int64_t((span.largest - span.least) >> b.by) >= wanted) b.by++;
  b.count = int((span.largest - span.least) >> b.by) + 1;
  for (int k = 0; k < b.count; k++) b.cells[k] = 0;
  const uint32_t low_bits = (1u << s.shift) - 1;
  for (int64_t i = 0; i < s.n; i++)
    b.cells[(s.own_ranks[i] - b.first) >> b.by] += s.tally[s.keys[i] & low_bits];
  uint64_t sum = 0;
  for (int k = 0; k < b.count; k++) b.before[k] = sum, sum += b.cells[k];

  const auto all = double(s.total), ones = double(s.ones);
  const auto least = int32_t(s.least), most = int32_t(s.most);
  for (int k = 0; k < b.count; k++) {
    const uint64_t before = b.before[k], cell = b.cells[k];
    const auto nl = double(int32_t(before >> 21 & kMostBucketed)),
               one = double(int32_t(before >> 42));
    const auto w = double(int32_t(cell >> 21 & kMostBucketed)), w1 = double(int32_t(cell >> 42));
    const auto rows = int32_t(before & kMostBucketed), own = int32_t(cell & kMostBucketed);
    const float here = decrease_of(nl, one, all, ones);
    const float behind = decrease_of(nl + w, one + w1, all, ones);
    const float zeros_first = decrease_of(nl + (w - w1), one, all, ones);
    const float ones_first = decrease_of(nl + w1, one + w1, all, ones);
    const float a = here > behind ? here : behind;
    const float c = zeros_first > ones_first ? zeros_first : ones_first;
    const bool any = (own > 0) & (rows + own - 1 >= least) & (rows <= most);
    b.most[k] = any ? (a > c ? a : c) : -1.0f;
    const bool fits =
        (rows >= least) & (rows <= most) & (nl >= s.least_weight) & (all - nl >= s.least_weight);
    b.at_border[k] = fits ? here : -1.0f;
  }
  // The best split between buckets whose values are apart.
  float reached = 0;
  for (int tries = 0; tries < 8; tries++) {
    float largest = -1;
    for (int k = 0; k < b.count; k++) largest = b.at_border[k] > largest ? b.at_border[k] : largest;
    if (largest <= 0) break;
    int at = 0;
    while (b.at_border[at] != largest) at++;
    const uint32_t border = b.border(at);
    if (b.apart(s, border)) {
      reached = largest;
      break;
    }
    b.at_border[at] = -1;
  }
  const double zeros = all - ones, impurity = all - (ones * ones + zeros * zeros) / all;
  const auto known = float((s.to_beat + impurity) * all / 2);
  if (known > reached) reached = known;
  // Of splits whose decreases differ by less, rounding tells which proxy is the larger, as in
  // two_classes.
  float bound = reached * (1 - 4e-6f) - float(1e-14 * all * all);
  if (!(bound > 0)) bound = 0;

  for (int k = 0; k < kMostBuckets / 32; k++) b.kept[k] = 0;
  uint32_t some = 0, largest_bucket = 0;
  for (int k = 0; k < b.count; k++) {
    if (!(b.most[k] >= bound)) continue;
    const auto rows = uint32_t(Buckets::rows(b.cells[k]));
    b.kept[k >> 5] |= 1u << (k & 31);
    b.place[k] = some, some += rows;
    largest_bucket = rows > largest_bucket ? rows : largest_bucket;
  }
  if (!some) return best;
  if (some > s.n / 2 && largest_bucket > kMostInBucket) {
    best.found_out = false;
    return best;
  }
  take_kept(s, b);

  // Runs of kept buckets. Before the first element of a run stands one of weight 1 and class 0 for
  // all that lie before it.
  constexpr uint32_t kNoBorder = 0;
  uint32_t best_border = kNoBorder;  // what the best split's left side ends before
  uint64_t* from = s.records;
  for (int k = 0; k < b.count;) {
    if (!b.keeps(k)) {
      k++;
      continue;
    }
    const uint64_t before = b.before[k];
    const uint32_t border = b.border(k);
    const int64_t stands = before ? 1 : 0;
    if (stands) {
      // Where the column's values on both sides of the border are apart, so are the node's.
      s.some_values[0] =
          b.apart(s, border) ? s.values[border - 1] : s.values[rank_before(s, border)];
      s.some_keys[0] = s.weight_bits ? 2 : 0;
    }
    int64_t n = stands;
    const uint64_t* run = from;
    for (; k < b.count && b.keeps(k); k++) {
      const int64_t rows = Buckets::rows(b.cells[k]);
      shell_sort(from, rows);
      for (int64_t i = 0; i < rows; i++, n++) {
        const auto key = uint32_t(from[i]);
        s.some_values[n] = value_of(s, key, uint32_t(from[i] >> 32));
        s.some_keys[n] = key;
      }
      from += rows;
    }
    const int64_t first_left = Buckets::rows(before) - stands;
    const BestCandidate found =
        two_classes({{s.some_values, s.some_keys, n, first_left, s.least, s.most},
                     s.weight_bits,
                     s.total,
                     s.ones,
                     Buckets::weight(before) - stands,
                     Buckets::ones(before),
                     s.least_weight});
    if (!(found.j && found.proxy > best.proxy)) continue;
    best.proxy = found.proxy, best.left = first_left + found.j;
    best.last = int64_t(run[found.j - stands] >> 32) - 1;
    best.below = s.some_values[found.j - 1], best.above = s.some_values[found.j];
    best_border = found.j == stands ? border : kNoBorder;
  }
  if (best_border != kNoBorder) best.below = s.values[rank_before(s, best_border)];
  return best;
}
