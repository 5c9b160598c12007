// Decision trees grown by exact search: the tree scikit-learn grows, node for node. By a search of
// the borders between bins, which is the same where each value has a bin of its own. And by random
// thresholds, scikit-learn's again.
#pragma once
#include <cstdint>
#include <vector>

#include "tree/binned.hpp"
#include "tree/criteria.hpp"
#include "tree/presort.hpp"
#include "tree/value_columns.hpp"

namespace fastnn {

struct ExactSettings {
  int64_t max_features = 1, max_depth = INT32_MAX;
  int64_t min_samples_split = 2, min_samples_leaf = 1;
  int64_t max_leaf_nodes = -1;  // -1: depth first, without a limit
  double min_weight_leaf = 0, min_impurity_decrease = 0;
  const int8_t* monotonic = nullptr;  // of each feature: -1, 0 or 1; null: none
  uint32_t seed = 1;                  // of the draws of features and thresholds
  int threads = 1;
};

// As scikit-learn's own node, to the byte.
struct TreeNode {
  int64_t left, right, feature;
  double threshold, impurity;
  int64_t samples;
  double weighted_samples;
  uint8_t missing_go_left;
  uint8_t padding[7];
};

struct ExactTree {
  std::vector<TreeNode> nodes;  // depth first: ids in preorder
  std::vector<double> values;   // nodes x outputs x most classes
  int64_t max_depth = 0;
};

// Whether a row and its class fit into 32 bits together: what follows needs it.
bool fits_exact(const TreeTarget& target, int64_t rows);

// Throws std::bad_alloc.
ExactTree grow_exact(const Presort& sorted, const TreeTarget& target,
                     const ExactSettings& settings);
ExactTree grow_random(const ValueColumns& columns, const TreeTarget& target,
                      const ExactSettings& settings);
ExactTree grow_binned(const BinnedColumns& binned, const TreeTarget& target,
                      const ExactSettings& settings);

// The best split of each column of `sorted` on its own. A column without one gets j = 0.
struct ColumnSplit {
  double threshold, impurity,
      improvement;  // impurity of the sides, each by its share of the weight
  int64_t left;     // rows that go left; 0: no split
  bool missing_go_left;
};
struct BestSplits {
  double impurity;  // of all rows
  std::vector<ColumnSplit> columns;
};
BestSplits best_splits(const Presort& sorted, const TreeTarget& target, int threads);

}  // namespace fastnn
