// The best border between bins, of each column of each node, and of all columns.
#pragma once
#include "cuda/tree/level.cuh"

namespace fastnn::cuda {

constexpr int kSearchThreads = 512, kSearchWarps = kSearchThreads / kGroup;
constexpr int kChooseThreads = 128;

// -(nr * gini_right) - nl * gini_left: rounded as on the CPU, and never contracted.
__device__ __forceinline__ double gini_proxy(double nl, double square_left, double nr,
                                             double square_right) {
  const double gl = __dsub_rn(1.0, __ddiv_rn(square_left, __dmul_rn(nl, nl)));
  const double gr = __dsub_rn(1.0, __ddiv_rn(square_right, __dmul_rn(nr, nr)));
  return __dsub_rn(__dmul_rn(-nr, gr), __dmul_rn(nl, gl));
}

// The best border of a column so far, with missing values on one side.
struct Border {
  double proxy;
  int32_t left;
  int16_t last, next;  // the next bin that has rows; -1: none yet
};

// A block has 32 columns of a node, a lane one, a warp a segment of the bins; of two as good
// borders the one with missing values on the right and of lower bins is taken.
__global__ void __launch_bounds__(kSearchThreads) find_borders(const Level level) {
  FASTNN_SHARED(Border, borders, [2][kSearchWarps][kGroup]);
  FASTNN_SHARED(int, firsts, [kSearchWarps][kGroup]);
  FASTNN_SHARED(int, filled, [kSearchWarps][kGroup]);
  const SplitSearch& s = level.call;
  const int node = int(blockIdx.x), group = int(blockIdx.y);
  const AheadNode& of = s.nodes[node];
  if (of.levels <= 0) return;
  const int lane = int(threadIdx.x) % kGroup, warp = int(threadIdx.x) / kGroup;
  const int ordered = s.slots - 1, each = (ordered + kSearchWarps - 1) / kSearchWarps;
  const int begin = warp * each, end = begin + each < ordered ? begin + each : ordered;
  const int64_t of_word = int64_t(s.slots) * kGroup;
  const uint32_t* sums = level.sums + level.histogram(node, group) + lane;
  const uint32_t* of_missing = sums + ordered * kGroup;
  const int32_t* all = s.weights + int64_t(node) * s.words;

  // Rows up to a bin: words that count them, added up.
  const bool weighted = s.words > s.classes;
  const int row_words = weighted ? 1 : s.classes;
  const uint32_t* row_sums = sums + (weighted ? s.classes * of_word : 0);
  const auto rows_up_to = [&](const uint32_t* bin) {
    int rows = 0;
    for (int c = 0; c < row_words; c++) rows += int(bin[c * of_word]);
    return rows;
  };
  uint32_t total = 0;
  for (int c = 0; c < s.classes; c++) total += uint32_t(all[c]);
  const int missing = rows_up_to(row_sums + ordered * kGroup);
  const int passes = missing ? 2 : 1;
  const int before_first = begin && begin < end ? rows_up_to(row_sums + (begin - 1) * kGroup) : 0;
  int first_filled = -1, bins_filled = 0;
  for (int pass = 0; pass < passes; pass++) {
    Border best{-INFINITY, 0, -1, -1};
    const int passed = pass ? missing : 0;
    // A side has a row at least; where missing values go left, one of the others goes with them.
    const int64_t least = passed + 1 < s.min_leaf ? s.min_leaf : passed + 1;
    int before = before_first;
    bins_filled = 0;
    for (int bin = begin; bin < end; bin++) {
      const int rows = rows_up_to(row_sums + bin * kGroup);
      if (rows == before) continue;
      before = rows;
      if (!bins_filled++) first_filled = bin;
      if (best.last >= 0 && best.next < 0) best.next = int16_t(bin);
      const int left = rows + passed;
      if (left < least || left > of.rows - s.min_leaf) continue;
      uint32_t weight = 0;
      uint64_t square_left = 0, square_right = 0;
      for (int c = 0; c < s.classes; c++) {
        uint32_t l = sums[c * of_word + bin * kGroup];
        if (pass) l += of_missing[c * of_word];
        const uint32_t r = uint32_t(all[c]) - l;
        weight += l, square_left += uint64_t(l) * l, square_right += uint64_t(r) * r;
      }
      const double nl = double(weight), nr = double(total - weight);
      if (nl < s.min_weight || nr < s.min_weight) continue;
      const double proxy = gini_proxy(nl, double(square_left), nr, double(square_right));
      if (proxy > best.proxy) best = {proxy, left, int16_t(bin), -1};
    }
    borders[pass][warp][lane] = best;
  }
  firsts[warp][lane] = first_filled;
  filled[warp][lane] = bins_filled;
  __syncthreads();
  const int64_t column = int64_t(group) * kGroup + lane;
  if (warp || column >= s.columns) return;
  Border found{-INFINITY, 0, -1, -1};
  int of_pass = 0, all_filled = 0;
  for (int pass = 0; pass < passes; pass++)
    for (int w = 0; w < kSearchWarps; w++) {
      const Border& b = borders[pass][w][lane];
      if (b.proxy > found.proxy) {
        found = b, of_pass = pass;
        for (int later = w + 1; later < kSearchWarps && found.next < 0; later++)
          found.next = int16_t(firsts[later][lane]);
      }
      if (!pass) all_filled += filled[w][lane];
    }
  AheadCandidate& to = s.candidates[node * s.columns + column];
  to.proxy = found.proxy;
  to.left = found.left;
  to.missing = missing;
  to.last = found.last;
  to.next = found.next;
  to.constant = all_filled == 0 || (!missing && all_filled == 1);
  to.missing_left = uint8_t(of_pass);
}

// The first of the columns with the best split, or the one that the node was given, and the two
// nodes below. One that is not split has its rows in the left one.
__global__ void __launch_bounds__(kChooseThreads) choose_columns(const Level level) {
  constexpr int kWarps = kChooseThreads / 32;
  FASTNN_SHARED(double, proxies, [kWarps]);
  FASTNN_SHARED(int, columns, [kWarps]);
  const SplitSearch& s = level.call;
  const int at = int(blockIdx.x), lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  AheadNode& node = s.nodes[at];
  const AheadCandidate* candidates = s.candidates + at * s.columns;
  double proxy = -INFINITY;
  int column = -1;
  if (node.levels > 0 && node.feature < 0) {
    for (int64_t f = int64_t(threadIdx.x); f < s.columns; f += kChooseThreads)
      if (candidates[f].left && candidates[f].proxy > proxy)
        proxy = candidates[f].proxy, column = int(f);
    for (int d = 16; d; d /= 2) {
      const double other = __shfl_xor_sync(0xffffffffu, proxy, d);
      const int of = __shfl_xor_sync(0xffffffffu, column, d);
      if (of >= 0 && (other > proxy || (other == proxy && of < column))) proxy = other, column = of;
    }
  }
  if (!lane) proxies[warp] = proxy, columns[warp] = column;
  __syncthreads();
  if (threadIdx.x) return;
  for (int w = 1; w < kWarps; w++)
    if (columns[w] >= 0 && (proxies[w] > proxy || (proxies[w] == proxy && columns[w] < column)))
      proxy = proxies[w], column = columns[w];
  if (column >= 0) {
    node.feature = column;
    node.last = candidates[column].last;
    node.missing_left = candidates[column].missing_left;
  }
  const bool split = node.levels > 0 && node.feature >= 0;
  const int words = s.words;
  int32_t* weights = s.weights + int64_t(at) * words;
  int32_t* left = level.weights_below + int64_t(2 * at) * words;
  int32_t* right = left + words;
  int64_t weight[2] = {}, rows[2] = {};
  int32_t heaviest[2] = {};
  const int64_t of_word = int64_t(s.slots) * kGroup;
  const uint32_t* sums = nullptr;
  if (split) sums = level.sums + level.histogram(at, node.feature / kGroup) + node.feature % kGroup;
  for (int w = 0; w < words; w++) {
    int32_t l = weights[w];
    if (split) {
      l = int32_t(sums[w * of_word + node.last * kGroup]);
      if (node.missing_left) l += int32_t(sums[w * of_word + (s.slots - 1) * kGroup]);
    }
    const int32_t both[2] = {l, weights[w] - l};
    left[w] = both[0], right[w] = both[1];
#pragma unroll
    for (int side = 0; side < 2; side++) {
      if (w < s.classes) {
        weight[side] += both[side];
        if (both[side] > heaviest[side]) heaviest[side] = both[side];
      }
      if (words == s.classes || w == s.classes) rows[side] += both[side];
    }
  }
  node.left_rows = int32_t(rows[0]);
  node.to_left = node.begin, node.to_right = node.begin + node.left_rows;
  bool searched[2];
#pragma unroll
  for (int side = 0; side < 2; side++)
    searched[side] = split && rows[side] >= s.min_split && rows[side] >= 2 * s.min_leaf &&
                     double(weight[side]) >= 2 * s.min_weight && heaviest[side] != weight[side] &&
                     node.levels > 1;
#pragma unroll
  for (int side = 0; side < 2; side++) {
    const bool smaller = side ? rows[1] <= rows[0] : rows[0] < rows[1];
    AheadNode child{};
    child.begin = side ? node.to_right : node.begin;
    child.rows = int32_t(rows[side]);
    child.levels = searched[side] ? node.levels - 1 : 0;
    child.feature = -1;
    child.counted = smaller && (searched[0] || searched[1]);
    level.below[2 * at + side] = child;
  }
  if (!split) node.feature = -1;
}

}  // namespace fastnn::cuda
