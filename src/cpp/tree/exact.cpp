// Growth follows scikit-learn's builders and splitters step by step, so that the same draws are
// made in the same order; what differs is how a node's values come to be sorted. Each column is
// sorted once, and the order is kept: a split moves every column's part of the node so that the
// left child's values, still in order, lie before the right child's.
#include "tree/exact.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

#include "common/parallel.hpp"
#include "tree/search.hpp"

namespace fastnn {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
constexpr int64_t kLeaf = -1, kUndefined = -2;

// Marsaglia's xorshift (https://www.jstatsoft.org/v08/i14/paper), as scikit-learn draws from it.
class Draws {
 public:
  explicit Draws(uint32_t seed) : state_(seed) {}
  int64_t integer(int64_t low, int64_t high) {
    return low + int64_t(next() % uint64_t(high - low));
  }
  double uniform(double low, double high) {
    return (high - low) * double(next()) / double(kMost) + low;
  }

 private:
  static constexpr uint32_t kMost = 2147483647u;
  uint32_t next() {
    if (state_ == 0) state_ = 1;
    state_ ^= state_ << 13;
    state_ ^= state_ >> 17;
    state_ ^= state_ << 5;
    return state_ % (kMost + 1);
  }
  uint32_t state_;
};

struct Frame {
  int64_t start, end, depth, parent;
  bool is_left;
  double impurity;
  int64_t constants;  // features known to be constant in the node
  double lower, upper;
};

// A split that was chosen for a node.
struct Split {
  Candidate of;
  int64_t feature;
  double improvement, impurity_left, impurity_right, middle;
};

class Grower {
 public:
  Grower(const Presort& sorted, const TreeTarget& target, const ExactSettings& settings)
      : sorted_(sorted),
        t_(target),
        s_(settings),
        search_(target, sorted.rows),
        draws_(settings.seed),
        features_(size_t(sorted.columns)),
        constant_(size_t(sorted.columns)),
        candidates_(size_t(sorted.columns)),
        left_sums_(size_t(target.sums())),
        right_sums_(size_t(target.sums())),
        rest_(size_t(target.sums())),
        sums_(size_t(target.sums())) {
    for (size_t f = 0; f < features_.size(); f++) features_[f] = int64_t(f);
    by_rows_ = s_.random_splitter || s_.max_features * 2 <= sorted.columns;
    load();
  }

  ExactTree grow() {
    if (s_.max_leaf_nodes < 0)
      depth_first();
    else
      best_first();
    return std::move(tree_);
  }

 private:
  // Copies the columns without the rows of weight 0, with their classes in the keys.
  void load() {
    n_ = 0;
    total_weight_ = 0;
    for (int64_t r = 0; r < sorted_.rows; r++) {
      const double w = t_.weight(r);
      n_ += w != 0.0;
      total_weight_ += w;
    }
    threads_ = threads_worth(double(sorted_.rows) * double(sorted_.columns), 2000, s_.threads);
    for (int i = 0; i < (by_rows_ ? 1 : s_.threads); i++) work_.push_back(search_.work());
    if (by_rows_) {
      load_rows();
      return;
    }
    const size_t all = size_t(n_) * size_t(sorted_.columns);
    memory_ = Memory((all + size_t(n_) * size_t(s_.threads)) * 8);
    values_ = memory_.as<float>();
    keys_ = reinterpret_cast<uint32_t*>(values_ + all);
    spare_values_ = reinterpret_cast<float*>(keys_ + all);
    spare_keys_ = reinterpret_cast<uint32_t*>(spare_values_ + n_ * s_.threads);
    side_.assign(size_t(sorted_.rows / 32 + 1), 0);
    std::vector<uint32_t> key_of(size_t(sorted_.rows));
    for (int64_t r = 0; r < sorted_.rows; r++)
      key_of[size_t(r)] = t_.weight(r) != 0.0 ? search_.key(uint32_t(r)) : kDropped;
    std::atomic<int64_t> next{0};
    parallel(threads_, [&](int, int) {
      for (int64_t f; (f = next.fetch_add(1)) < sorted_.columns;) {
        const uint32_t* order = sorted_.order + f * sorted_.rows;
        const float* from = sorted_.values + f * sorted_.rows;
        float* v = values_ + f * n_;
        uint32_t* k = keys_ + f * n_;
        if (n_ == sorted_.rows) {
          std::memcpy(v, from, size_t(n_) * 4);
          for (int64_t i = 0; i < n_; i++) k[i] = key_of[order[i]];
          continue;
        }
        int64_t kept = 0;
        for (int64_t i = 0; i < sorted_.rows && kept < n_; i++) {
          const uint32_t key = key_of[order[i]];
          v[kept] = from[i], k[kept] = key;
          kept += key != kDropped;
        }
      }
    });
  }

