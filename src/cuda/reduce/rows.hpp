// Tensors seen as rows: one dimension that is gone along, and all others, which number the rows.
#pragma once
#include <cstdint>

#include "common/dtype.hpp"

namespace fastnn::cuda {

constexpr int kMaxRowDims = 8, kRowOperands = 3;

// Strides in elements. Element i of row r of operand o lies i * step[o] behind the row's beginning,
// which r, as a number of mixed radix `size`, is multiplied by stride[o] for.
struct Rows {
  int64_t n = 0, count = 1;
  int operands = 0;
  void* data[kRowOperands] = {};
  int64_t step[kRowOperands] = {};
  int dims = 0;
  int64_t size[kMaxRowDims] = {}, stride[kRowOperands][kMaxRowDims] = {};
};

// Adds an operand's strides to rows along `dim` of `shape`; then merge() makes one of the
// dimensions that follow each other in all operands.
inline void add_operand(Rows& rows, const int64_t* shape, int dims, int dim, void* data,
                        const int64_t* strides) {
  const int o = rows.operands++;
  rows.data[o] = data, rows.step[o] = strides[dim], rows.n = shape[dim];
  rows.dims = 0;
  for (int d = 0; d < dims; d++)
    if (d != dim) rows.size[rows.dims] = shape[d], rows.stride[o][rows.dims++] = strides[d];
}
inline void merge(Rows& rows) {
  int kept = 0;
  for (int d = 0; d < rows.dims; d++) {
    rows.count *= rows.size[d];
    if (rows.size[d] == 1) continue;
    bool follows = kept > 0;
    for (int o = 0; o < rows.operands && follows; o++)
      follows = rows.stride[o][kept - 1] == rows.stride[o][d] * rows.size[d];
    const int to = follows ? kept - 1 : kept++;
    rows.size[to] = follows ? rows.size[to] * rows.size[d] : rows.size[d];
    for (int o = 0; o < rows.operands; o++) rows.stride[o][to] = rows.stride[o][d];
  }
  rows.dims = kept;
}

}  // namespace fastnn::cuda
