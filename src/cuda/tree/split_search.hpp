// The search of splits among bins, without CUDA's headers: values to bins, and a few levels of
// trees by histograms of classes.
#pragma once
#include <cstdint>

#include "tree/ahead_nodes.hpp"

namespace fastnn::cuda {

// Columns are worked on in groups of 32, one a lane of a warp and a bank of shared memory.
constexpr int kGroup = 32;
constexpr int kMostSlots = 256, kMostClasses = 64;
constexpr int kMostTreeNodes = 256;  // of a level

constexpr int64_t groups_of(int64_t columns) { return (columns + kGroup - 1) / kGroup; }

struct BinRows {
  const float* x;
  int64_t rows, columns, row_step, column_step;  // steps in elements
  int slots;                                     // bins of a column; the last is that of NaN
  const float* edges;     // columns x slots, ascending: x <= edges[i] is in bin i at most
  const int32_t* counts;  // of each column's edges
  uint8_t* bins;          // rows x 32 groups_of(columns); of columns that there are none, 0
  // Of the values in each bin, columns x slots: floats as integers in the same order, from
  // UINT32_MAX and 0 where nothing fell there.
  uint32_t *least, *largest;
};
void bin_rows(const BinRows& call, void* stream);

// A row, and what it adds to its bins: the class in the lower 8 bits, the weight above.
struct WeighedRow {
  uint32_t row, weight;
};

struct SplitSearch {
  const uint8_t* bins;
  int64_t columns;
  int slots, classes;
  int words;  // of a bin: what the rows of each class weigh and, where that is not 1, the rows
  int roots, levels;
  int64_t rows;  // of the roots together
  int64_t min_split, min_leaf;
  double min_weight;
  WeighedRow *order, *spare;   // afterwards the rows of each node are together in `order`
  AheadNode* nodes;            // the roots are given; ahead_nodes(roots, levels + 1)
  int32_t* weights;            // of each node, `words`
  AheadCandidate* candidates;  // ahead_nodes(roots, levels) x columns
  void* workspace;
};
// Bytes.
int64_t split_search_workspace(const SplitSearch& call);
void split_search(const SplitSearch& call, void* stream);

}  // namespace fastnn::cuda