  void load_rows() {
    constexpr int64_t kRoom = 16;
    const int64_t words = sorted_.rows / 64 + 1;
    ranks_ = &sorted_.ranks(threads_);
    memory_ = Memory(size_t(words + 2 * n_) * 8 + size_t(3 * n_ + 2 * kRoom + sorted_.rows) * 4);
    bits_ = memory_.as<uint64_t>();
    std::memset(bits_, 0, size_t(words) * 8);
    records_ = bits_ + words;
    keys_ = reinterpret_cast<uint32_t*>(records_ + 2 * n_);
    values_ = reinterpret_cast<float*>(keys_ + n_);
    spare_keys_ = reinterpret_cast<uint32_t*>(values_ + n_ + kRoom);
    key_of_ = spare_keys_ + n_ + kRoom;
    int64_t kept = 0;
    for (int64_t r = 0; r < sorted_.rows; r++) {
      key_of_[r] = search_.key(uint32_t(r));
      if (t_.weight(r) != 0.0) keys_[kept++] = key_of_[r];
    }
  }

  // The node's part of a column, in order. By rows, until the next one is asked for.
  SortedSlice slice(int64_t f, int64_t start, int64_t end) const {
    if (by_rows_) {
      const int64_t column = f * sorted_.rows;
      tree_kernels().sort_node({ranks_of(f, end - start), sorted_.order + column,
                                sorted_.values + column, sorted_.rows, key_of_, keys_ + start,
                                end - start, search_.shift(), bits_, records_, values_,
                                spare_keys_});
      SortedSlice s{values_, spare_keys_, end - start, 0};
      count_missing(f, s);
      return s;
    }
    SortedSlice s{values_ + f * n_ + start, keys_ + f * n_ + start, end - start, 0};
    count_missing(f, s);
    return s;
  }

  // Few rows of many read a cache line each, which holds their other columns as well.
  ColumnRanks ranks_of(int64_t f, int64_t rows) const {
    if (ranks_->by_row && rows * kDenseShare < sorted_.rows)
      return {&ranks_->by_row[f].rank, 2 * sorted_.columns};
    return {ranks_->by_column + f * sorted_.rows, 1};
  }

  void count_missing(int64_t f, SortedSlice& s) const {
    if (sorted_.missing[size_t(f)])
      while (s.missing < s.n && s.values[s.n - 1 - s.missing] != s.values[s.n - 1 - s.missing])
        s.missing++;
  }

  NodeLimits limits(int64_t f, const Frame& node) const {
    return {s_.min_samples_leaf, s_.min_weight_leaf, s_.monotonic ? s_.monotonic[f] : 0, node.lower,
            node.upper};
  }

  // Threads for a loop over the features of a node.
  int threads_for(int64_t rows) const {
    return std::min<int>(threads_worth(double(rows) * double(sorted_.columns), 1500, s_.threads),
                         int(sorted_.columns));
  }

  bool surely_leaf(int64_t samples, double weight, double impurity, int64_t depth) const {
    return depth >= s_.max_depth || samples < s_.min_samples_split ||
           samples < 2 * s_.min_samples_leaf || weight < 2 * s_.min_weight_leaf ||
           impurity <= kEpsilon;
  }

  // The node's ranks in a column.
  struct Ranks {
    uint32_t least, most;  // of those that are not missing
    int64_t missing;
    bool constant;
  };
  Ranks ranks_in(int64_t f, int64_t start, int64_t end) const {
    const ColumnRanks ranks = ranks_of(f, end - start);
    const uint32_t first_missing = first_missing_rank(f);
    const int shift = search_.shift();
    auto* of_node = reinterpret_cast<uint32_t*>(values_);
    Ranks r{0xffffffffu, 0, 0, false};
    for (int64_t i = start; i < end; i++) {
      const uint32_t place = ranks.rank[int64_t(keys_[i] >> shift) * ranks.stride];
      of_node[i - start] = place;
      r.least = std::min(r.least, place);
      r.most = std::max(r.most, place < first_missing ? place : 0);
      r.missing += place >= first_missing;
    }
    const float* values = sorted_.values + f * sorted_.rows;
    r.constant = r.missing == end - start ||
                 (!r.missing && !(values[r.most] > values[r.least] + kFeatureThreshold));
    return r;
  }

