#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/parallel.hpp"
#include "tree/layout.hpp"

namespace fastnn {
namespace {

class ColumnLayout final : public Layout {
 public:
  ColumnLayout(const Presort& sorted, const TreeTarget& target, const ExactSettings& settings)
      : Layout(target, settings, sorted.rows, sorted.columns),
        sorted_(sorted),
        candidates_(size_t(sorted.columns)) {
    for (int i = 0; i < s_.threads; i++) work_.push_back(search_.work());
    load();
  }

  void sum_up(double* sums) const override {
    for (int64_t r = 0; r < sorted_.rows; r++)
      if (t_.weight(r) != 0.0) t_.add(sums, r);
  }

  void enter(const GrowingNode& node, const double* sums, const int64_t* features,
             int64_t count) override {
    const double picoseconds = t_.absolute() ? 50000 * double(t_.outputs) : kMoved;
    const int threads = count ? threads_for(node.rows(), picoseconds) : 1;
    entered_ = threads > 1;
    if (!entered_) return;
    std::atomic<int64_t> next{0};
    parallel(threads, [&](int thread, int) {
      for (int64_t i; (i = next.fetch_add(1)) < count;) {
        const int64_t f = features[i];
        candidates_[size_t(f)] =
            search_.best(slice(f, node), sums, limits(f, node), work_[size_t(thread)]);
      }
    });
  }

  Candidate look(int64_t f, const GrowingNode& node, const double* sums, double enough,
                 Draws&) override {
    const Candidate c = entered_
                            ? candidates_[size_t(f)]
                            : search_.best(slice(f, node), sums, limits(f, node, enough), work_[0]);
    if (!c.constant) looked_at_ = f;
    return c;
  }

  void sides(const GrowingNode& node, const double*, const ChosenSplit& split, double* left,
             double* right) override {
    judged_ = slice(split.feature, node);
    of_judged_ = split.of;
    if (t_.absolute()) {
      put_in_order(node);
      for (int64_t i = 0; i < judged_.n; i++) t_.add(i < split.of.left ? left : right, order_[i]);
      return;
    }
    search_.add_rows(split.of, judged_, 0, split.of.left, left);
    search_.add_rows(split.of, judged_, split.of.left, judged_.n, right);
  }

  int64_t row(int64_t i) const override {
    return t_.absolute() ? order_[i] : of_judged_.row(judged_, i, search_.shift());
  }

  // Moves every column's part of the node. Constant features need no order any more.
  void divide(const GrowingNode& node, const ChosenSplit& split, const int64_t* features,
              int64_t count) override {
    const int64_t start = node.start, feature = split.feature;
    const Candidate& c = split.of;
    const SortedSlice s = slice(feature, node);
    const int shift = search_.shift();
    const bool mark_left = c.left <= s.n - c.left;
    const int64_t begin = mark_left ? 0 : c.left, stop = mark_left ? c.left : s.n;
    mark(s, c, begin, stop);
    const TreeKernels& kernels = tree_kernels();
    auto move = [&](int64_t f, int thread) {
      if (f == feature && !c.missing_left) return;
      kernels.partition(values_ + f * n_ + start, keys_ + f * n_ + start, node.rows(), shift,
                        side_.data(), mark_left ? 0 : 1, spare_values_ + thread * n_,
                        spare_keys_ + thread * n_);
    };
    const int threads = threads_for(node.rows(), kMoved);
    if (threads > 1) {
      std::atomic<int64_t> next{0};
      parallel(threads, [&](int thread, int) {
        for (int64_t i; (i = next.fetch_add(1)) < count;) move(features[i], thread);
      });
    } else {
      for (int64_t i = 0; i < count; i++) move(features[i], 0);
    }
    const uint32_t* k = keys_ + feature * n_ + start;
    for (int64_t i = begin; i < stop; i++) side_[k[i] >> shift >> 5] = 0;
  }

 private:
  // Sets the bits of these rows, those that go left first.
  void mark(const SortedSlice& s, const Candidate& c, int64_t begin, int64_t stop) {
    for (int64_t i = begin; i < stop; i++) {
      const uint32_t row = c.row(s, i, search_.shift());
      side_[row >> 5] |= 1u << (row & 31);
    }
  }

