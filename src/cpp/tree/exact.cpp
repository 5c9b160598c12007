#include "tree/exact.hpp"

#include <algorithm>

#include "tree/growth.hpp"
#include "tree/layout.hpp"

namespace fastnn {

ExactTree grow_exact(const Presort& sorted, const TreeTarget& target,
                     const ExactSettings& settings) {
  // Columns kept in order cost the same for every node, whichever features it looks at.
  bool by_rows = settings.max_features * 2 <= sorted.columns;
  // Few values are counted, in any order of the rows.
  if (target.criterion == TreeCriterion::gini && target.outputs == 1 &&
      target.classes[0] <= kMostFewClasses && sorted.rows <= kMostFewWeight && !settings.monotonic)
    by_rows = by_rows || sorted.few.all;
  // Absolute errors cost far more than the columns' order, and round by it.
  by_rows = by_rows && !target.absolute();
  return grow(
      by_rows ? *row_layout(sorted, target, settings) : *column_layout(sorted, target, settings),
      target, settings);
}

ExactTree grow_random(const ValueColumns& columns, const TreeTarget& target,
                      const ExactSettings& settings) {
  return grow(*random_layout(columns, target, settings), target, settings);
}

ExactTree grow_binned(const BinnedColumns& binned, const TreeTarget& target,
                      const ExactSettings& settings) {
  return grow(*bin_layout(binned, target, settings), target, settings);
}

bool fits_exact(const TreeTarget& target, int64_t rows) {
  int64_t classes = target.classification() && target.outputs == 1 ? target.classes[0] : 1;
  int shift = 0;
  while (classes <= 65536 && int64_t(1) << shift < classes) shift++;
  return rows < (int64_t(1) << (32 - std::max(shift, 1))) - 1;
}

}  // namespace fastnn
