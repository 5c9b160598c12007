// Columns of float32, each sorted once: what every exact search of splits starts from.
#pragma once
#include <cstdint>
#include <mutex>
#include <vector>

#include "common/memory.hpp"
#include "tree/kernels.hpp"

namespace fastnn {

// A matrix of float32. Strides count elements.
struct FloatMatrix {
  const float* data;
  int64_t rows, columns, row_stride, column_stride;
};

// Column f's values lie at values + f * rows in ascending order, with NaN last and -0 as +0, and
// the rows they come from at order + f * rows; equal values lie in the order of their rows.
struct Presort {
  int64_t rows = 0, columns = 0;
  Memory memory;
  float* values = nullptr;
  uint32_t* order = nullptr;
  std::vector<int64_t> missing;  // NaN in each column

  // Columns of few values, each further than kFeatureThreshold from the next, and none missing.
  // codes[f][r] is the number of row r's value among values[f * kMostFewValues + ...] of column f,
  // if that has counts[f] > 0 of them.
  struct Few {
    Memory memory;
    int64_t stride = 0;
    std::vector<int> counts;
    std::vector<const uint8_t*> codes;
    std::vector<float> values;
    bool all = false;
  };
  Few few;

  // At most 2^31 - 1 rows. Throws std::bad_alloc.
  Presort(const FloatMatrix& x, int threads);

  // The other way round: row r of column f is number by_column[f * rows + r] in its order.
  // by_row[r * columns + f] holds that with its value, for nodes of few rows (null where it would
  // be too large).
  struct Entry {
    uint32_t rank;
    float value;
  };
  struct Ranks {
    Memory memory;
    const uint32_t* by_column = nullptr;
    const Entry* by_row = nullptr;
  };
  // Made when it is first asked for; any thread may ask.
  const Ranks& ranks(int threads) const;

 private:
  mutable std::once_flag ranked_;
  mutable Ranks ranks_;
};

// Threads that are worth their start for `elements` that cost `picoseconds` each.
int threads_worth(double elements, double picoseconds, int most);

}  // namespace fastnn
