// The rows of a level's nodes: which block has which, and to which child they go.
#pragma once
#include "cuda/tree/level.cuh"

namespace fastnn::cuda {

constexpr int kPlanThreads = kMostTreeNodes, kMoveThreads = 256;

// One block.
__global__ void __launch_bounds__(kPlanThreads) plan_level(const Level level) {
  FASTNN_SHARED(int, sums, [2][kPlanThreads]);
  const int i = int(threadIdx.x);
  int counted = 0, moved = 0;
  if (i < level.count) {
    const AheadNode& node = level.call.nodes[i];
    moved = (node.rows + kMovedPiece - 1) / kMovedPiece;
    if (node.counted) counted = (node.rows + kCountedPiece - 1) / kCountedPiece;
  }
  sums[0][i] = counted, sums[1][i] = moved;
  __syncthreads();
  for (int d = 1; d < kPlanThreads; d *= 2) {
    const int a = i >= d ? sums[0][i - d] : 0, b = i >= d ? sums[1][i - d] : 0;
    __syncthreads();
    sums[0][i] += a, sums[1][i] += b;
    __syncthreads();
  }
  if (i == 0) level.plan->counted[0] = level.plan->moved[0] = 0;
  if (i < level.count)
    level.plan->counted[i + 1] = sums[0][i], level.plan->moved[i + 1] = sums[1][i];
}

// Rows to the side where they go, each piece's in their order. Which piece comes first is left to
// chance, and changes nothing: whatever is made of rows are sums of integers.
__global__ void __launch_bounds__(kMoveThreads) move_rows(const Level level) {
  constexpr int kEach = kMovedPiece / kMoveThreads, kWarps = kMoveThreads / 32;
  FASTNN_SHARED(int, lefts, [kEach * kWarps]);
  FASTNN_SHARED(int, places, [2]);
  const SplitSearch& s = level.call;
  const Piece piece = piece_of(level, level.plan->moved, kMovedPiece, int(blockIdx.x));
  if (piece.node < 0) return;
  AheadNode& node = s.nodes[piece.node];
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t step = (s.columns + kGroup - 1) / kGroup * kGroup;
  WeighedRow row[kEach];
  bool left[kEach];
  unsigned votes[kEach];
#pragma unroll
  for (int k = 0; k < kEach; k++) {
    const int at = k * kMoveThreads + int(threadIdx.x);
    row[k] = at < piece.rows ? s.order[piece.first + at] : WeighedRow{0, 0};
  }
#pragma unroll
  for (int k = 0; k < kEach; k++) {
    left[k] = true;
    if (node.feature >= 0) {
      const int bin = s.bins[int64_t(row[k].row) * step + node.feature];
      left[k] = bin <= node.last || (node.missing_left && bin == s.slots - 1);
    }
  }
#pragma unroll
  for (int k = 0; k < kEach; k++) {
    votes[k] = __ballot_sync(0xffffffffu, left[k] && row[k].weight);
    if (!lane) lefts[k * kWarps + warp] = __popc(votes[k]);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int sum = 0;
    for (int i = 0; i < kEach * kWarps; i++) {
      const int of = lefts[i];
      lefts[i] = sum;
      sum += of;
    }
    places[0] = sum ? atomicAdd(&node.to_left, sum) : 0;
    places[1] = piece.rows > sum ? atomicAdd(&node.to_right, piece.rows - sum) : 0;
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kEach; k++) {
    if (!row[k].weight) continue;
    const int before = lefts[k * kWarps + warp] + __popc(votes[k] & ((1u << lane) - 1));
    const int at = k * kMoveThreads + int(threadIdx.x);
    s.spare[left[k] ? places[0] + before : places[1] + at - before] = row[k];
  }
}

// Back to where they were, the rows of the roots.
__global__ void __launch_bounds__(kMoveThreads) copy_rows(const Level level) {
  const SplitSearch& s = level.call;
  const Piece piece = piece_of(level, level.plan->moved, kMovedPiece, int(blockIdx.x));
  if (piece.node < 0) return;
  for (int i = int(threadIdx.x); i < piece.rows; i += kMoveThreads)
    s.order[piece.first + i] = s.spare[piece.first + i];
}

}  // namespace fastnn::cuda
