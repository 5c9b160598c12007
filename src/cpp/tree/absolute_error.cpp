#include "tree/absolute_error.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace fastnn {
namespace {

// Rows of a node of this share of all rows or more are put in order by a bit for each.
constexpr int64_t kDenseShare = 32;

// Whole weights of rows up to this on average: the median is followed from row to row, and moves by
// half a row's weight or less at a time.
constexpr double kLight = 8;

// Up to this, sums of whole weights fit into 32 bits.
constexpr double kMostWhole = 4294967295.0;

struct Sums {
  double weight, target;
};

// The sum below a rank in a Fenwick tree, whose entry f, from 1 on, is the sum of the lowest bit
// of f many ranks below f.
inline double sum_below(const double* tree, uint32_t rank) {
  double sum = 0;
  for (uint32_t f = 0; rank != f;) {
    f |= 0x80000000u >> __builtin_clz(rank ^ f);
    sum += tree[f];
  }
  return sum;
}

// The highest rank below which the weights are less than `weight` together, or at most that.
struct Crossing {
  int64_t rank = 0;
  Sums below{0, 0};
  bool met = false;  // some sum was equal
};
template <bool kAtMost>
Crossing cross(const Sums* tree, int64_t n, double weight) {
  Crossing c;
  int64_t bit = 1;
  while (bit <= n / 2) bit *= 2;
  for (; bit; bit /= 2) {
    if (c.rank + bit > n) continue;
    const Sums& s = tree[c.rank + bit];
    c.met = c.met || weight == s.weight;
    if (!(kAtMost ? weight >= s.weight : weight > s.weight)) continue;
    weight -= s.weight;
    c.rank += bit;
    c.below.weight += s.weight, c.below.target += s.target;
  }
  return c;
}

// Of weights that are no whole numbers: sums round, and scikit-learn's medians with them.
class WeightedTree {
 public:
  WeightedTree(double* memory, int64_t n) : tree_(reinterpret_cast<Sums*>(memory)), n_(n) {
    std::memset(tree_, 0, size_t(n + 1) * sizeof(Sums));
  }
  void add(int64_t rank, double weight, double target) {
    const double weighted = weight * target;
    for (int64_t f = rank + 1; f <= n_; f += f & -f)
      tree_[f].weight += weight, tree_[f].target += weighted;
    all_.weight += weight, all_.target += weighted;
  }
  // The error of what was added, and its median.
  double error(const double* values, double& median) const {
    const double half = 0.5 * all_.weight;
    const Crossing c = cross<true>(tree_, n_, half);
    // Where weights are negative, or as good as nothing, there may be no row above.
    const int64_t upper = std::min(c.rank, n_ - 1);
    median = values[upper];
    if (c.met) {
      const int64_t lower = cross<false>(tree_, n_, half).rank;
      if (lower < upper) median = (values[lower] + values[upper]) / 2;
    }
    return distance(all_, c.below, median);
  }
  double weight() const { return all_.weight; }
  static double distance(const Sums& all, const Sums& below, double median) {
    const double weight = all.weight - below.weight, target = all.target - below.target;
    return (target - median * weight) + (median * below.weight - below.target);
  }

 private:
  Sums* tree_;
  int64_t n_;
  Sums all_{0, 0};
};

}  // namespace

AbsoluteErrors::AbsoluteErrors(const TreeTarget& target, int64_t rows)
    : t_(target),
      rows_(rows),
      whole_(true),
      outputs_(size_t(target.outputs)),
      medians_(size_t(target.outputs)),
      places_(size_t(rows)),
      marks_(size_t(rows / 64 + 1), 0),
      own_(work()) {
  double total = 0;
  for (int64_t r = 0; r < rows; r++) {
    const double w = t_.weight(r);
    whole_ = whole_ && w >= 0 && w == std::floor(w);
    total += w;
  }
  whole_ = whole_ && total <= kMostWhole;
  for (int64_t k = 0; k < t_.outputs; k++) {
    Output& o = outputs_[size_t(k)];
    o.row_at.resize(size_t(rows));
    std::iota(o.row_at.begin(), o.row_at.end(), 0u);
    const auto y = [&](uint32_t row) { return t_.y[int64_t(row) * t_.outputs + k]; };
    std::stable_sort(o.row_at.begin(), o.row_at.end(),
                     [&](uint32_t a, uint32_t b) { return y(a) < y(b); });
    o.place_of.resize(size_t(rows));
    for (int64_t i = 0; i < rows; i++) o.place_of[o.row_at[size_t(i)]] = uint32_t(i);
    o.rank_of.resize(size_t(rows));
    o.values.resize(size_t(rows));
    if (t_.weights) o.weights.resize(size_t(rows));
  }
}

