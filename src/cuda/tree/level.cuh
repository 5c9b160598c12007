// One level of a search as its kernels see it, and how its work is shared out among blocks.
//
// How many rows a node has is known on the device alone, and the host does not wait for it. Blocks
// are launched for as many pieces of rows as there can be at most; each finds its own in sums that
// were made of the level's nodes, and those that find none end.
#pragma once
#include "cuda/device.cuh"
#include "cuda/tree/split_search.hpp"

namespace fastnn::cuda {

constexpr int kCountedPiece = 4096, kMovedPiece = 1024;  // rows

// For each node of a level the pieces before it: of rows that are counted, and of all.
struct Plan {
  int counted[kMostTreeNodes + 1], moved[kMostTreeNodes + 1];
};

struct Level {
  SplitSearch call;  // weights, nodes and candidates are this level's
  int count;         // nodes
  AheadNode* below;  // the next level's
  int32_t* weights_below;
  Plan* plan;
  // A histogram is [group][word][slot][32 columns]. What is counted is that of one node of two, in
  // the place of their parent; in `sums`, that of each node, bins hold what they and those before
  // them have (the last, of missing values, its own).
  uint32_t *counts, *sums;
  const uint32_t* sums_above;
  bool top;

  __device__ __forceinline__ int64_t words_of_group() const {
    return int64_t(call.words) * call.slots * kGroup;
  }
  __device__ __forceinline__ int64_t histogram(int64_t node, int group) const {
    return (node * ((call.columns + kGroup - 1) / kGroup) + group) * words_of_group();
  }
};

// A piece of a node's rows; node -1: none.
struct Piece {
  int node, first, rows;
};
__device__ __forceinline__ Piece piece_of(const Level& level, const int* before, int size,
                                          int number) {
  if (number >= before[level.count]) return {-1, 0, 0};
  int node = 0, beyond = level.count;  // before[node] <= number < before[beyond]
  while (beyond - node > 1) {
    const int middle = (node + beyond) / 2;
    if (before[middle] <= number)
      node = middle;
    else
      beyond = middle;
  }
  const AheadNode& of = level.call.nodes[node];
  const int skipped = (number - before[node]) * size, left = of.rows - skipped;
  return {node, of.begin + skipped, left < size ? left : size};
}

}  // namespace fastnn::cuda
