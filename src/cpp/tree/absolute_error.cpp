#include "tree/absolute_error.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

namespace fastnn {
namespace {

// Rows of a node of this share of all rows or more are put in order by a bit for each.
constexpr int64_t kDenseShare = 32;

// Of the median for each row that is taken away: among weights that differ much it may move often.
constexpr int64_t kMostMoves = 16;

// Up to this, sums of whole weights are exact.
constexpr double kMostWhole = 9007199254740992.0;

// Sums of larger targets might overflow.
constexpr double kMostMagnitude = 1e300;

struct Sums {
  double weight, target;
};

// Of rows from a median, where `below` are those below it.
double distance(const Sums& all, const Sums& below, double median) {
  const double weight = all.weight - below.weight, target = all.target - below.target;
  return (target - median * weight) + (median * below.weight - below.target);
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

// Entry f, from 1 on, holds the sums of as many ranks below f as its lowest bit says.
class FenwickTree {
 public:
  FenwickTree(double* memory, int64_t n) : tree_(reinterpret_cast<Sums*>(memory)), n_(n) {
    std::memset(memory, 0, size_t(n + 1) * sizeof(Sums));
  }
  template <class Output>
  void add(const Output& o, uint32_t rank) {
    const double weight = o.weights.empty() ? 1.0 : o.weights[rank],
                 target = weight * o.values[rank];
    for (int64_t f = int64_t(rank) + 1; f <= n_; f += f & -f)
      tree_[f].weight += weight, tree_[f].target += target;
    all_.weight += weight, all_.target += target;
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

 private:
  Sums* tree_;
  int64_t n_;
  Sums all_{0, 0};
};

}  // namespace

AbsoluteErrors::AbsoluteErrors(const TreeTarget& target, int64_t rows)
    : t_(target),
      rows_(rows),
      outputs_(size_t(target.outputs)),
      medians_(size_t(target.outputs)),
      places_(size_t(rows)),
      marks_(size_t(rows / 64 + 1), 0),
      own_(work()) {
  double total = 0;
  for (int64_t r = 0; r < rows; r++) {
    const double w = t_.weight(r);
    whole_ = whole_ && w >= 0 && w == std::floor(w);
    negative_ = negative_ || w < 0;
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
  w.memory = Memory(n * 4 * 8 + (n + 1) * sizeof(Sums) + (n + 2) * sizeof(Work::Link) + 2 * n * 4);
  w.first = w.memory.as<double>(), w.last = w.first + n;
  w.first_median = w.last + n, w.last_median = w.first_median + n;
  w.sums = w.last_median + n;
  w.links = reinterpret_cast<Work::Link*>(w.sums + 2 * (n + 1));
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
  magnitude_ = 0;
  for (const Output& o : outputs_) magnitude_ += magnitude(o);
  // Sums of either kind take up to some 20 additions for each row, and each of these is off by half
  // an epsilon of the magnitude at most.
  margin_ = 64 * double(n + 64) * std::numeric_limits<double>::epsilon() * magnitude_;
  for (size_t k = 0; k < medians_.size(); k++)
    medians_[k] =
        whole_ ? whole_median(outputs_[k]) : side(outputs_[k], rows + n - 1, n, -1, own_).median;
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

// What no sum over the node's rows goes beyond, and none of weights times a target either.
double AbsoluteErrors::magnitude(const Output& o) const {
  const auto n = size_t(n_);
  if (!whole_) return total_ * std::max(std::fabs(o.values[0]), std::fabs(o.values[n - 1]));
  double sum = 0;
  for (size_t i = 0; i < n; i++)
    sum += std::fabs(o.values[i]) * (o.weights.empty() ? 1.0 : o.weights[i]);
  return sum;
}

AbsoluteErrors::Side AbsoluteErrors::side(const Output& o, const uint32_t* first, int64_t count,
                                          int64_t step, Work& w) const {
  FenwickTree tree(w.sums, n_);
  for (int64_t i = 0; i < count; i++) tree.add(o, o.rank_of[first[i * step]]);
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

// From the first row to the last and back, for each output.
template <class Call>
bool AbsoluteErrors::for_passes(Work& w, const Call& call) const {
  std::fill(w.first, w.first + n_, 0.0);
  std::fill(w.last, w.last + n_, 0.0);
  for (const Output& o : outputs_) {
    for (int64_t i = 0; i < n_; i++) w.ranks[i] = o.rank_of[w.rows[i]];
    const int64_t end = n_ - 1;
    if (!call(Pass{o, w.ranks, 1}, w.first, w.first_median)) return false;
    if (!call(Pass{o, w.ranks + end, -1}, w.last + end, w.last_median + end)) return false;
  }
  return true;
}

AbsoluteErrors::Work::Link* AbsoluteErrors::link_all(Work& w) const {
  for (int64_t i = 0; i <= n_ + 1; i++) w.links[i] = {uint32_t(i - 1), uint32_t(i + 1)};
  return w.links;
}

// The row's own link stays what it was.
uint32_t AbsoluteErrors::take(Work::Link* links, uint32_t rank) {
  const Work::Link link = links[rank + 1];
  links[link.before].after = link.after;
  links[link.after].before = link.before;
  return rank + 1;
}

// All rows are linked in the order of their targets, and taken away from the last of the pass to
// the first, each of which moves the median by a link or not. Below it the targets are summed up,
// and those of all rows: the error is what is above less what is below, and less the (lower) median
// where it was counted among those above.
void AbsoluteErrors::estimate_unweighted(const Pass& pass, double* errors, Work& w) const {
  const double* values = pass.of.values.data() - 1;  // links count from 1
  Work::Link* links = link_all(w);
  auto median = uint32_t((n_ + 1) / 2);
  double below = 0, all = 0;
  for (int64_t i = 1; i < median; i++) below += values[i];
  for (int64_t i = 1; i <= n_; i++) all += values[i];
  for (int64_t count = n_; count > 0; count--) {
    const bool odd = count & 1;
    errors[(count - 1) * pass.step] += all - 2 * below - (odd ? 1 : 2) * values[median];
    const uint32_t gone = take(links, pass.rank(count - 1));
    all -= values[gone];
    if (count == 1) return;
    if (odd) {
      const uint32_t before = links[median].before;
      below -= values[gone < median ? gone : before];
      median = gone < median ? median : before;
    } else {
      const uint32_t after = links[median].after;
      below += gone <= median ? values[median] - values[gone] : 0.0;
      median = gone <= median ? after : median;
    }
  }
}

bool AbsoluteErrors::estimate_weighted(const Pass& pass, double* errors, Work& w) const {
  const double *values = pass.of.values.data() - 1, *weights = pass.of.weights.data() - 1;
  Work::Link* links = link_all(w);
  uint32_t lower = 1;
  int64_t moves = 0;
  Sums all{0, 0}, below{0, 0};
  for (int64_t i = 1; i <= n_; i++) all.weight += weights[i], all.target += weights[i] * values[i];
  for (int64_t i = n_ - 1; i >= 0; i--) {
    while (2 * below.weight > all.weight && links[lower].before) {
      lower = links[lower].before, moves++;
      below.weight -= weights[lower], below.target -= weights[lower] * values[lower];
    }
    while (2 * (below.weight + weights[lower]) < all.weight && links[lower].after <= n_) {
      below.weight += weights[lower], below.target += weights[lower] * values[lower];
      lower = links[lower].after, moves++;
    }
    if (moves > kMostMoves * n_) return false;
    errors[i * pass.step] += distance(all, below, values[lower]);
    const uint32_t gone = take(links, pass.rank(i));
    const Sums row{weights[gone], weights[gone] * values[gone]};
    all.weight -= row.weight, all.target -= row.target;
    if (gone < lower) below.weight -= row.weight, below.target -= row.target;
    if (gone == lower) {
      lower = links[gone].after;
      if (lower > n_ && links[gone].before) {
        lower = links[gone].before;
        below.weight -= weights[lower], below.target -= weights[lower] * values[lower];
      }
    }
  }
  return true;
}

bool AbsoluteErrors::estimate_sides(Work& w) const {
  if (negative_ || !(magnitude_ < kMostMagnitude)) return false;
  return for_passes(w, [&](const Pass& pass, double* errors, double*) {
    if (t_.weights) return estimate_weighted(pass, errors, w);
    estimate_unweighted(pass, errors, w);
    return true;
  });
}

void AbsoluteErrors::find_sides(Work& w, bool medians) const {
  for_passes(w, [&](const Pass& pass, double* errors, double* median_of) {
    const Output& o = pass.of;
    FenwickTree tree(w.sums, n_);
    for (int64_t i = 0; i < n_; i++) {
      tree.add(o, pass.rank(i));
      double median;
      errors[i * pass.step] += tree.error(o.values.data(), median);
      if (medians) median_of[i * pass.step] = median;
    }
    return true;
  });
}

}  // namespace fastnn