AbsoluteErrors::Work AbsoluteErrors::work() const {
  const auto n = size_t(rows_);
  Work w;
  w.memory = Memory(n * (4 * 8 + sizeof(Work::Middle)) + (n + 1) * sizeof(Sums) +
                    (n + 2) * sizeof(Work::Link) + 2 * n * 4);
  w.first = w.memory.as<double>(), w.last = w.first + n;
  w.first_median = w.last + n, w.last_median = w.first_median + n;
  w.sums = w.last_median + n;
  w.middles = reinterpret_cast<Work::Middle*>(w.sums + 2 * (n + 1));
  w.links = reinterpret_cast<Work::Link*>(w.middles + n);
  w.ranks = reinterpret_cast<uint32_t*>(w.links + n + 2);
  w.rows = w.ranks + n;
  return w;
}

void AbsoluteErrors::enter(const uint32_t* rows, int64_t n) {
  n_ = n, total_ = double(n);
  if (t_.weights) {
    total_ = 0;
    for (int64_t i = 0; i < n; i++) total_ += t_.weights[rows[i]];
  }
  for (int64_t k = 0; k < t_.outputs; k++) put_in_order(outputs_[size_t(k)], k, rows);
  for (size_t k = 0; k < medians_.size(); k++)
    medians_[k] = whole_ ? whole_median(outputs_[k])
                         : side(outputs_[k], rows + n - 1, n, -1, own_).median;
}

void AbsoluteErrors::put_in_order(Output& o, int64_t output, const uint32_t* rows) {
  int64_t rank = 0;
  const auto put = [&](uint32_t row) {
    o.rank_of[row] = uint32_t(rank);
    o.values[size_t(rank)] = t_.y[int64_t(row) * t_.outputs + output];
    if (t_.weights) o.weights[size_t(rank)] = t_.weights[row];
    rank++;
  };
  if (n_ * kDenseShare >= rows_) {
    for (int64_t i = 0; i < n_; i++) {
      const uint32_t place = o.place_of[rows[i]];
      marks_[place >> 6] |= uint64_t(1) << (place & 63);
    }
    for (size_t word = 0; word < marks_.size(); word++) {
      for (uint64_t bits = marks_[word]; bits; bits &= bits - 1)
        put(o.row_at[word * 64 + size_t(__builtin_ctzll(bits))]);
      marks_[word] = 0;
    }
    return;
  }
  for (int64_t i = 0; i < n_; i++) places_[size_t(i)] = o.place_of[rows[i]];
  std::sort(places_.begin(), places_.begin() + n_);
  for (int64_t i = 0; i < n_; i++) put(o.row_at[places_[size_t(i)]]);
}

double AbsoluteErrors::whole_median(const Output& o) const {
  const auto n = size_t(n_);
  if (o.weights.empty())
    return n % 2 ? o.values[n / 2] : (o.values[n / 2 - 1] + o.values[n / 2]) / 2;
  double weight = 0;
  size_t i = 0;
  while (2 * (weight + o.weights[i]) < total_) weight += o.weights[i++];
  return 2 * (weight + o.weights[i]) == total_ ? (o.values[i] + o.values[i + 1]) / 2 : o.values[i];
}

AbsoluteErrors::Side AbsoluteErrors::side(const Output& o, const uint32_t* first, int64_t count,
                                          int64_t step, Work& w) const {
  WeightedTree tree(w.sums, n_);
  for (int64_t i = 0; i < count; i++) {
    const uint32_t rank = o.rank_of[first[i * step]];
    tree.add(rank, o.weights.empty() ? 1.0 : o.weights[rank], o.values[rank]);
  }
  Side s{tree.weight(), 0, 0};
  s.error = tree.error(o.values.data(), s.median);
  return s;
}

AbsoluteErrors::Side AbsoluteErrors::side(const uint32_t* first, int64_t count, int64_t step,
                                          Work& w) const {
  Side all = side(outputs_[0], first, count, step, w);
  for (size_t k = 1; k < outputs_.size(); k++)
    all.error += side(outputs_[k], first, count, step, w).error;
  return all;
}

void AbsoluteErrors::find_sides(Work& w, bool medians) const {
  std::fill(w.first, w.first + n_, 0.0);
  std::fill(w.last, w.last + n_, 0.0);
  const bool light = whole_ && total_ <= kLight * double(n_);
  for (const Output& o : outputs_) {
    for (int64_t i = 0; i < n_; i++) w.ranks[i] = o.rank_of[w.rows[i]];
    const Pass passes[] = {{o, w.ranks, 1}, {o, w.ranks + n_ - 1, -1}};
    for (const Pass& pass : passes) {
      const int64_t start = pass.step > 0 ? 0 : n_ - 1;
      double* errors = (pass.step > 0 ? w.first : w.last) + start;
      double* median = medians ? (pass.step > 0 ? w.first_median : w.last_median) + start : nullptr;
      if (light)
        add_whole(pass, errors, median, w);
      else
        add_fractions(pass, errors, median, w);
    }
  }
}

