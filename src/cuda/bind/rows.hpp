// Operands that are gone over by rows, from Python.
#pragma once
#include <vector>

#include "cuda/bind/bind.hpp"
#include "cuda/reduce/rows.hpp"

namespace fastnn {

// Each operand is (address, strides); the rows lie along dimension `dim`.
inline cuda::Rows rows_argument(const char* op, pybind11::handle shape, int dim,
                                const std::vector<pybind11::handle>& operands) {
  constexpr int most = cuda::kMaxRowDims;
  int64_t sizes[most], strides[most];
  const int dims = read_tuple(op, "shape", shape, sizes, most);
  if (dim < 0 || dim >= dims) bad_argument(op, "dim", "a dimension, got " + std::to_string(dim));
  cuda::Rows rows;
  for (const auto& operand : operands) {
    if (!PyTuple_Check(operand.ptr()) || PyTuple_GET_SIZE(operand.ptr()) != 2)
      bad_argument(op, "operand", "(address, strides)");
    const auto pair = pybind11::reinterpret_borrow<pybind11::tuple>(operand);
    if (read_tuple(op, "strides", pair[1], strides, most) != dims)
      bad_argument(op, "strides", "as many as dimensions");
    add_operand(rows, sizes, dims, dim, reinterpret_cast<void*>(pair[0].cast<uintptr_t>()),
                strides);
  }
  merge(rows);
  for (int o = 0; o < rows.operands; o++)
    if (!rows.data[o] && rows.count && rows.n) bad_argument(op, "operand", "an address");
  return rows;
}

}  // namespace fastnn
