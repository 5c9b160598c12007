// Nodes whose splits are found before growth asks for them, some levels at a time.
//
// Which of a node's splits growth takes is settled by its draws alone where two columns are equally
// good, and these depend on all nodes before it. So the search that is ahead guesses: it takes the
// first of the best columns, and goes on with the nodes below. Where growth takes another, what was
// found below is forgotten, and searched anew from the split that was taken. The tree is the same
// either way.
#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <stdexcept>
#include <utility>

#include "tree/ahead.hpp"
#include "tree/growth.hpp"

namespace fastnn {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

class AheadLayout final : public Layout {
 public:
  AheadLayout(const AheadColumns& columns, AheadSearch& search, const TreeTarget& target,
              const ExactSettings& settings)
      : Layout(target, settings, columns.rows, columns.columns),
        c_(columns),
        ahead_(search),
        classes_(target.classes[0]),
        words_(target.classes[0] + (target.weights != nullptr)) {}

  void sum_up(double* sums) const override {
    for (int64_t r = 0; r < c_.rows; r++) t_.add(sums, r);
  }

  void enter(const GrowingNode& node, const double* sums, const int64_t*, int64_t) override {
    const Range range{node.start, node.end};
    auto found = known_.find(range);
    if (found == known_.end()) {  // the root
      Known root;
      root.weights.resize(size_t(words_));
      for (int64_t k = 0; k < classes_; k++) root.weights[size_t(k)] = int32_t(sums[2 + k]);
      if (words_ > classes_) root.weights[size_t(classes_)] = int32_t(node.rows());
      found = known_.emplace(range, std::move(root)).first;
    }
    if (found->second.candidates.empty()) search_from(range, node.depth);
    entered_ = &known_.at(range);
  }

  Candidate look(int64_t f, const GrowingNode& node, const double*, double, Draws&) override {
    const AheadCandidate& a = entered_->candidates[size_t(f)];
    Candidate c{};
    c.proxy = a.proxy, c.missing = a.missing, c.constant = a.constant;
    if (!a.left) return c;
    c.left = a.left, c.last = a.last, c.missing_left = a.missing_left;
    c.told_missing_left = a.missing ? a.missing_left != 0 : a.left > node.rows() - a.left;
    // NaN <= infinity is false: all but NaN go left.
    c.threshold = kInfinity;
    if (a.next >= 0) {
      const int64_t column = f * c_.slots;
      c.threshold =
          double(c_.largest[column + a.last]) / 2.0 + double(c_.least[column + a.next]) / 2.0;
    }
    return c;
  }

  void sides(const GrowingNode& node, const double* sums, const ChosenSplit& split, double* left,
             double* right) override {
    const Range range{node.start, node.end};
    const Candidate& c = split.of;
    const AheadNode& guess = entered_->node;
    if (guess.feature != split.feature || guess.last != c.last ||
        (guess.missing_left != 0) != c.missing_left)
      split_anew(range, node.depth, split);
    const Known& side = known_.at({node.start, node.start + c.left});
    for (int64_t k = 0; k < classes_; k++) {
      left[2 + k] = double(side.weights[size_t(k)]);
      left[0] += left[2 + k];
    }
    for (int64_t i = 0; i < t_.sums(); i++) right[i] = sums[i] - left[i];
  }

  // Of criteria that there is no search ahead for.
  int64_t row(int64_t) const override { return 0; }
  // They are already.
  void divide(const GrowingNode&, const ChosenSplit&, const int64_t*, int64_t) override {}

 private:
  using Range = std::pair<int64_t, int64_t>;
  struct Known {
    AheadNode node{};
    std::vector<int32_t> weights;
    std::vector<AheadCandidate> candidates;  // none: not searched
    int64_t depth = 0;
  };

  // Whether growth will make it a leaf, as it says itself.
  bool surely_leaf(const Range& range, const Known& k) const {
    const int64_t rows = range.second - range.first;
    int64_t weight = 0;
    int32_t heaviest = 0;
    for (int64_t i = 0; i < classes_; i++) {
      weight += k.weights[size_t(i)];
      heaviest = std::max(heaviest, k.weights[size_t(i)]);
    }
    return k.depth >= s_.max_depth || rows < s_.min_samples_split ||
           rows < 2 * s_.min_samples_leaf || double(weight) < 2 * s_.min_weight_leaf ||
           heaviest == weight;
  }

  // The node, and with it as many as there is room for of those that growth will ask for later.
  void search_from(const Range& first, int64_t depth) {
    known_.at(first).depth = depth;
    std::vector<Range> ranges{first};
    for (auto i = known_.upper_bound(first); i != known_.end(); ++i) {
      if (int64_t(ranges.size()) >= c_.most_nodes) break;
      if (i->first.first < ranges.back().second) continue;  // below one that is searched
      if (i->second.candidates.empty() && !surely_leaf(i->first, i->second))
        ranges.push_back(i->first);
    }
    search(ranges);
  }

