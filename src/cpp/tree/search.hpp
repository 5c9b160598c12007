// The best split of one feature in one node, from its values in ascending order.
#pragma once
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "common/memory.hpp"
#include "tree/absolute_error.hpp"
#include "tree/criteria.hpp"
#include "tree/kernels.hpp"

namespace fastnn {

const TreeKernels& tree_kernels();

inline bool apart(float low, float high) { return high > low + kFeatureThreshold; }

// A node's part of a sorted column: NaN last.
struct SortedSlice {
  const float* values;
  const uint32_t* keys;
  int64_t n, missing;

  // At most as many as the whole column has.
  void count_missing(int64_t of_column) {
    while (of_column && missing < n && values[n - 1 - missing] != values[n - 1 - missing])
      missing++, of_column--;
  }
};

// A split of a node by one feature.
struct Candidate {
  double proxy, threshold;
  int64_t left;            // rows that go left; 0: no split was found
  int64_t missing;         // NaN among the node's values
  bool constant;           // no split is possible
  bool missing_left;       // NaN goes left
  bool told_missing_left;  // what the node says of NaN, which it may never have seen
  int64_t last;            // that goes left: of bins, of few values, or of ranks in RowLayout

  // The row number i of the node, those that go left first.
  uint32_t row(const SortedSlice& s, int64_t i, int shift) const {
    if (missing_left) i = i < missing ? s.n - missing + i : i - missing;
    return s.keys[i] >> shift;
  }
};

// What a split must satisfy in the node at hand.
struct NodeLimits {
  int64_t min_samples_leaf = 1;
  double min_weight_leaf = 0;
  int monotonic = 0;  // of this feature
  double lower = 0, upper = 0;
  double enough = -std::numeric_limits<double>::infinity();  // proxies up to this need not be found

  // Whether the sides may have these values.
  bool in_order(double left, double right) const {
    return left >= lower && right >= lower && left <= upper && right <= upper &&
           (left - right) * monotonic <= 0;
  }
};

// The targets in the form that the loops want, and which of them is used.
class SplitSearch {
 public:
  explicit SplitSearch(const TreeTarget& target, int64_t rows);

  int shift() const { return shift_; }
  // From now on keys hold the numbers of rows in rows[0 .. n), not the rows.
  void renumber(const uint32_t* rows, int64_t n);
  // Keys hold rows again.
  void as_given();
  uint32_t key(uint32_t row) const {
    uint32_t low = codes_.empty() ? 0 : uint32_t(codes_[row]);
    if (weight_bits_) low |= uint32_t(t_.weights[row]) << class_bits_;
    return row << shift_ | low;
  }

  // Those of all rows whose weight is not 0; returns how many. There is room for one more.
  int64_t keys(int64_t rows, uint32_t* out) const;
  int64_t rows_of_weight() const { return rows_of_weight_; }
  double total_weight() const { return total_weight_; }

  // How a gain is found: from classes and whole weights that keys hold, one output's values, or
  // whatever the target is.
  enum class Way { two_classes, many_classes, one_target, general };
  Way way() const { return way_; }
  bool weights_in_keys() const { return whole_weights_.empty(); }
  int class_bits() const { return class_bits_; }
  int weight_bits() const { return weight_bits_; }

  // Whether the keys hold all that is read of their rows, without monotonic constraints.
  bool by_keys() const {
    return way_ == Way::two_classes || (way_ == Way::many_classes && whole_weights_.empty());
  }

  // Of that criterion, else null. What is entered there is the node that is searched.
  AbsoluteErrors* absolute() const { return absolute_.get(); }

  // Sums of one thread at a time.
  struct Work {
    std::vector<double> left, right;
    std::vector<int64_t> counts;
    Memory few_counts;  // of the classes in the node, then the tables of few values
    AbsoluteErrors::Work absolute;
  };
  Work work() const;

  // The first of the best splits. `sums` are the node's.
  Candidate best(const SortedSlice& s, const double* sums, const NodeLimits& limits, Work& w) const;
  // Whether `few` does for a node of these sums.
  bool counts_few(const double* sums, const NodeLimits& limits) const {
    return lanes_ && sums[0] <= double(kMostFewWeight) && !limits.monotonic;
  }
  // As best, of n rows in any order, by the codes of their values.
  Candidate few(const uint8_t* codes, const float* values, const uint32_t* keys, int64_t n,
                const double* sums, const NodeLimits& limits, Work& w) const;
  // Whether `in_buckets` does for a node of these sums and this many rows.
  bool counts_buckets(int64_t n, const double* sums, const NodeLimits& limits) const {
    return way_ == Way::two_classes && n >= kLeastBucketed && n <= kMostBucketed &&
           sums[0] <= double(kMostBucketed) && shift_ <= kMostBucketBits && !limits.monotonic;
  }
  // As best, of n rows in any order and a column without NaN, by buckets of their ranks. False
  // where sorting is faster, and nothing was done.
  bool in_buckets(const NodeSort& s, const double* sums, const NodeLimits& limits,
                  Candidate& out) const;
  // The split at `left` rows with NaN on a side; its proxy, or false where it is not allowed.
  bool allowed(const double* sums, const NodeLimits& limits, Work& w) const;
  // Adds the rows of candidates [begin, end) to the sums.
  void add_rows(const Candidate& c, const SortedSlice& s, int64_t begin, int64_t end,
                double* sums) const;

 private:
  void best_fast(const SortedSlice& s, const double* sums, const NodeLimits& limits, Work& w,
                 bool missing_left, Candidate& best) const;
  void best_general(const SortedSlice& s, const double* sums, const NodeLimits& limits, Work& w,
                    bool missing_left, Candidate& best) const;
  void best_absolute(const SortedSlice& s, const double* sums, const NodeLimits& limits, Work& w,
                     bool missing_left, Candidate& best) const;
  void consider(const SortedSlice& s, int64_t j, double proxy, bool missing_left,
                Candidate& best) const;

  int64_t rows_of_weight_ = 0;
  double total_weight_ = 0;
  const TreeTarget& given_;
  TreeTarget t_;  // by the numbers in the keys
  Way way_;
  int shift_ = 0, class_bits_ = 0, weight_bits_ = 0;
  std::vector<uint64_t> tally_;         // of the lowest bits of a key, for buckets
  int lanes_ = 0;                       // of a table of few values; 0: not counted
  std::vector<uint16_t> codes_;         // of each row, for one output of classes
  std::vector<int32_t> whole_weights_;  // of each row, where all are whole
  const int32_t* whole_of_key_ = nullptr;
  std::vector<double> numbered_y_, numbered_weights_;
  std::vector<int32_t> numbered_whole_;
  std::unique_ptr<AbsoluteErrors> absolute_;
};

}  // namespace fastnn
