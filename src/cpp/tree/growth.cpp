// Growth follows scikit-learn's builders and splitters step by step, so that the same draws are
// made in the same order; what differs is how a node's splits come to be found, which is the
// layout's.
#include "tree/growth.hpp"

#include <algorithm>
#include <limits>

namespace fastnn {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
constexpr int64_t kLeaf = -1, kUndefined = -2;

class Growth {
 public:
  Growth(Layout& layout, const TreeTarget& target, const ExactSettings& settings)
      : layout_(layout),
        t_(target),
        s_(settings),
        draws_(settings.seed),
        features_(size_t(layout.columns())),
        constant_(size_t(layout.columns())),
        left_sums_(size_t(target.sums())),
        right_sums_(size_t(target.sums())),
        rest_(size_t(target.sums())),
        sums_(size_t(target.sums())) {
    for (size_t f = 0; f < features_.size(); f++) features_[f] = int64_t(f);
    if (!layout.absolute()) return;
    absolute_work_ = layout.absolute()->work();
    for (int64_t r = 0; int64_t(rows_.size()) < layout.rows(); r++)
      if (t_.weight(r) != 0.0) rows_.push_back(uint32_t(r));
  }

  ExactTree grow() {
    if (s_.max_leaf_nodes < 0)
      depth_first();
    else
      best_first();
    return std::move(tree_);
  }

 private:
  bool surely_leaf(int64_t samples, double weight, double impurity, int64_t depth) const {
    return depth >= s_.max_depth || samples < s_.min_samples_split ||
           samples < 2 * s_.min_samples_leaf || weight < 2 * s_.min_weight_leaf ||
           impurity <= kEpsilon;
  }

  // Draws features without replacement and takes the best split of what is drawn. False: none.
  // node.constants grows by the features that are found to be constant.
  bool search(GrowingNode& node, const double* sums, ChosenSplit& split) {
    const int64_t columns = layout_.columns(), known = node.constants;
    int64_t undrawn = columns, visited = 0, found = 0, drawn = 0, all_constant = known;
    layout_.enter(node, sums, features_.data() + known,
                  s_.max_features >= columns ? columns - known : 0);
    Candidate best{};
    best.proxy = -kInfinity;
    int64_t best_feature = 0;
    while (undrawn > all_constant && (visited < s_.max_features || visited <= found + drawn)) {
      visited++;
      // In order: constants drawn, constants not drawn, constants found now, not drawn, drawn.
      int64_t at = draws_.integer(drawn, undrawn - found);
      if (at < known) {
        std::swap(features_[size_t(drawn)], features_[size_t(at)]);
        drawn++;
        continue;
      }
      at += found;
      const int64_t f = features_[size_t(at)];
      const Candidate c = layout_.look(f, node, sums, best.proxy, draws_);
      if (c.constant) {
        std::swap(features_[size_t(at)], features_[size_t(all_constant)]);
        found++, all_constant++;
        continue;
      }
      undrawn--;
      std::swap(features_[size_t(undrawn)], features_[size_t(at)]);
      if (c.left && c.proxy > best.proxy) best = c, best_feature = f;
    }
    // Siblings and children go on from the same constants in the same order.
    std::copy(constant_.begin(), constant_.begin() + known, features_.begin());
    std::copy(features_.begin() + known, features_.begin() + all_constant,
              constant_.begin() + known);
    node.constants = all_constant;
    if (!best.left) return false;
    split.of = best, split.feature = best_feature;
    judge(node, sums, split);
    return true;
  }

  // Sums and impurities of both sides.
  void judge(const GrowingNode& node, const double* sums, ChosenSplit& split) {
    std::fill(left_sums_.begin(), left_sums_.end(), 0.0);
    std::fill(right_sums_.begin(), right_sums_.end(), 0.0);
    layout_.sides(node, sums, split, left_sums_.data(), right_sums_.data());
    for (size_t i = 0; i < rest_.size(); i++) rest_[i] = sums[i] - left_sums_[i];
    if (t_.criterion == TreeCriterion::poisson) {
      const int64_t left = split.of.left;
      split.impurity_left =
          poisson_loss(t_, left_sums_.data(), left, [&](int64_t i) { return layout_.row(i); });
      split.impurity_right = poisson_loss(t_, rest_.data(), node.rows() - left,
                                          [&](int64_t i) { return layout_.row(left + i); });
    } else if (t_.absolute()) {
      judge_absolute(node, split);
    } else {
      split.impurity_left = impurity_of(t_, left_sums_.data());
      split.impurity_right = impurity_of(t_, rest_.data());
    }
    split.improvement = (sums[0] / layout_.total_weight()) *
                        (node.impurity - (rest_[0] / sums[0] * split.impurity_right) -
                         (left_sums_[0] / sums[0] * split.impurity_left));
    if (!t_.absolute())
      split.middle = left_sums_[2] / (2 * left_sums_[0]) + rest_[2] / (2 * rest_[0]);
  }