  void split_anew(const Range& range, int64_t depth, const ChosenSplit& split) {
    // All that lies within it, but itself.
    auto i = known_.lower_bound({range.first, 0});
    while (i != known_.end() && i->first.first < range.second)
      i = i->first.second <= range.second && i->first != range ? known_.erase(i) : std::next(i);
    Known& k = known_.at(range);
    k.depth = depth;
    k.node.feature = int32_t(split.feature);
    k.node.last = int32_t(split.of.last);
    k.node.missing_left = split.of.missing_left;
    search({range}, true);
  }

  void search(const std::vector<Range>& ranges, bool given = false) {
    std::vector<AheadNode> roots;
    std::vector<int32_t> weights;
    int64_t deepest = 0, rows = 0, largest = 0;
    for (const Range& range : ranges) {
      const Known& k = known_.at(range);
      AheadNode node = k.node;
      node.begin = int32_t(range.first);
      node.rows = int32_t(range.second - range.first);
      node.levels = int32_t(std::min<int64_t>(s_.max_depth - k.depth, kMostLevels));
      node.counted = 1;
      if (!given) node.feature = -1;
      deepest = std::max(deepest, int64_t(node.levels));
      rows += node.rows, largest = std::max(largest, int64_t(node.rows));
      roots.push_back(node);
      weights.insert(weights.end(), k.weights.begin(), k.weights.end());
    }
    // Guesses are in vain where not all columns are looked at.
    int levels = 1;
    if (s_.max_features >= columns_)
      while (levels < deepest && int64_t(ranges.size()) << levels <= c_.most_nodes &&
             int64_t(1) << levels < largest)
        levels++;
    for (AheadNode& node : roots) node.levels = std::min(node.levels, levels);
    const auto count = int64_t(roots.size());
    AheadResult found = ahead_.search(roots, weights, levels, rows);
    for (int64_t i = 0; i < ahead_nodes(count, levels + 1); i++) {
      const AheadNode& node = found.nodes[size_t(i)];
      if (node.begin < 0 || node.rows < 0 || node.begin + int64_t(node.rows) > n_ ||
          node.feature >= columns_)
        wrong();
      // Below a node that was not split lies the node itself, and nothing.
      if (i >= count && (!node.rows || found.nodes[size_t(parent_of(i, count))].feature < 0))
        continue;
      Known& k = known_[{node.begin, node.begin + node.rows}];
      k.node = node;
      const auto w = found.weights.begin() + i * words_;
      k.weights.assign(w, w + words_);
      if (i >= count) k.depth = depth_below(found, i, count);
      k.candidates.clear();
      if (node.levels > 0 && i < ahead_nodes(count, levels)) {
        const auto c = found.candidates.begin() + i * columns_;
        k.candidates.assign(c, c + columns_);
        for (const AheadCandidate& candidate : k.candidates) check(node, candidate);
      }
    }
  }

  // What would lead out of arrays, should a search go wrong.
  void check(const AheadNode& node, const AheadCandidate& c) const {
    if (c.left < 0 || c.left >= node.rows ||
        (c.left && (c.last < 0 || c.last >= c_.slots || c.next >= c_.slots)))
      wrong();
  }
  [[noreturn]] static void wrong() {
    throw std::runtime_error("tree_grow_ahead: the search gave nodes or splits that cannot be");
  }

  // Of node i, counted over all levels: level l begins at count * (2^l - 1).
  static int64_t parent_of(int64_t i, int64_t count) {
    int level = 0;
    while (ahead_nodes(count, level + 1) <= i) level++;
    return ahead_nodes(count, level - 1) + (i - ahead_nodes(count, level)) / 2;
  }
  int64_t depth_below(const AheadResult& found, int64_t i, int64_t count) const {
    const AheadNode& parent = found.nodes[size_t(parent_of(i, count))];
    return known_.at({parent.begin, parent.begin + parent.rows}).depth + 1;
  }

  static constexpr int kMostLevels = 16;

  const AheadColumns& c_;
  AheadSearch& ahead_;
  const int64_t classes_, words_;
  // By their rows, of which no two nodes have the same.
  std::map<Range, Known> known_;
  const Known* entered_ = nullptr;
};

}  // namespace

bool AheadColumns::close() const {
  for (int64_t f = 0; f < columns; f++) {
    float before = -std::numeric_limits<float>::infinity();
    for (int64_t b = f * slots; b < f * slots + slots - 1; b++) {
      if (least[b] > largest[b]) continue;
      if (!(largest[b] > before + kFeatureThreshold)) return true;
      before = largest[b];
    }
  }
  return false;
}

ExactTree grow_ahead(const AheadColumns& columns, AheadSearch& search, const TreeTarget& target,
                     const ExactSettings& settings) {
  AheadLayout layout(columns, search, target, settings);
  return grow(layout, target, settings);
}

}  // namespace fastnn
