// How a growing tree holds the rows of its nodes, and finds and makes their splits. What a tree is
// grown by (growth.cpp) is the same over all of them.
#pragma once
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "tree/draws.hpp"
#include "tree/exact.hpp"
#include "tree/search.hpp"

namespace fastnn {

// Rows [start, end) of a layout: a node that is still to be searched.
struct GrowingNode {
  int64_t start, end, depth, parent;
  bool is_left;
  double impurity;
  int64_t constants;  // features known to be constant in the node
  double lower, upper;
  int64_t rows() const { return end - start; }
};

// A split that was chosen for a node.
struct ChosenSplit {
  Candidate of;
  int64_t feature;
  double improvement, impurity_left, impurity_right, middle;
};

class Layout {
 public:
  Layout(const TreeTarget& target, const ExactSettings& settings, int64_t rows, int64_t columns);
  virtual ~Layout() = default;
  Layout(const Layout&) = delete;
  Layout& operator=(const Layout&) = delete;

  int64_t columns() const { return columns_; }
  // Those whose weight is not 0: the root is [0, rows).
  int64_t rows() const { return n_; }
  double total_weight() const { return total_weight_; }
  AbsoluteErrors* absolute() const { return search_.absolute(); }

  // Adds all rows to the sums.
  virtual void sum_up(double* sums) const = 0;
  // The node is about to be searched; where it will be asked for every feature that is not known
  // to be constant, these are the `count` at `features`.
  virtual void enter(const GrowingNode& node, const double* sums, const int64_t* features,
                     int64_t count) = 0;
  // The best split by a feature of the node that was entered, or a random one. `sums` are the
  // node's; proxies up to `enough` need not be found.
  virtual Candidate look(int64_t feature, const GrowingNode& node, const double* sums,
                         double enough, Draws& draws) = 0;
  // Sums of both sides of a split, which start at 0.
  virtual void sides(const GrowingNode& node, const double* sums, const ChosenSplit& split,
                     double* left, double* right) = 0;
  // After `sides`: the row number i of the node, those that go left first.
  virtual int64_t row(int64_t i) const = 0;
  // Makes the left side [start, start + left) and the right one the rest of the node, for
  // `features`, those that are not constant.
  virtual void divide(const GrowingNode& node, const ChosenSplit& split, const int64_t* features,
                      int64_t count) = 0;

 protected:
  NodeLimits limits(int64_t feature, const GrowingNode& node,
                    double enough = -std::numeric_limits<double>::infinity()) const {
    return {s_.min_samples_leaf, s_.min_weight_leaf, s_.monotonic ? s_.monotonic[feature] : 0,
            node.lower,          node.upper,         enough};
  }

  const TreeTarget& t_;
  const ExactSettings& s_;
  SplitSearch search_;
  const int64_t columns_, n_;
  const double total_weight_;
};

// Each column sorted once, and kept in order: a split moves every column's part of the node so that
// the left child's values, still in order, lie before the right child's.
std::unique_ptr<Layout> column_layout(const Presort& sorted, const TreeTarget& target,
                                      const ExactSettings& settings);

// Each row once, in any order; a node's values of a column are sorted when they are asked for.
std::unique_ptr<Layout> row_layout(const Presort& sorted, const TreeTarget& target,
                                   const ExactSettings& settings);

// Each row once, in any order, for random splits: a node's values of a column are read where they
// lie.
std::unique_ptr<Layout> random_layout(const ValueColumns& columns, const TreeTarget& target,
                                      const ExactSettings& settings);

// Each row once, in the order of the rows, and columns of bins.
std::unique_ptr<Layout> bin_layout(const BinnedColumns& binned, const TreeTarget& target,
                                   const ExactSettings& settings);

}  // namespace fastnn