  // Leaves the node's rows in their order, those that go left first.
  void judge_absolute(const GrowingNode& node, ChosenSplit& split) {
    const int64_t n = node.rows(), left = split.of.left;
    uint32_t* rows = rows_.data() + node.start;
    for (int64_t i = 0; i < n; i++) rows[i] = uint32_t(layout_.row(i));
    const AbsoluteErrors& errors = *layout_.absolute();
    const auto outputs = double(t_.outputs);
    const AbsoluteErrors::Side l = errors.side(rows, left, 1, absolute_work_);
    const AbsoluteErrors::Side r = errors.side(rows + n - 1, n - left, -1, absolute_work_);
    split.impurity_left = l.error / (left_sums_[0] * outputs);
    split.impurity_right = r.error / (rest_[0] * outputs);
    split.middle = (l.median + r.median) / 2;
  }

  // Before anything else is asked of a node.
  void enter(const GrowingNode& node) {
    if (t_.absolute()) layout_.absolute()->enter(rows_.data() + node.start, node.rows());
  }

  // Constants as they stand after the node's search.
  void divide(const GrowingNode& node, int64_t constants, const ChosenSplit& split) {
    layout_.divide(node, split, features_.data() + constants, layout_.columns() - constants);
  }

  int64_t add_node(const GrowingNode& node, const double* sums, bool leaf,
                   const ChosenSplit& split) {
    const int64_t id = int64_t(tree_.nodes.size());
    if (node.parent != kUndefined) {
      TreeNode& parent = tree_.nodes[size_t(node.parent)];
      (node.is_left ? parent.left : parent.right) = id;
    }
    TreeNode out{};
    out.impurity = node.impurity;
    out.samples = node.end - node.start;
    out.weighted_samples = sums[0];
    if (leaf) {
      make_leaf(out);
    } else {
      out.feature = split.feature, out.threshold = split.of.threshold;
      out.missing_go_left = split.of.told_missing_left;
    }
    tree_.nodes.push_back(out);
    const size_t at = tree_.values.size();
    tree_.values.resize(at + size_t(t_.outputs * t_.most_classes), 0.0);
    double* value = tree_.values.data() + at;
    for (int64_t k = 0; k < t_.outputs; k++) {
      const int64_t count = t_.classification() ? t_.classes[k] : 1;
      for (int64_t i = 0; i < count; i++)
        value[k * t_.most_classes + i] = sums[2 + k * t_.most_classes + i] / sums[0];
      if (t_.absolute()) value[k] = layout_.absolute()->medians()[size_t(k)];
    }
    if (s_.monotonic) {
      if (value[0] < node.lower)
        value[0] = node.lower;
      else if (value[0] > node.upper)
        value[0] = node.upper;
      if (t_.classification() && t_.most_classes > 1) value[1] = 1 - value[0];
    }
    return id;
  }

  static void make_leaf(TreeNode& node) {
    node.left = node.right = kLeaf;
    node.feature = kUndefined, node.threshold = double(kUndefined);
  }

  // Bounds of the children's values.
  void bound(const GrowingNode& node, const ChosenSplit& split, GrowingNode& left,
             GrowingNode& right) const {
    left.lower = right.lower = node.lower;
    left.upper = right.upper = node.upper;
    const int sign = s_.monotonic ? s_.monotonic[split.feature] : 0;
    if (sign > 0) left.upper = right.lower = split.middle;
    if (sign < 0) left.lower = right.upper = split.middle;
  }

  GrowingNode root() {
    std::fill(sums_.begin(), sums_.end(), 0.0);
    layout_.sum_up(sums_.data());
    GrowingNode node{0, layout_.rows(), 0, kUndefined, false, 0, 0, -kInfinity, kInfinity};
    if (t_.criterion == TreeCriterion::poisson) {
      std::vector<int64_t> rows;
      for (int64_t r = 0; int64_t(rows.size()) < node.end; r++)
        if (t_.weight(r) != 0.0) rows.push_back(r);
      node.impurity =
          poisson_loss(t_, sums_.data(), node.end, [&](int64_t i) { return rows[size_t(i)]; });
    } else if (t_.absolute()) {
      enter(node);
      const AbsoluteErrors::Side all =
          layout_.absolute()->side(rows_.data() + node.end - 1, node.end, -1, absolute_work_);
      node.impurity = all.error / (sums_[0] * double(t_.outputs));
    } else {
      node.impurity = impurity_of(t_, sums_.data());
    }
    return node;
  }

