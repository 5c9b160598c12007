#include "tree/search.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

#include "common/kernels_of.hpp"

namespace fastnn {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Counts up to this have squares whose sums are exact in 53 bits.
constexpr double kMostCounted = double(1 << 26);

}  // namespace

const TreeKernels& tree_kernels() { return FASTNN_KERNELS_OF(tree); }

SplitSearch::SplitSearch(const TreeTarget& target, int64_t rows)
    : given_(target), t_(target), way_(Way::general) {
  bool whole = true;
  double largest = 1;
  rows_of_weight_ = rows, total_weight_ = double(rows);
  if (target.weights) {
    int64_t sum = 0;
    rows_of_weight_ = 0;
    for (int64_t r = 0; r < rows; r++) {
      const double w = target.weights[r];
      const bool fits = (w >= 0) & (w <= kMostCounted);
      const auto integer = int32_t(fits ? w : 0);
      largest = std::max(largest, w);
      whole = whole & fits & (w == double(integer));
      sum += integer;
      rows_of_weight_ += w != 0.0;
    }
    total_weight_ = double(sum);
    if (!whole) {
      total_weight_ = 0;
      for (int64_t r = 0; r < rows; r++) total_weight_ += target.weights[r];
    }
  }
  const double total = total_weight_;
  whole = whole && total <= kMostCounted;
  if (target.classification() && target.outputs == 1 && target.classes[0] <= 65536) {
    const int64_t classes = target.classes[0];
    while (int64_t(1) << class_bits_ < classes) class_bits_++;
    if (class_bits_ == 0) class_bits_ = 1;
    codes_.resize(size_t(rows));
    for (int64_t r = 0; r < rows; r++) codes_[size_t(r)] = uint16_t(target.y[r]);
    if (target.criterion == TreeCriterion::gini && whole) {
      way_ = Way::many_classes;
      int bits = 0;
      if (target.weights) {
        while (int64_t(1) << bits <= int64_t(largest)) bits++;
        // The largest key is no row's: it stands for those that are dropped.
        if (rows < (int64_t(1) << std::max(0, 32 - class_bits_ - bits)) - 1) {
          weight_bits_ = bits;
        } else {
          whole_weights_.resize(size_t(rows));
          for (int64_t r = 0; r < rows; r++) whole_weights_[size_t(r)] = int32_t(target.weights[r]);
        }
      }
      if (classes == 2 && total < double(1 << 24) && whole_weights_.empty())
        way_ = Way::two_classes;
    }
    shift_ = class_bits_ + weight_bits_;
    as_given();
    if (way_ == Way::two_classes && shift_ <= kMostBucketBits)
      for (uint32_t low = 0; low < 1u << shift_; low++)
        tally_.push_back(tally_of(low, weight_bits_));
    if (target.criterion == TreeCriterion::gini && whole && whole_weights_.empty() &&
        classes <= kMostFewClasses)
      lanes_ = classes <= 16 ? 16 : 64;
  } else if (target.criterion == TreeCriterion::squared_error && target.outputs == 1) {
    way_ = Way::one_target;
  }
  if (target.absolute()) absolute_ = std::make_unique<AbsoluteErrors>(target, rows);
}

int64_t SplitSearch::keys(int64_t rows, uint32_t* out) const {
  const uint16_t* codes = codes_.empty() ? nullptr : codes_.data();
  int64_t kept = 0;
  if (codes && weight_bits_) {
    for (int64_t r = 0; r < rows; r++) {
      const auto w = uint32_t(int32_t(t_.weights[r]));
      out[kept] = uint32_t(r) << shift_ | w << class_bits_ | codes[r];
      kept += w != 0;
    }
    return kept;
  }
  for (int64_t r = 0; r < rows; r++) {
    out[kept] = key(uint32_t(r));
    kept += t_.weight(r) != 0.0;
  }
  return kept;
}

void SplitSearch::renumber(const uint32_t* rows, int64_t n) {
  numbered_y_.resize(size_t(n * t_.outputs));
  for (int64_t i = 0; i < n; i++)
    for (int64_t k = 0; k < t_.outputs; k++)
      numbered_y_[size_t(i * t_.outputs + k)] = given_.y[rows[i] * t_.outputs + k];
  t_.y = numbered_y_.data();
  if (given_.weights) {
    numbered_weights_.resize(size_t(n));
    for (int64_t i = 0; i < n; i++) numbered_weights_[size_t(i)] = given_.weights[rows[i]];
    t_.weights = numbered_weights_.data();
  }
  if (whole_of_key_) {
    numbered_whole_.resize(size_t(n));
    for (int64_t i = 0; i < n; i++) numbered_whole_[size_t(i)] = whole_weights_[rows[i]];
    whole_of_key_ = numbered_whole_.data();
  }
}

