// The best split of every column on its own: best_split of the Python face.
#include <atomic>
#include <limits>

#include "common/parallel.hpp"
#include "tree/exact.hpp"
#include "tree/search.hpp"

namespace fastnn {

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
  std::vector<uint32_t> entered(rows.begin(), rows.end());
  const bool absolute = target.absolute() && !rows.empty();
  if (absolute) search.absolute()->enter(entered.data(), int64_t(entered.size()));
  auto impurity = [&](const double* of, int64_t count, auto row_at, SplitSearch::Work& w) {
    if (absolute) {
      for (int64_t i = 0; i < count; i++) w.absolute.rows[i] = uint32_t(row_at(i));
      return search.absolute()->side(w.absolute.rows, count, 1, w.absolute).error / of[0];
    }
    return target.criterion == TreeCriterion::poisson ? poisson_loss(target, of, count, row_at)
                                                      : impurity_of(target, of);
  };
  const auto n = int64_t(rows.size());
  std::vector<ColumnSplit> out(size_t(sorted.columns));
  threads = std::min<int>(threads_worth(double(n) * double(sorted.columns), 3000, threads),
                          int(sorted.columns));
  const Memory memory(size_t(n) * 8 * size_t(threads));
  std::vector<SplitSearch::Work> work;
  std::vector<std::vector<double>> right(size_t(threads), std::vector<double>(sums.size()));
  for (int i = 0; i < threads; i++) work.push_back(search.work());
  const auto row_at = [&](int64_t i) { return rows[size_t(i)]; };
  const double whole = n ? impurity(sums.data(), n, row_at, work[0]) : 0;
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
      const double left = impurity(
          w.left.data(), c.left, [&](int64_t i) { return int64_t(c.row(s, i, search.shift())); },
          w);
      const double other = impurity(
          rest.data(), s.n - c.left,
          [&](int64_t i) { return int64_t(c.row(s, c.left + i, search.shift())); }, w);
      o.impurity = rest[0] / sums[0] * other + w.left[0] / sums[0] * left;
      o.improvement = whole - o.impurity;
    }
  });
  return {whole, std::move(out)};
}

}  // namespace fastnn
