// Random splits need no order: a node's values of a column are read where they lie, their range is
// found, and what goes left of the threshold drawn in it is summed up.
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/kernels_of.hpp"
#include "common/parallel.hpp"
#include "tree/layout.hpp"
#include "tree/random_kernels.hpp"
#include "tree/value_columns.hpp"

namespace fastnn {
namespace {

const RandomKernels& random_kernels() { return FASTNN_KERNELS_OF(random); }

class RandomLayout final : public Layout {
 public:
  RandomLayout(const ValueColumns& columns, const TreeTarget& target, const ExactSettings& settings)
      : Layout(target, settings, columns.rows, columns.columns),
        all_(columns),
        kernels_(random_kernels()),
        whole_{columns.values, columns.rows, nullptr, nullptr},
        work_(search_.work()) {
    using Way = SplitSearch::Way;
    const bool by_class = search_.way() == Way::two_classes || search_.way() == Way::many_classes;
    sums_ = by_class && search_.weights_in_keys()     ? Sums::of_classes
            : t_.absolute()                           ? Sums::of_rows
            : !t_.classification() && t_.outputs == 1 ? Sums::of_targets
                                                      : Sums::of_rows;
    // Columns that are looked at seldom are not worth copying, and nodes that are grown in any
    // order are not one subtree after the other.
    if (s_.max_leaf_nodes < 0 && s_.max_features * kLevels >= columns_)
      block_rows_ = std::min<int64_t>(kBlockValues / columns_, kMostBlockRows);
    const size_t local = size_t(block_rows_);
    const bool targets = sums_ == Sums::of_targets, weights = targets && t_.weights;
    const size_t sums = size_t(targets && t_.weights ? columns.rows : 0);
    memory_ = Memory((sums + local * size_t(targets) + local * size_t(weights)) * 8 +
                     (size_t(4 * (n_ + kRoom)) + local * size_t(columns_ + 1)) * 4);
    auto* weighted = memory_.as<double>();
    block_targets_ = weighted + sums;
    block_weights_ = block_targets_ + local * size_t(targets);
    keys_ = reinterpret_cast<uint32_t*>(block_weights_ + local * size_t(weights));
    spare_keys_ = keys_ + n_ + kRoom;
    other_keys_ = spare_keys_ + n_ + kRoom;
    values_ = reinterpret_cast<float*>(other_keys_ + n_ + kRoom);
    block_values_ = values_ + n_ + kRoom;
    block_of_ = reinterpret_cast<uint32_t*>(block_values_ + local * size_t(columns_));
    search_.keys(columns.rows, keys_);
    if (targets) {
      for (size_t r = 0; r < sums; r++) weighted[r] = t_.weights[r] * t_.y[r];
      whole_.targets = sums ? weighted : t_.y, whole_.weights = t_.weights;
    }
    from_ = whole_;
    classes_.resize(size_t(std::max<int64_t>(t_.most_classes, 2)));
  }

  void sum_up(double* sums) const override {
    search_.add_rows({}, {nullptr, keys_, n_, 0}, 0, n_, sums);
  }

  void enter(const GrowingNode& node, const double*, const int64_t*, int64_t) override {
    if (node.start >= block_start_ && node.end <= block_end_) return;
    block_start_ = block_end_ = 0;
    from_ = whole_;
    if (node.rows() <= block_rows_) copy(node);
  }

  Candidate look(int64_t f, const GrowingNode& node, const double* sums, double,
                 Draws& draws) override {
    looked_at_ = f;
    const RandomRows rows = rows_of(node);
    const ValueRange range = kernels_.gather(rows, from_.values + f * from_.stride, values_);
    Candidate c{};
    c.constant = range.missing == rows.n ||
                 (!range.missing && !(range.most > range.least + kFeatureThreshold));
    if (c.constant) return c;
    c.proxy = -std::numeric_limits<double>::infinity(), c.missing = range.missing;
    c.threshold = draws.uniform(range.least, range.most);
    if (range.missing) c.missing_left = draws.integer(0, 2) != 0;
    if (c.threshold == range.most) c.threshold = range.least;
    const int64_t left = t_.absolute() ? swap(node, c) : sum_left(rows, c);
    if (left < s_.min_samples_leaf || rows.n - left < s_.min_samples_leaf) return c;
    if (t_.absolute()) {
      c.left = left;
      judge_absolute(rows, limits(f, node), sums, c);
      if (!c.left) return c;
    } else {
      if (!search_.allowed(sums, limits(f, node), work_)) return c;
      c.proxy = proxy_of(t_, work_.left.data(), work_.right.data());
    }
    c.told_missing_left = range.missing ? c.missing_left : left > rows.n - left;
    c.left = left;
    return c;
  }

