#include "tree/layout.hpp"

namespace fastnn {

Layout::Layout(const TreeTarget& target, const ExactSettings& settings, int64_t rows,
               int64_t columns)
    : t_(target), s_(settings), search_(target, rows), columns_(columns) {
  for (int64_t r = 0; r < rows; r++) {
    const double w = t_.weight(r);
    n_ += w != 0.0;
    total_weight_ += w;
  }
}

}  // namespace fastnn
