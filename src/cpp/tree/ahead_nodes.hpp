// What a search on a GPU knows of nodes, for the kernels there and for growth here.
#pragma once
#include <cstdint>

namespace fastnn {

// A node as the GPU knows it. Its rows are those of weight that lie from `begin` on in the order
// that the GPU keeps them in.
struct AheadNode {
  int32_t begin, rows;
  int32_t levels;         // of it and its descendants that are to be searched; 0: none
  int32_t feature, last;  // its split: bins up to `last` go left; -1: it has none
  int32_t missing_left, left_rows;
  int32_t counted;  // its histogram, or it is the difference of its parent's and sibling's
  int32_t to_left, to_right;  // where the next row on that side goes
};

// The first of the best splits of a node by a column.
struct AheadCandidate {
  double proxy;
  int32_t left, missing;  // rows; 0 on the left: there is no split
  int16_t last, next;     // bin on the left of the border, and the next that has rows (-1: none)
  uint8_t constant, missing_left;
  uint8_t padding[2];
};

// Nodes of one search lie level after level. Level l has a place for each of roots << l nodes, the
// children of node i of a level being 2 i and 2 i + 1 of the next; the last level is only divided
// into, not searched. Weights are those of a node's classes and then, where rows have weights, the
// number of rows.
inline int64_t ahead_nodes(int64_t roots, int levels) {
  return roots * ((int64_t(1) << levels) - 1);
}

}  // namespace fastnn