  // Divides the node's rows on the way.
  void sides(const GrowingNode& node, const double*, const ChosenSplit& split, double* left,
             double* right) override {
    const RandomRows rows = rows_of(node);
    judged_ = keys_ + node.start;
    int64_t gone = split.of.left;
    if (!t_.absolute() || looked_at_ != split.feature) {
      kernels_.gather(rows, from_.values + split.feature * from_.stride, values_);
      if (t_.absolute()) {
        gone = swap(node, split.of);
      } else {
        gone = kernels_.part(rows, cut_of(split.of), judged_, spare_keys_);
        std::copy(spare_keys_, spare_keys_ + (rows.n - gone), judged_ + gone);
      }
    }
    add(judged_, 0, gone, left);
    add(judged_, gone, rows.n, right);
  }

  int64_t row(int64_t i) const override { return row_of(judged_[i]); }

  void divide(const GrowingNode&, const ChosenSplit&, const int64_t*, int64_t) override {}

 private:
  static constexpr int64_t kRoom = 16;  // behind what the kernels write
  // A block of a node's values stays in the second cache, and is read on about so many levels
  // below.
  static constexpr int64_t kBlockValues = 1 << 16, kMostBlockRows = 4096, kLevels = 8;

  // What is read by the row in a key: the rows of X, or those of the block.
  struct Source {
    const float* values;
    int64_t stride;
    const double *targets, *weights;
  };

  // Copies what belongs to the node and all below it, so that it lies together; keys then hold the
  // row of the block.
  void copy(const GrowingNode& node) {
    const int shift = search_.shift();
    const int64_t n = node.rows();
    for (int64_t i = 0; i < n; i++) block_of_[i] = keys_[node.start + i] >> shift;
    for (int64_t f = 0; f < columns_; f++) {
      const float* from = all_.values + f * all_.rows;
      float* to = block_values_ + f * n;
      for (int64_t i = 0; i < n; i++) to[i] = from[block_of_[i]];
    }
    const uint32_t low = (1u << shift) - 1;
    for (int64_t i = 0; i < n; i++)
      keys_[node.start + i] = uint32_t(i) << shift | (keys_[node.start + i] & low);
    from_ = {block_values_, n, nullptr, nullptr};
    if (sums_ == Sums::of_targets) {
      for (int64_t i = 0; i < n; i++) block_targets_[i] = whole_.targets[block_of_[i]];
      from_.targets = block_targets_;
      if (whole_.weights) {
        for (int64_t i = 0; i < n; i++) block_weights_[i] = whole_.weights[block_of_[i]];
        from_.weights = block_weights_;
      }
    }
    block_start_ = node.start, block_end_ = node.end;
  }

  RandomRows rows_of(const GrowingNode& node) const {
    return {keys_ + node.start, node.rows(), search_.shift()};
  }
  uint32_t row_of(uint32_t key) const {
    const uint32_t row = key >> search_.shift();
    return block_end_ ? block_of_[row] : row;
  }

  // A float32 is <= the threshold where it is <= the largest float32 that is.
  RandomCut cut_of(const Candidate& c) const {
    auto cut = float(c.threshold);
    if (double(cut) > c.threshold)
      cut = std::nextafter(cut, -std::numeric_limits<float>::infinity());
    return {values_, cut, c.missing_left};
  }

  // Of the rows whose values were gathered, how many go left; their sums are then in work_.left.
  int64_t sum_left(const RandomRows& rows, const Candidate& c) {
    std::vector<double>& sums = work_.left;
    const RandomCut cut = cut_of(c);
    if (sums_ == Sums::of_targets) {
      const LeftSums found = kernels_.sum_left(rows, cut, from_.targets, from_.weights);
      sums[0] = found.weight, sums[2] = found.sum;
      return found.rows;
    }
    std::fill(sums.begin(), sums.end(), 0.0);
    if (sums_ == Sums::of_classes) {
      std::fill(classes_.begin(), classes_.end(), 0);
      const int64_t left = kernels_.count_left(
          rows, cut, {search_.class_bits(), search_.weight_bits()}, classes_.data());
      int64_t weight = 0;
      for (int64_t i = 0; i < t_.most_classes; i++)
        weight += classes_[size_t(i)], sums[size_t(2 + i)] = double(classes_[size_t(i)]);
      sums[0] = double(weight);
      return left;
    }
    const int64_t left = kernels_.part(rows, cut, spare_keys_, other_keys_);
    add(spare_keys_, 0, left, sums.data());
    return left;
  }

