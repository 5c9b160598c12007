// A few levels of trees, without waiting for the device in between.
//
// The bins are bytes, row by row. At each level the rows of the smaller of two children are read
// once: of 10^6 rows and 100 columns that is 128 MB for the first level and at most 64 MB for each
// of the others, besides 8 bytes a row for what it weighs and a sector of 32 bytes a row to part
// them. Each byte becomes one addition in shared memory, and everything after that is of the size
// of the histograms.
#include "cuda/tree/split_search.hpp"

#include "cuda/tree/borders.cuh"
#include "cuda/tree/histograms.cuh"
#include "cuda/tree/rows.cuh"
#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kSharedCounts = 96 << 10;  // bytes: two blocks on a multiprocessor

int64_t histogram_words(const SplitSearch& s) {
  return groups_of(s.columns) * s.words * s.slots * kGroup;
}
int64_t most_nodes(const SplitSearch& s) { return int64_t(s.roots) << (s.levels - 1); }
// Histograms that are counted at a time: the roots', or one of two.
int64_t most_counted(const SplitSearch& s) {
  return s.levels == 1 ? s.roots : most_nodes(s) / 2 > s.roots ? most_nodes(s) / 2 : s.roots;
}

}  // namespace

int64_t split_search_workspace(const SplitSearch& s) {
  return (most_counted(s) + 2 * most_nodes(s)) * histogram_words(s) * 4 +
         s.levels * int64_t(sizeof(Plan));
}

void split_search(const SplitSearch& s, void* stream) {
  const int64_t words = histogram_words(s);
  auto* counts = static_cast<uint32_t*>(s.workspace);
  uint32_t* sums[2] = {counts + most_counted(s) * words,
                       counts + (most_counted(s) + most_nodes(s)) * words};
  auto* plans = reinterpret_cast<Plan*>(sums[1] + most_nodes(s) * words);
  const auto groups = unsigned(groups_of(s.columns));
  int at_once = kSharedCounts / (s.slots * kGroup * 4);
  if (at_once > s.words) at_once = s.words;
  const auto parts = unsigned(ceil_div(s.words, at_once));

  Level level{};
  level.call = s;
  for (int l = 0; l < s.levels; l++) {
    const int count = s.roots << l;
    level.count = count;
    level.below = level.call.nodes + count;
    level.weights_below = level.call.weights + int64_t(count) * s.words;
    level.plan = plans + l;
    level.counts = counts, level.sums = sums[l % 2], level.sums_above = sums[1 - l % 2];
    level.top = l == 0;
    const int64_t counted = level.top ? count : count / 2;
    set_zero(counts, size_t(counted * words) * 4, stream);
    launch(plan_level, dim3(1), dim3(kPlanThreads), 0, stream, level);
    const int64_t pieces = ceil_div(level.top ? s.rows : s.rows / 2, kCountedPiece) + counted;
    launch(s.words > s.classes ? count_bins<true> : count_bins<false>,
           dim3(unsigned(pieces), groups, parts), dim3(kCountThreads),
           size_t(at_once) * size_t(s.slots) * kGroup * 4, stream, level, at_once);
    launch(sum_bins, dim3(unsigned(counted), groups, unsigned(s.words)), dim3(kSumThreads), 0,
           stream, level);
    launch(find_borders, dim3(unsigned(count), groups), dim3(kSearchThreads), 0, stream, level);
    launch(choose_columns, dim3(unsigned(count)), dim3(kChooseThreads), 0, stream, level);
    launch(move_rows, dim3(unsigned(ceil_div(s.rows, kMovedPiece) + count)), dim3(kMoveThreads), 0,
           stream, level);
    WeighedRow* moved = level.call.spare;
    level.call.spare = level.call.order;
    level.call.order = moved;
    level.call.nodes = level.below;
    level.call.weights = level.weights_below;
    level.call.candidates += count * s.columns;
  }
  if (s.levels % 2 == 0) return;
  level.call = s;
  level.count = s.roots, level.plan = plans;
  launch(copy_rows, dim3(unsigned(ceil_div(s.rows, kMovedPiece) + s.roots)), dim3(kMoveThreads), 0,
         stream, level);
}

}  // namespace fastnn::cuda