void SplitSearch::as_given() {
  t_ = given_;
  whole_of_key_ = whole_weights_.empty() ? nullptr : whole_weights_.data();
}

SplitSearch::Work SplitSearch::work() const {
  Work w;
  w.left.resize(size_t(t_.sums()));
  w.right.resize(size_t(t_.sums()));
  w.counts.resize(size_t(2 * t_.most_classes + 2));
  const size_t cells = size_t(lanes_ * (1 + kFewTables * kMostFewValues));
  w.few_counts = Memory(cells * 4);
  std::memset(w.few_counts.as<int32_t>(), 0, cells * 4);
  if (absolute_) w.absolute = absolute_->work();
  return w;
}

void SplitSearch::add_rows(const Candidate& c, const SortedSlice& s, int64_t begin, int64_t end,
                           double* sums) const {
  if (way_ == Way::two_classes) {
    int64_t ones = 0, all = 0;
    const uint32_t mask = (1u << weight_bits_) - 1;
    for (int64_t i = begin; i < end; i++) {
      int64_t at = i;
      if (c.missing_left) at = i < c.missing ? s.n - c.missing + i : i - c.missing;
      const uint32_t key = s.keys[at], w = weight_bits_ ? key >> 1 & mask : 1;
      all += w, ones += key & 1 ? w : 0;
    }
    sums[0] += double(all);
    sums[3] += double(ones);
    sums[2] += double(all - ones);
    return;
  }
  if (way_ == Way::many_classes && whole_weights_.empty()) {
    const uint32_t classes = (1u << class_bits_) - 1, weights = (1u << weight_bits_) - 1;
    for (int64_t i = begin; i < end; i++) {
      int64_t at = i;
      if (c.missing_left) at = i < c.missing ? s.n - c.missing + i : i - c.missing;
      const uint32_t key = s.keys[at];
      const double w = weight_bits_ ? double(key >> class_bits_ & weights) : 1.0;
      sums[2 + (key & classes)] += w;
      sums[0] += w;
    }
    return;
  }
  for (int64_t i = begin; i < end; i++) t_.add(sums, c.row(s, i, shift_));
}

// A split before value j is found: better ones replace what was found before.
void SplitSearch::consider(const SortedSlice& s, int64_t j, double proxy, bool missing_left,
                           Candidate& best) const {
  if (!(proxy > best.proxy)) return;
  const int64_t present = s.n - s.missing;
  best.proxy = proxy;
  best.left = j + (missing_left ? s.missing : 0);
  best.missing_left = missing_left;
  best.told_missing_left = s.missing ? missing_left : best.left > s.n - best.left;
  // NaN <= infinity is false: all but NaN go left.
  best.threshold =
      j == present ? kInfinity : double(s.values[j - 1]) / 2.0 + double(s.values[j]) / 2.0;
}

// Of the sums in `w`, after `right` was computed from `sums` and `left`.
bool SplitSearch::allowed(const double* sums, const NodeLimits& limits, Work& w) const {
  for (size_t i = 0; i < w.left.size(); i++) w.right[i] = sums[i] - w.left[i];
  if (limits.monotonic && !limits.in_order(w.left[2] / w.left[0], w.right[2] / w.right[0]))
    return false;
  return !(w.left[0] < limits.min_weight_leaf || w.right[0] < limits.min_weight_leaf);
}

void SplitSearch::best_general(const SortedSlice& s, const double* sums, const NodeLimits& limits,
                               Work& w, bool missing_left, Candidate& best) const {
  const int64_t present = s.n - s.missing, first = missing_left ? s.missing : 0;
  // The last candidate puts NaN alone on the right.
  const int64_t last = !missing_left && s.missing ? present : present - 1;
  Candidate order{};
  order.missing = s.missing, order.missing_left = missing_left;
  std::fill(w.left.begin(), w.left.end(), 0.0);
  int64_t at = 0;
  for (int64_t j = 1; j <= last; j++) {
    if (j < present && !apart(s.values[j - 1], s.values[j])) continue;
    const int64_t left = first + j, right = s.n - left;
    if (left < limits.min_samples_leaf || right < limits.min_samples_leaf) continue;
    // As scikit-learn sums: from the nearer end.
    if (left - at <= right) {
      for (; at < left; at++) t_.add(w.left.data(), order.row(s, at, shift_));
    } else {
      std::copy(sums, sums + t_.sums(), w.left.begin());
      for (int64_t i = s.n - 1; i >= left; i--) t_.subtract(w.left.data(), order.row(s, i, shift_));
      at = left;
    }
    if (!allowed(sums, limits, w)) continue;
    consider(s, j, proxy_of(t_, w.left.data(), w.right.data()), missing_left, best);
  }
}