  // Of absolute errors, whose roundings depend on the order of the rows: as scikit-learn puts them.
  int64_t swap(const GrowingNode& node, const Candidate& c) {
    const RandomCut cut = cut_of(c);
    uint32_t* keys = keys_ + node.start;
    int64_t left = 0, right = node.rows();
    while (left < right) {
      const float x = values_[left];
      if (x <= cut.cut || (cut.missing_left && x != x)) {
        left++;
      } else {
        right--;
        std::swap(values_[left], values_[right]);
        std::swap(keys[left], keys[right]);
      }
    }
    return left;
  }

  // The proxy of a candidate whose rows were put in order, or left = 0 where it is not allowed.
  void judge_absolute(const RandomRows& rows, const NodeLimits& limits, const double* sums,
                      Candidate& c) {
    uint32_t* order = work_.absolute.rows;
    for (int64_t i = 0; i < rows.n; i++) order[i] = row_of(rows.keys[i]);
    const AbsoluteErrors::Side left = search_.absolute()->side(order, c.left, 1, work_.absolute);
    const AbsoluteErrors::Side right =
        search_.absolute()->side(order + rows.n - 1, rows.n - c.left, -1, work_.absolute);
    const double other = sums[0] - left.weight;
    if (left.weight < limits.min_weight_leaf || other < limits.min_weight_leaf ||
        (limits.monotonic && !limits.in_order(left.median, right.median))) {
      c.left = 0;
      return;
    }
    const auto outputs = double(t_.outputs);
    c.proxy = -other * (right.error / (other * outputs)) -
              left.weight * (left.error / (left.weight * outputs));
  }

  void add(const uint32_t* keys, int64_t begin, int64_t end, double* sums) const {
    if (sums_ == Sums::of_classes)
      search_.add_rows({}, {nullptr, keys, end, 0}, begin, end, sums);
    else
      for (int64_t i = begin; i < end; i++) t_.add(sums, row_of(keys[i]));
  }

  const ValueColumns& all_;
  const RandomKernels& kernels_;
  // Of classes and weights in keys, of one output's targets, or of whatever the target is.
  enum class Sums { of_classes, of_targets, of_rows } sums_;
  Source whole_, from_{};
  Memory memory_;
  uint32_t *keys_ = nullptr, *spare_keys_ = nullptr, *other_keys_ = nullptr, *judged_ = nullptr;
  float* values_ = nullptr;  // of the node in a column
  // The block: a node whose values lie together. Its keys' rows are numbers of block_of_.
  int64_t block_rows_ = 0, block_start_ = 0, block_end_ = 0;
  float* block_values_ = nullptr;
  double *block_targets_ = nullptr, *block_weights_ = nullptr;
  uint32_t* block_of_ = nullptr;
  std::vector<int64_t> classes_;
  int64_t looked_at_ = 0;  // the last feature
  SplitSearch::Work work_;
};

}  // namespace

ValueColumns::ValueColumns(const FloatMatrix& x, int threads)
    : rows(x.rows), columns(x.columns), memory(size_t(x.rows * x.columns) * 4) {
  auto* to = memory.as<float>();
  values = to;
  // A cache line of a row's values serves all the columns it holds while a block of rows is read.
  constexpr int64_t kBlock = 64;
  parallel(threads_worth(double(rows) * double(columns), 500, threads), [&](int thread, int came) {
    const Range mine = share_of(rows, kBlock, thread, came);
    for (int64_t begin = mine.begin; begin < mine.end; begin += kBlock) {
      const int64_t end = std::min(mine.end, begin + kBlock);
      for (int64_t f = 0; f < columns; f++) {
        const float* from = x.data + f * x.column_stride;
        for (int64_t r = begin; r < end; r++) to[f * rows + r] = from[r * x.row_stride];
      }
    }
  });
}

std::unique_ptr<Layout> random_layout(const ValueColumns& columns, const TreeTarget& target,
                                      const ExactSettings& settings) {
  return std::make_unique<RandomLayout>(columns, target, settings);
}

}  // namespace fastnn