void AbsoluteErrors::add_fractions(const Pass& pass, double* errors, double* medians,
                                   Work& w) const {
  const Output& o = pass.of;
  WeightedTree tree(w.sums, n_);
  for (int64_t i = 0; i < n_; i++) {
    const uint32_t rank = pass.rank(i);
    tree.add(rank, o.weights.empty() ? 1.0 : o.weights[rank], o.values[rank]);
    double median;
    errors[i * pass.step] += tree.error(o.values.data(), median);
    if (medians) medians[i * pass.step] = median;
  }
}

void AbsoluteErrors::add_whole(const Pass& pass, double* errors, double* medians, Work& w) const {
  const Output& o = pass.of;
  const bool weighted = !o.weights.empty();
  if (weighted)
    find_weighted_middles(pass, w);
  else
    find_middles(pass, w);
  const double *values = o.values.data(), *weights = o.weights.data();
  double* tree = w.sums;
  std::memset(tree, 0, size_t(n_ + 1) * 8);
  Sums all{0, 0};
  for (int64_t i = 0; i < n_; i++) {
    const uint32_t rank = pass.rank(i);
    const double weight = weighted ? weights[rank] : 1.0, target = weight * values[rank];
    for (int64_t f = int64_t(rank) + 1; f <= n_; f += f & -f) tree[f] += target;
    all.weight += weight, all.target += target;
    const Work::Middle& m = w.middles[i];
    errors[i * pass.step] += WeightedTree::distance(
        all, {double(m.below), sum_below(tree, m.rank)}, m.median);
    if (medians) medians[i * pass.step] = m.median;
  }
}

// Medians of the pass's first 1, 2, ... rows, from the last of these on: all rows are linked in
// the order of their targets, and each that is taken away moves the median by a link or not.
void AbsoluteErrors::find_middles(const Pass& pass, Work& w) const {
  const double* values = pass.of.values.data() - 1;  // links count from 1
  Work::Link* links = w.links;
  for (int64_t i = 0; i <= n_ + 1; i++) links[i] = {uint32_t(i - 1), uint32_t(i + 1)};
  auto lower = uint32_t((n_ + 1) / 2);
  for (int64_t count = n_; count > 0; count--) {
    const bool even = count % 2 == 0;
    const uint32_t upper = even ? links[lower].after : lower;
    w.middles[count - 1] = {even ? (values[lower] + values[upper]) / 2 : values[lower], upper - 1,
                            uint32_t(count / 2)};
    const uint32_t gone = pass.rank(count - 1) + 1;
    const Work::Link link = links[gone];
    links[link.before].after = link.after;
    links[link.after].before = link.before;
    if (even)
      lower = gone <= lower ? links[lower].after : lower;
    else
      lower = gone >= lower ? links[lower].before : lower;
  }
}

void AbsoluteErrors::find_weighted_middles(const Pass& pass, Work& w) const {
  const double *values = pass.of.values.data() - 1, *weights = pass.of.weights.data() - 1;
  Work::Link* links = w.links;
  for (int64_t i = 0; i <= n_ + 1; i++) links[i] = {uint32_t(i - 1), uint32_t(i + 1)};
  uint32_t lower = 1;
  auto all = int64_t(total_);
  int64_t below = 0;  // of `lower`
  const auto weight = [&](uint32_t i) { return int64_t(weights[i]); };
  for (int64_t count = n_; count > 0; count--) {
    while (2 * below >= all) lower = links[lower].before, below -= weight(lower);
    while (2 * (below + weight(lower)) < all) below += weight(lower), lower = links[lower].after;
    const bool half = 2 * (below + weight(lower)) == all;
    const uint32_t upper = half ? links[lower].after : lower;
    w.middles[count - 1] = {half ? (values[lower] + values[upper]) / 2 : values[lower], upper - 1,
                            uint32_t(half ? below + weight(lower) : below)};
    const uint32_t gone = pass.rank(count - 1) + 1;
    const Work::Link link = links[gone];
    links[link.before].after = link.after;
    links[link.after].before = link.before;
    all -= weight(gone);
    if (gone < lower) below -= weight(gone);
    if (gone == lower) {
      lower = link.after;
      if (lower > n_) lower = link.before, below -= lower ? weight(lower) : 0;
    }
  }
}

}  // namespace fastnn
