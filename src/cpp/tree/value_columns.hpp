// Columns of float32, each in one piece, in the order of the rows: what random splits are found in.
#pragma once
#include <cstdint>

#include "common/memory.hpp"
#include "tree/presort.hpp"

namespace fastnn {

// Row r of column f is values[f * rows + r].
struct ValueColumns {
  int64_t rows, columns;
  Memory memory;
  const float* values;

  // At most 2^31 - 1 rows. Throws std::bad_alloc.
  ValueColumns(const FloatMatrix& x, int threads);
};

}  // namespace fastnn