  void depth_first() {
    std::vector<GrowingNode> stack;
    std::vector<double> sums;  // of the frames on the stack
    const size_t width = sums_.size();
    stack.push_back(root());
    sums = sums_;
    while (!stack.empty()) {
      GrowingNode node = stack.back();
      stack.pop_back();
      std::copy(sums.end() - ptrdiff_t(width), sums.end(), sums_.begin());
      sums.resize(sums.size() - width);
      enter(node);
      bool leaf = surely_leaf(node.end - node.start, sums_[0], node.impurity, node.depth);
      ChosenSplit split{};
      if (!leaf)
        leaf = !search(node, sums_.data(), split) ||
               split.improvement + kEpsilon < s_.min_impurity_decrease;
      const int64_t id = add_node(node, sums_.data(), leaf, split);
      tree_.max_depth = std::max(tree_.max_depth, node.depth);
      if (leaf) continue;
      const int64_t middle = node.start + split.of.left;
      GrowingNode left{
          node.start, middle, node.depth + 1, id, true, split.impurity_left, node.constants, 0, 0},
          right{middle, node.end, node.depth + 1, id, false, split.impurity_right, node.constants,
                0,      0};
      bound(node, split, left, right);
      if (!surely_leaf(split.of.left, left_sums_[0], left.impurity, left.depth) ||
          !surely_leaf(node.end - middle, right_sums_[0], right.impurity, right.depth))
        divide(node, node.constants, split);
      stack.push_back(right);
      sums.insert(sums.end(), right_sums_.begin(), right_sums_.end());
      stack.push_back(left);
      sums.insert(sums.end(), left_sums_.begin(), left_sums_.end());
    }
  }

  // A node that waits to be split, the one of the best improvement first.
  struct Waiting {
    GrowingNode node;
    int64_t id;
    bool leaf;
    double improvement;
    ChosenSplit split;
    size_t sums;  // where those of its left and right side are
    bool operator<(const Waiting& other) const { return improvement < other.improvement; }
  };

  Waiting wait(GrowingNode node, const double* sums, std::vector<double>& kept) {
    node.constants = 0;
    std::copy(sums, sums + sums_.size(), sums_.begin());
    enter(node);
    Waiting w{node, 0, false, 0, {}, 0};
    w.leaf = surely_leaf(node.end - node.start, sums_[0], node.impurity, node.depth);
    if (!w.leaf)
      w.leaf = !search(w.node, sums_.data(), w.split) ||
               w.split.improvement + kEpsilon < s_.min_impurity_decrease;
    w.id = add_node(node, sums_.data(), w.leaf, w.split);
    if (!w.leaf) {
      w.improvement = w.split.improvement;
      w.sums = kept.size();
      kept.insert(kept.end(), left_sums_.begin(), left_sums_.end());
      kept.insert(kept.end(), right_sums_.begin(), right_sums_.end());
    }
    return w;
  }

  void best_first() {
    std::vector<Waiting> heap;
    std::vector<double> kept, both;
    int64_t splits = s_.max_leaf_nodes - 1;
    auto push = [&](const Waiting& w) {
      heap.push_back(w);
      std::push_heap(heap.begin(), heap.end());
    };
    const GrowingNode first = root();
    both = sums_;
    push(wait(first, both.data(), kept));
    while (!heap.empty()) {
      std::pop_heap(heap.begin(), heap.end());
      const Waiting w = heap.back();
      heap.pop_back();
      tree_.max_depth = std::max(tree_.max_depth, w.node.depth);
      if (w.leaf || splits <= 0) {
        make_leaf(tree_.nodes[size_t(w.id)]);
        continue;
      }
      splits--;
      const int64_t middle = w.node.start + w.split.of.left;
      GrowingNode left{
          w.node.start, middle, w.node.depth + 1, w.id, true, w.split.impurity_left, 0, 0, 0},
          right{middle, w.node.end, w.node.depth + 1, w.id, false, w.split.impurity_right, 0, 0, 0};
      bound(w.node, w.split, left, right);
      divide(w.node, 0, w.split);
      const size_t width = sums_.size();
      both.assign(kept.begin() + ptrdiff_t(w.sums), kept.begin() + ptrdiff_t(w.sums + 2 * width));
      const Waiting l = wait(left, both.data(), kept);
      const Waiting r = wait(right, both.data() + width, kept);
      push(l);
      push(r);
    }
  }

  Layout& layout_;
  const TreeTarget& t_;
  const ExactSettings& s_;
  Draws draws_;
  std::vector<int64_t> features_, constant_;
  std::vector<double> left_sums_, right_sums_, rest_, sums_;
  // Of absolute errors: the rows of all nodes, each node's together.
  std::vector<uint32_t> rows_;
  AbsoluteErrors::Work absolute_work_;
  ExactTree tree_;
};

}  // namespace

ExactTree grow(Layout& layout, const TreeTarget& target, const ExactSettings& settings) {
  return Growth(layout, target, settings).grow();
}

}  // namespace fastnn