  // Of absolute errors, whose roundings depend on the order of the rows: as scikit-learn leaves
  // them, which sorts them by the last feature it looks at, and swaps what is on the wrong side.
  void put_in_order(const GrowingNode& node) {
    mark(judged_, of_judged_, 0, of_judged_.left);
    const SortedSlice last = slice(looked_at_, node);
    Candidate order{};
    order.missing = last.missing, order.missing_left = true;
    for (int64_t i = 0; i < last.n; i++) order_[i] = order.row(last, i, search_.shift());
    int64_t left = 0, right = last.n;
    while (left < right) {
      if (side_[order_[left] >> 5] >> (order_[left] & 31) & 1)
        left++;
      else
        std::swap(order_[left], order_[--right]);
    }
    for (int64_t i = 0; i < left; i++) side_[order_[i] >> 5] = 0;
  }

  // Copies the columns without the rows of weight 0, with their classes in the keys.
  void load() {
    const size_t all = size_t(n_) * size_t(columns_);
    const auto ordered = size_t(t_.absolute() ? n_ : 0);
    memory_ = Memory((all + size_t(n_) * size_t(s_.threads)) * 8 + ordered * 4);
    values_ = memory_.as<float>();
    keys_ = reinterpret_cast<uint32_t*>(values_ + all);
    spare_values_ = reinterpret_cast<float*>(keys_ + all);
    spare_keys_ = reinterpret_cast<uint32_t*>(spare_values_ + n_ * s_.threads);
    order_ = spare_keys_ + n_ * s_.threads;
    side_.assign(size_t(sorted_.rows / 32 + 1), 0);
    std::vector<uint32_t> key_of(size_t(sorted_.rows));
    for (int64_t r = 0; r < sorted_.rows; r++)
      key_of[size_t(r)] = t_.weight(r) != 0.0 ? search_.key(uint32_t(r)) : kDropped;
    std::atomic<int64_t> next{0};
    parallel(threads_worth(double(sorted_.rows) * double(columns_), 2000, s_.threads),
             [&](int, int) {
               for (int64_t f; (f = next.fetch_add(1)) < columns_;) load(f, key_of.data());
             });
  }
  void load(int64_t f, const uint32_t* key_of) {
    const uint32_t* order = sorted_.order + f * sorted_.rows;
    const float* from = sorted_.values + f * sorted_.rows;
    float* v = values_ + f * n_;
    uint32_t* k = keys_ + f * n_;
    if (n_ == sorted_.rows) {
      std::memcpy(v, from, size_t(n_) * 4);
      for (int64_t i = 0; i < n_; i++) k[i] = key_of[order[i]];
      return;
    }
    int64_t kept = 0;
    for (int64_t i = 0; i < sorted_.rows && kept < n_; i++) {
      const uint32_t key = key_of[order[i]];
      v[kept] = from[i], k[kept] = key;
      kept += key != kDropped;
    }
  }

  // The node's part of a column, in order.
  SortedSlice slice(int64_t f, const GrowingNode& node) const {
    SortedSlice s{values_ + f * n_ + node.start, keys_ + f * n_ + node.start, node.rows(), 0};
    s.count_missing(sorted_.missing[size_t(f)]);
    return s;
  }

  // Threads for a loop over the features of a node.
  int threads_for(int64_t rows, double picoseconds) const {
    return std::min<int>(threads_worth(double(rows) * double(columns_), picoseconds, s_.threads),
                         int(columns_));
  }

  static constexpr double kMoved = 1500;  // picoseconds for a value
  static constexpr uint32_t kDropped = 0xffffffffu;

  const Presort& sorted_;
  Memory memory_;
  float *values_ = nullptr, *spare_values_ = nullptr;
  uint32_t *keys_ = nullptr, *spare_keys_ = nullptr;
  std::vector<uint32_t> side_;  // a bit a row; 0 but while a node is divided
  std::vector<SplitSearch::Work> work_;
  std::vector<Candidate> candidates_;
  bool entered_ = false;  // candidates_ are the node's
  SortedSlice judged_{};
  Candidate of_judged_{};
  int64_t looked_at_ = 0;      // the last feature that was not constant
  uint32_t* order_ = nullptr;  // rows of the node that was judged
};

}  // namespace

std::unique_ptr<Layout> column_layout(const Presort& sorted, const TreeTarget& target,
                                      const ExactSettings& settings) {
  return std::make_unique<ColumnLayout>(sorted, target, settings);
}

}  // namespace fastnn
