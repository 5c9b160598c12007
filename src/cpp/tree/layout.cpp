#include "tree/layout.hpp"

namespace fastnn {

Layout::Layout(const TreeTarget& target, const ExactSettings& settings, int64_t rows,
               int64_t columns)
    : t_(target),
      s_(settings),
      search_(target, rows),
      columns_(columns),
      n_(search_.rows_of_weight()),
      total_weight_(search_.total_weight()) {}

}  // namespace fastnn