  uint32_t first_missing_rank(int64_t f) const {
    return uint32_t(sorted_.rows - sorted_.missing[size_t(f)]);
  }

  // Ranks below this are of values <= threshold.
  uint32_t rank_behind(int64_t f, double threshold) const {
    const float* values = sorted_.values + f * sorted_.rows;
    uint32_t low = 0, high = first_missing_rank(f);
    while (low < high) {
      const uint32_t middle = (low + high) / 2;
      if (double(values[middle]) <= threshold)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

  // A random threshold between the least and the largest value, after ranks_in.
  Candidate random_candidate(int64_t f, const Ranks& r, const Frame& node, const double* sums) {
    Candidate c{};
    c.proxy = -kInfinity, c.missing = r.missing;
    const float* values = sorted_.values + f * sorted_.rows;
    c.threshold = draws_.uniform(values[r.least], values[r.most]);
    if (r.missing) c.missing_left = draws_.integer(0, 2) != 0;
    if (c.threshold == values[r.most]) c.threshold = values[r.least];
    const uint32_t below = rank_behind(f, c.threshold);
    const uint32_t from = c.missing_left ? first_missing_rank(f) : 0xffffffffu;
    const auto* of_node = reinterpret_cast<const uint32_t*>(values_);
    const int64_t n = node.end - node.start;
    int64_t left = 0;
    for (int64_t i = 0; i < n; i++) {
      spare_keys_[left] = keys_[node.start + i];
      left += (of_node[i] < below) | (of_node[i] >= from);
    }
    if (left < s_.min_samples_leaf || n - left < s_.min_samples_leaf) return c;
    SplitSearch::Work& w = work_[0];
    std::fill(w.left.begin(), w.left.end(), 0.0);
    search_.add_rows({}, {nullptr, spare_keys_, n, 0}, 0, left, w.left.data());
    if (!search_.allowed(sums, limits(f, node), w)) return c;
    c.proxy = proxy_of(t_, w.left.data(), w.right.data());
    c.told_missing_left = r.missing ? c.missing_left : left > n - left;
    c.left = left;
    return c;
  }

  // Draws features without replacement and takes the best split of what is drawn. False: none.
  // node.constants grows by the features that are found to be constant.
  bool search(Frame& node, const double* sums, Split& split) {
    const int64_t columns = sorted_.columns, known = node.constants;
    int64_t undrawn = columns, visited = 0, found = 0, drawn = 0, all_constant = known;
    const int64_t rows = node.end - node.start;
    const int threads = s_.max_features >= columns && !by_rows_ ? threads_for(rows) : 1;
    if (threads > 1) {
      std::atomic<int64_t> next{known};
      parallel(threads, [&](int thread, int) {
        for (int64_t i; (i = next.fetch_add(1)) < columns;) {
          const int64_t f = features_[size_t(i)];
          candidates_[size_t(f)] = search_.best(slice(f, node.start, node.end), sums,
                                                limits(f, node), work_[size_t(thread)]);
        }
      });
    }
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
      Candidate c{};
      Ranks ranks{};
      if (threads > 1) {
        c = candidates_[size_t(f)];
      } else {
        if (s_.random_splitter) {
          ranks = ranks_in(f, node.start, node.end);
          c.constant = ranks.constant;
        } else {
          c = search_.best(slice(f, node.start, node.end), sums, limits(f, node), work_[0]);
        }
      }
      if (c.constant) {
        std::swap(features_[size_t(at)], features_[size_t(all_constant)]);
        found++, all_constant++;
        continue;
      }
      undrawn--;
      std::swap(features_[size_t(undrawn)], features_[size_t(at)]);
      if (s_.random_splitter) c = random_candidate(f, ranks, node, sums);
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

  // Sums and impurities of both sides. By rows, the node's are divided on the way.
  void judge(const Frame& node, const double* sums, Split& split) {
    SortedSlice s;
    Candidate c = split.of;
    if (by_rows_) {
      const int64_t f = split.feature;
      tree_kernels().partition_rows(keys_ + node.start, node.end - node.start, search_.shift(),
                                    ranks_of(f, node.end - node.start), rank_behind(f, c.threshold),
                                    c.missing_left ? first_missing_rank(f) : 0xffffffffu,
                                    spare_keys_);
      s = {nullptr, keys_ + node.start, node.end - node.start, 0};
      c.missing_left = false, c.missing = 0;
    } else {
      s = slice(split.feature, node.start, node.end);
    }
    std::fill(left_sums_.begin(), left_sums_.end(), 0.0);
    std::fill(right_sums_.begin(), right_sums_.end(), 0.0);
    search_.add_rows(c, s, 0, c.left, left_sums_.data());
    search_.add_rows(c, s, c.left, s.n, right_sums_.data());
    for (size_t i = 0; i < rest_.size(); i++) rest_[i] = sums[i] - left_sums_[i];
    if (t_.criterion == TreeCriterion::poisson) {
      split.impurity_left = poisson_loss(t_, left_sums_.data(), c.left,
                                         [&](int64_t i) { return c.row(s, i, search_.shift()); });
      split.impurity_right = poisson_loss(t_, rest_.data(), s.n - c.left, [&](int64_t i) {
        return c.row(s, c.left + i, search_.shift());
      });
    } else {
      split.impurity_left = impurity_of(t_, left_sums_.data());
      split.impurity_right = impurity_of(t_, rest_.data());
    }
    split.improvement =
        (sums[0] / total_weight_) * (node.impurity - (rest_[0] / sums[0] * split.impurity_right) -
                                     (left_sums_[0] / sums[0] * split.impurity_left));
    split.middle = left_sums_[2] / (2 * left_sums_[0]) + rest_[2] / (2 * rest_[0]);
  }

  // Moves every column's part of the node. Constant features need no order any more.
  void divide(int64_t start, int64_t end, int64_t constants, const Candidate& c, int64_t feature) {
    if (by_rows_) return;
    const SortedSlice s = slice(feature, start, end);
    const int shift = search_.shift();
    const bool mark_left = c.left <= s.n - c.left;
    const int64_t begin = mark_left ? 0 : c.left, stop = mark_left ? c.left : s.n;
    for (int64_t i = begin; i < stop; i++) {
      const uint32_t row = c.row(s, i, shift);
      side_[row >> 5] |= 1u << (row & 31);
    }
    const TreeKernels& kernels = tree_kernels();
    auto move = [&](int64_t f, int thread) {
      if (f == feature && !c.missing_left) return;
      kernels.partition(values_ + f * n_ + start, keys_ + f * n_ + start, end - start, shift,
                        side_.data(), mark_left ? 0 : 1, spare_values_ + thread * n_,
                        spare_keys_ + thread * n_);
    };
    const int threads = threads_for(end - start);
    if (threads > 1) {
      std::atomic<int64_t> next{constants};
      parallel(threads, [&](int thread, int) {
        for (int64_t i; (i = next.fetch_add(1)) < sorted_.columns;)
          move(features_[size_t(i)], thread);
      });
    } else {
      for (int64_t i = constants; i < sorted_.columns; i++) move(features_[size_t(i)], 0);
    }
    const uint32_t* k = keys_ + feature * n_ + start;
    for (int64_t i = begin; i < stop; i++) side_[k[i] >> shift >> 5] = 0;
  }

  int64_t add_node(const Frame& node, const double* sums, bool leaf, const Split& split) {
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
  void bound(const Frame& node, int64_t feature, double middle, Frame& left, Frame& right) const {
    left.lower = right.lower = node.lower;
    left.upper = right.upper = node.upper;
    const int sign = s_.monotonic ? s_.monotonic[feature] : 0;
    if (sign > 0) left.upper = right.lower = middle;
    if (sign < 0) left.lower = right.upper = middle;
  }

  Frame root() {
    std::fill(sums_.begin(), sums_.end(), 0.0);
    if (by_rows_)
      search_.add_rows({}, {nullptr, keys_, n_, 0}, 0, n_, sums_.data());
    else
      for (int64_t r = 0; r < sorted_.rows; r++)
        if (t_.weight(r) != 0.0) t_.add(sums_.data(), r);
    Frame node{0, n_, 0, kUndefined, false, 0, 0, -kInfinity, kInfinity};
    if (t_.criterion == TreeCriterion::poisson) {
      std::vector<int64_t> rows;
      for (int64_t r = 0; r < sorted_.rows; r++)
        if (t_.weight(r) != 0.0) rows.push_back(r);
      node.impurity =
          poisson_loss(t_, sums_.data(), n_, [&](int64_t i) { return rows[size_t(i)]; });
    } else {
      node.impurity = impurity_of(t_, sums_.data());
    }
    return node;
  }

  void depth_first() {
    std::vector<Frame> stack;
    std::vector<double> sums;  // of the frames on the stack
    const size_t width = sums_.size();
    stack.push_back(root());
    sums = sums_;
    while (!stack.empty()) {
      Frame node = stack.back();
      stack.pop_back();
      std::copy(sums.end() - ptrdiff_t(width), sums.end(), sums_.begin());
      sums.resize(sums.size() - width);
      bool leaf = surely_leaf(node.end - node.start, sums_[0], node.impurity, node.depth);
      Split split{};
      if (!leaf)
        leaf = !search(node, sums_.data(), split) ||
               split.improvement + kEpsilon < s_.min_impurity_decrease;
      const int64_t id = add_node(node, sums_.data(), leaf, split);
      tree_.max_depth = std::max(tree_.max_depth, node.depth);
      if (leaf) continue;
      const int64_t middle = node.start + split.of.left;
      Frame left{node.start, middle, node.depth + 1, id, true, split.impurity_left, node.constants,
                 0,          0},
          right{middle, node.end, node.depth + 1, id, false, split.impurity_right, node.constants,
                0,      0};
      bound(node, split.feature, split.middle, left, right);
      if (!surely_leaf(split.of.left, left_sums_[0], left.impurity, left.depth) ||
          !surely_leaf(node.end - middle, right_sums_[0], right.impurity, right.depth))
        divide(node.start, node.end, node.constants, split.of, split.feature);
      stack.push_back(right);
      sums.insert(sums.end(), right_sums_.begin(), right_sums_.end());
      stack.push_back(left);
      sums.insert(sums.end(), left_sums_.begin(), left_sums_.end());
    }
  }

  // A node that waits to be split, the one of the best improvement first.
  struct Waiting {
    Frame node;
    int64_t id;
    bool leaf;
    double improvement;
    Split split;
    size_t sums;  // where those of its left and right side are
    bool operator<(const Waiting& other) const { return improvement < other.improvement; }
  };

  Waiting wait(Frame node, const double* sums, std::vector<double>& kept) {
    node.constants = 0;
    std::copy(sums, sums + sums_.size(), sums_.begin());
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
    const Frame first = root();
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
      Frame left{
          w.node.start, middle, w.node.depth + 1, w.id, true, w.split.impurity_left, 0, 0, 0},
          right{middle, w.node.end, w.node.depth + 1, w.id, false, w.split.impurity_right, 0, 0, 0};
      bound(w.node, w.split.feature, w.split.middle, left, right);
      divide(w.node.start, w.node.end, 0, w.split.of, w.split.feature);
      const size_t width = sums_.size();
      both.assign(kept.begin() + ptrdiff_t(w.sums), kept.begin() + ptrdiff_t(w.sums + 2 * width));
      const Waiting l = wait(left, both.data(), kept);
      const Waiting r = wait(right, both.data() + width, kept);
      push(l);
      push(r);
    }
  }

  static constexpr uint32_t kDropped = 0xffffffffu;

  const Presort& sorted_;
  const TreeTarget& t_;
  const ExactSettings& s_;
  const SplitSearch search_;
  Draws draws_;
  int threads_ = 1;
  int64_t n_ = 0;  // rows of weight
  double total_weight_ = 0;
  Memory memory_;
  float *values_ = nullptr, *spare_values_ = nullptr;
  uint32_t *keys_ = nullptr, *spare_keys_ = nullptr;
  // By rows:
  bool by_rows_ = false;
  const Presort::Ranks* ranks_ = nullptr;
  uint64_t *bits_ = nullptr, *records_ = nullptr;
  uint32_t* key_of_ = nullptr;
  std::vector<uint32_t> side_;  // a bit a row; 0 but while a node is divided
  std::vector<SplitSearch::Work> work_;
  std::vector<int64_t> features_, constant_;
  std::vector<Candidate> candidates_;
  std::vector<double> left_sums_, right_sums_, rest_, sums_;
  ExactTree tree_;
};

}  // namespace

ExactTree grow_exact(const Presort& sorted, const TreeTarget& target,
                     const ExactSettings& settings) {
  return Grower(sorted, target, settings).grow();
}

BestSplits best_splits(const Presort& sorted, const TreeTarget& target, int threads) {
  const SplitSearch search(target, sorted.rows);
  std::vector<double> sums(size_t(target.sums()), 0.0);
  std::vector<uint32_t> key_of(size_t(sorted.rows));
  std::vector<int64_t> rows;
  for (int64_t r = 0; r < sorted.rows; r++) {
    key_of[size_t(r)] = search.key(uint32_t(r));
    if (target.weight(r) == 0.0) continue;
    rows.push_back(r);
    target.add(sums.data(), r);
  }
  auto impurity = [&](const double* of, int64_t count, auto row_at) {
    return target.criterion == TreeCriterion::poisson ? poisson_loss(target, of, count, row_at)
                                                      : impurity_of(target, of);
  };
  const auto n = int64_t(rows.size());
  const double whole = n ? impurity(sums.data(), n, [&](int64_t i) { return rows[size_t(i)]; }) : 0;
  std::vector<ColumnSplit> out(size_t(sorted.columns));
  threads = std::min<int>(threads_worth(double(n) * double(sorted.columns), 3000, threads),
                          int(sorted.columns));
  const Memory memory(size_t(n) * 8 * size_t(threads));
  std::vector<SplitSearch::Work> work;
  std::vector<std::vector<double>> right(size_t(threads), std::vector<double>(sums.size()));
  for (int i = 0; i < threads; i++) work.push_back(search.work());
  std::atomic<int64_t> next{0};
  parallel(threads, [&](int thread, int) {
    auto* values = memory.as<float>() + thread * 2 * n;
    auto* keys = reinterpret_cast<uint32_t*>(values + n);
    for (int64_t f; (f = next.fetch_add(1)) < sorted.columns;) {
      SortedSlice s{values, keys, 0, 0};
      for (int64_t i = 0; i < sorted.rows; i++) {
        const uint32_t row = sorted.order[f * sorted.rows + i];
        if (target.weight(row) == 0.0) continue;
        values[s.n] = sorted.values[f * sorted.rows + i], keys[s.n] = key_of[row];
        s.missing += values[s.n] != values[s.n];
        s.n++;
      }
      ColumnSplit& o = out[size_t(f)];
      o = {};
      o.threshold = o.impurity = std::numeric_limits<double>::quiet_NaN();
      SplitSearch::Work& w = work[size_t(thread)];
      const Candidate c = search.best(s, sums.data(), {}, w);
      if (c.constant || !c.left) continue;
      std::fill(w.left.begin(), w.left.end(), 0.0);
      search.add_rows(c, s, 0, c.left, w.left.data());
      std::vector<double>& rest = right[size_t(thread)];
      for (size_t i = 0; i < rest.size(); i++) rest[i] = sums[i] - w.left[i];
      o.threshold = c.threshold, o.left = c.left;
      o.missing_go_left = c.told_missing_left;
      const double left = impurity(w.left.data(), c.left,
                                   [&](int64_t i) { return int64_t(c.row(s, i, search.shift())); });
      const double other = impurity(rest.data(), s.n - c.left, [&](int64_t i) {
        return int64_t(c.row(s, c.left + i, search.shift()));
      });
      o.impurity = rest[0] / sums[0] * other + w.left[0] / sums[0] * left;
      o.improvement = whole - o.impurity;
    }
  });
  return {whole, std::move(out)};
}

bool fits_exact(const TreeTarget& target, int64_t rows) {
  int64_t classes = target.classification() && target.outputs == 1 ? target.classes[0] : 1;
  int shift = 0;
  while (classes <= 65536 && int64_t(1) << shift < classes) shift++;
  return rows < (int64_t(1) << (32 - std::max(shift, 1))) - 1;
}

}  // namespace fastnn
