// Histograms of a level: what the rows of nodes weigh in each bin of each column.
#pragma once
#include "cuda/tree/level.cuh"

namespace fastnn::cuda {

constexpr int kCountThreads = 512, kRowsAhead = 4, kRowsOfWarp = 4;
constexpr int kSumThreads = 256, kSegments = kSumThreads / kGroup;
constexpr int kSegment = (kMostSlots + kSegments - 1) / kSegments;  // bins, at most

// Counts a piece of rows in shared memory and adds it to the node's histogram. All numbers are
// integers, so that it does not matter who adds first.
//
// Column c of a group has bank c to itself. A warp reads 4 rows of 32 bytes, a sector each, and a
// lane 4 columns of one of them; lanes of the second row begin with the second of their columns,
// those of the third with the third. So at any time the 32 lanes add to 32 different columns, which
// is in 32 banks, whatever the bins are: no two ever wait for each other.
template <bool kWeighted>
__global__ void __launch_bounds__(kCountThreads)
    count_bins(const Level level, const int words_at_once) {
  const SplitSearch& s = level.call;
  const Piece piece = piece_of(level, level.plan->counted, kCountedPiece, int(blockIdx.x));
  if (piece.node < 0) return;
  auto* counts = dynamic_shared<uint32_t>();
  const int group = int(blockIdx.y), first_word = int(blockIdx.z) * words_at_once;
  const int words = s.words - first_word < words_at_once ? s.words - first_word : words_at_once;
  const int cells = words * s.slots * kGroup;
  for (int i = int(threadIdx.x); i < cells; i += kCountThreads) counts[i] = 0;
  __syncthreads();

  const int lane = int(threadIdx.x) % 32, turn = lane / 8, quad = lane % 8;
  const int64_t step = int64_t(gridDim.y) * kGroup;
  const auto* bins = reinterpret_cast<const uint32_t*>(s.bins + group * kGroup) + quad;
  const WeighedRow* rows = s.order + piece.first;
  constexpr int kTogether = kCountThreads / 8;
  for (int begin = int(threadIdx.x) / 8; begin < piece.rows; begin += kRowsAhead * kTogether) {
    WeighedRow row[kRowsAhead];
    uint32_t four[kRowsAhead];
#pragma unroll
    for (int i = 0; i < kRowsAhead; i++) {
      const int at = begin + i * kTogether;
      row[i] = at < piece.rows ? rows[at] : WeighedRow{0, 0};
    }
#pragma unroll
    for (int i = 0; i < kRowsAhead; i++) four[i] = bins[int64_t(row[i].row) * (step / 4)];
#pragma unroll
    for (int i = 0; i < kRowsAhead; i++) {
      if (!row[i].weight) continue;
      const int word = int(row[i].weight & 255) - first_word;
      const uint32_t weight = row[i].weight >> 8;
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const int byte = (k + turn) % 4;
        const uint32_t bin = four[i] >> (8 * byte) & 255;
        uint32_t* of_column = counts + bin * kGroup + quad * 4 + byte;
        if (unsigned(word) < unsigned(words))
          atomicAdd(of_column + word * s.slots * kGroup, weight);
        if (kWeighted && unsigned(s.classes - first_word) < unsigned(words))
          atomicAdd(of_column + (s.classes - first_word) * s.slots * kGroup, 1u);
      }
    }
  }
  __syncthreads();
  uint32_t* to = level.counts + level.histogram(level.top ? piece.node : piece.node / 2, group) +
                 int64_t(first_word) * s.slots * kGroup;
  for (int i = int(threadIdx.x); i < cells; i += kCountThreads)
    if (counts[i]) atomicAdd(to + i, counts[i]);
}

// From what was counted of one node of two to sums over the bins up to each, of both: sums of the
// other are its parent's less these. A warp has a segment of the bins, in registers; a block a word
// of a group.
__global__ void __launch_bounds__(kSumThreads) sum_bins(const Level level) {
  FASTNN_SHARED(uint32_t, totals, [kSegments][kGroup]);
  const SplitSearch& s = level.call;
  const int pair = int(blockIdx.x), group = int(blockIdx.y), word = int(blockIdx.z);
  const int first_node = level.top ? pair : 2 * pair;
  int counted = first_node;
  if (!level.top && !s.nodes[counted].counted) counted++;
  if (!s.nodes[counted].counted) return;
  const int lane = int(threadIdx.x) % kGroup, segment = int(threadIdx.x) / kGroup;
  const int ordered = s.slots - 1, each = (ordered + kSegments - 1) / kSegments;
  const int first = segment * each, end = first + each < ordered ? first + each : ordered;
  const int64_t of_word = int64_t(word) * s.slots * kGroup + lane;
  const uint32_t* from = level.counts + level.histogram(pair, group) + of_word;
  uint32_t mine[kSegment], sum = 0;
#pragma unroll
  for (int i = 0; i < kSegment; i++) mine[i] = first + i < end ? from[(first + i) * kGroup] : 0;
#pragma unroll
  for (int i = 0; i < kSegment; i++) mine[i] = sum += mine[i];
  totals[segment][lane] = sum;
  __syncthreads();
  uint32_t before = 0;
  for (int i = 0; i < segment; i++) before += totals[i][lane];
  uint32_t* to = level.sums + level.histogram(counted, group) + of_word;
  const int sibling = counted ^ 1;
  uint32_t* other = level.sums + level.histogram(level.top ? 0 : sibling, group) + of_word;
  const uint32_t* parent =
      level.sums_above + level.histogram(level.top ? 0 : pair, group) + of_word;
  const bool both = !level.top && s.nodes[sibling].levels > 0;
#pragma unroll
  for (int i = 0; i < kSegment; i++) {
    if (first + i >= end) break;
    to[(first + i) * kGroup] = before + mine[i];
    if (both) other[(first + i) * kGroup] = parent[(first + i) * kGroup] - before - mine[i];
  }
  if (segment) return;
  const uint32_t missing = from[ordered * kGroup];
  to[ordered * kGroup] = missing;
  if (both) other[ordered * kGroup] = parent[ordered * kGroup] - missing;
}

}  // namespace fastnn::cuda
