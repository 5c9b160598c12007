// What a search on a GPU leaves for growth on the CPU: of whole subtrees, the best split of each
// node by each column, before growth asks for them. Growth itself, with its draws and its limits,
// is that of every other tree (growth.cpp).
#pragma once
#include <vector>

#include "tree/ahead_nodes.hpp"
#include "tree/exact.hpp"

namespace fastnn {

struct AheadResult {
  std::vector<AheadNode> nodes;
  std::vector<int32_t> weights;
  std::vector<AheadCandidate> candidates;  // of nodes but the last level's, columns of each
};

class AheadSearch {
 public:
  virtual ~AheadSearch() = default;
  // Searches roots that are neither each other's ancestors, of so many rows together. A feature
  // that a root is given is its split, whatever is found. `weights` are the roots'.
  virtual AheadResult search(const std::vector<AheadNode>& roots,
                             const std::vector<int32_t>& weights, int levels, int64_t rows) = 0;
};

// Columns of bins that lie elsewhere; NaN has the last of `slots` bins.
struct AheadColumns {
  int64_t rows, columns;
  int slots;
  // Of the values in each column's bins; +- infinity where there are none. columns x slots.
  const float *least, *largest;
  int most_nodes;  // that one level of a search may have, a power of two

  // Whether neighbouring bins have values so close that they count as equal.
  bool close() const;
};

// Of classes, by Gini impurity, of whole weights.
ExactTree grow_ahead(const AheadColumns& columns, AheadSearch& search, const TreeTarget& target,
                     const ExactSettings& settings);

}  // namespace fastnn
