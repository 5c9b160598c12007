// The best split by absolute error.
#include <algorithm>

#include "tree/search.hpp"

namespace fastnn {
namespace {

// So many candidates are judged one by one, more of them all together.
constexpr int kFewCandidates = 4;

}  // namespace

void SplitSearch::best_absolute(const SortedSlice& s, const double* sums, const NodeLimits& limits,
                                Work& w, bool missing_left, Candidate& best) const {
  const int64_t present = s.n - s.missing, first = missing_left ? s.missing : 0;
  const int64_t last = !missing_left && s.missing ? present : present - 1;
  const AbsoluteErrors::Work& errors = w.absolute;
  Candidate order{};
  order.missing = s.missing, order.missing_left = missing_left;
  for (int64_t i = 0; i < s.n; i++) errors.rows[i] = order.row(s, i, shift_);
  const auto outputs = double(t_.outputs);
  const auto proxy = [&](double weight, double left, double right) {
    const double other = sums[0] - weight;
    return -other * (right / (other * outputs)) - weight * (left / (weight * outputs));
  };
  // Of candidates that are allowed.
  const auto for_candidates = [&](const auto& call) {
    double weight = 0;
    int64_t at = 0;
    for (int64_t j = 1; j <= last; j++) {
      if (j < present && !apart(s.values[j - 1], s.values[j])) continue;
      const int64_t left = first + j, right = s.n - left;
      if (left < limits.min_samples_leaf || right < limits.min_samples_leaf) continue;
      for (; at < left; at++) weight += t_.weight(errors.rows[at]);
      if (weight < limits.min_weight_leaf || sums[0] - weight < limits.min_weight_leaf) continue;
      call(j, left, weight);
    }
  };

  if (!limits.monotonic && absolute_->estimate_sides(w.absolute)) {
    // Few candidates are near enough to the best to matter.
    struct {
      int64_t j, left;
      double weight;
    } near[kFewCandidates];
    double highest = std::max(best.proxy, limits.enough) + absolute_->margin();
    for_candidates([&](int64_t, int64_t left, double) {
      highest = std::max(highest, -(errors.first[left - 1] + errors.last[left]) / outputs);
    });
    const double least = highest - 2 * absolute_->margin();
    int count = 0;
    for_candidates([&](int64_t j, int64_t left, double weight) {
      if (!(-(errors.first[left - 1] + errors.last[left]) / outputs >= least)) return;
      if (count < kFewCandidates) near[count] = {j, left, weight};
      count++;
    });
    if (count <= kFewCandidates) {
      for (int i = 0; i < count; i++) {
        const int64_t left = near[i].left;
        const double l = absolute_->side(errors.rows, left, 1, w.absolute).error;
        const double r = absolute_->side(errors.rows + s.n - 1, s.n - left, -1, w.absolute).error;
        consider(s, near[i].j, proxy(near[i].weight, l, r), missing_left, best);
      }
      return;
    }
  }
  absolute_->find_sides(w.absolute, limits.monotonic != 0);
  for_candidates([&](int64_t j, int64_t left, double weight) {
    if (limits.monotonic &&
        !limits.in_order(errors.first_median[left - 1], errors.last_median[left]))
      return;
    consider(s, j, proxy(weight, errors.first[left - 1], errors.last[left]), missing_left, best);
  });
}

}  // namespace fastnn