void SplitSearch::best_fast(const SortedSlice& s, const double* sums, const NodeLimits& limits,
                            Work& w, bool missing_left, Candidate& best) const {
  const TreeKernels& kernels = tree_kernels();
  const int64_t present = s.n - s.missing, first = missing_left ? s.missing : 0;
  std::fill(w.left.begin(), w.left.end(), 0.0);
  if (missing_left) add_rows({}, s, present, s.n, w.left.data());
  SplitRange range{
      s.values, s.keys, present, first, limits.min_samples_leaf, s.n - limits.min_samples_leaf};
  BestCandidate found;
  if (way_ == Way::two_classes) {
    found = kernels.two_classes({range, weight_bits_, int64_t(sums[0]), int64_t(sums[3]),
                                 int64_t(w.left[0]), int64_t(w.left[3]), limits.min_weight_leaf});
  } else if (way_ == Way::many_classes) {
    ManyClasses m{range,
                  class_bits_,
                  weight_bits_,
                  int(t_.most_classes),
                  whole_of_key_,
                  int64_t(sums[0]),
                  int64_t(w.left[0]),
                  w.counts.data(),
                  w.counts.data() + t_.most_classes,
                  0,
                  0,
                  limits.min_weight_leaf};
    for (int64_t c = 0; c < t_.most_classes; c++) {
      m.left[c] = int64_t(w.left[size_t(2 + c)]);
      m.right[c] = int64_t(sums[2 + c]) - m.left[c];
      m.square_left += m.left[c] * m.left[c], m.square_right += m.right[c] * m.right[c];
    }
    found = kernels.many_classes(m);
  } else {
    found = kernels.one_target({range, shift_, t_.y, t_.weights, sums[0], sums[2], w.left[0],
                                w.left[2], limits.min_weight_leaf});
  }
  if (found.j) consider(s, found.j, found.proxy, missing_left, best);
  if (!missing_left && s.missing && present >= limits.min_samples_leaf &&
      s.missing >= limits.min_samples_leaf) {
    std::fill(w.left.begin(), w.left.end(), 0.0);
    add_rows({}, s, 0, present, w.left.data());
    if (allowed(sums, limits, w))
      consider(s, present, proxy_of(t_, w.left.data(), w.right.data()), false, best);
  }
}

Candidate SplitSearch::best(const SortedSlice& s, const double* sums, const NodeLimits& limits,
                            Work& w) const {
  Candidate best{};
  best.proxy = -kInfinity;
  best.missing = s.missing;
  const int64_t present = s.n - s.missing;
  best.constant = present == 0 || (!s.missing && !apart(s.values[0], s.values[present - 1]));
  if (best.constant) return best;
  const bool general = way_ == Way::general || limits.monotonic;
  for (int pass = 0; pass < (s.missing ? 2 : 1); pass++) {
    if (absolute_)
      best_absolute(s, sums, limits, w, pass == 1, best);
    else if (general)
      best_general(s, sums, limits, w, pass == 1, best);
    else
      best_fast(s, sums, limits, w, pass == 1, best);
  }
  return best;
}

Candidate SplitSearch::few(const uint8_t* codes, const float* values, const uint32_t* keys,
                           int64_t n, const double* sums, const NodeLimits& limits, Work& w) const {
  auto* counts = w.few_counts.as<int32_t>();
  for (int64_t c = 0; c < t_.most_classes; c++) counts[c] = int32_t(sums[2 + c]);
  const FewBest found = tree_kernels().few_values(
      {codes, keys, n, shift_, class_bits_, weight_bits_, lanes_, counts, int64_t(sums[0]),
       limits.min_samples_leaf, n - limits.min_samples_leaf, limits.min_weight_leaf,
       counts + lanes_});
  Candidate c{};
  c.proxy = found.proxy, c.left = found.left, c.constant = found.constant, c.last = found.code;
  c.told_missing_left = found.left > n - found.left;
  c.threshold = double(values[found.code]) / 2.0 + double(values[found.next]) / 2.0;
  return c;
}

bool SplitSearch::in_buckets(const NodeSort& s, const double* sums, const NodeLimits& limits,
                             Candidate& out) const {
  const BucketBest found = tree_kernels().best_in_buckets(
      {s.ranks, s.values, s.keys, tally_.data(), s.n, shift_, weight_bits_, int64_t(sums[0]),
       int64_t(sums[3]), limits.min_samples_leaf, s.n - limits.min_samples_leaf,
       limits.min_weight_leaf, limits.enough, s.spare_ranks, s.sorted_keys, s.records,
       s.sorted_values});
  if (!found.found_out) return false;
  out = {};
  out.proxy = found.proxy, out.left = found.left, out.constant = found.constant;
  out.last = found.last;
  out.told_missing_left = found.left > s.n - found.left;
  out.threshold = double(found.below) / 2.0 + double(found.above) / 2.0;
  return true;
}

}  // namespace fastnn
