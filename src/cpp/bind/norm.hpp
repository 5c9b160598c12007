// How the arguments of the normalizations are read.
#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "bind/bind.hpp"
#include "norm/batch_norm.hpp"

namespace fastnn {

struct NormArguments {
  const char* op;
  DType type;
  int64_t shape[kMaxNormDims];
  int dims;

  NormArguments(const char* name, pybind11::handle sizes, int dtype, int least)
      : op(name), type(DType(dtype)) {
    if (dtype < 0 || dtype >= kNormFloatTypes)
      bad_argument(op, "dtype", "a floating-point type (0 to 3), got " + std::to_string(dtype));
    dims = read_tuple(op, "shape", sizes, shape, kMaxNormDims);
    if (dims < least) bad_argument(op, "shape", std::to_string(least) + " dimensions or more");
    for (int d = 0; d < dims; d++)
      if (shape[d] < 1) bad_argument(op, "shape", "sizes of 1 or more");
  }

  // (address, strides), or None where there is none.
  NormOperand operand(const char* name, pybind11::handle given, int64_t* strides,
                      bool optional = false) {
    if (optional && given.is_none()) return {};
    if (!PyTuple_Check(given.ptr()) || PyTuple_GET_SIZE(given.ptr()) != 2)
      bad_argument(op, name, "an address and strides");
    const auto pair = pybind11::reinterpret_borrow<pybind11::tuple>(given);
    if (read_tuple(op, name, pair[1], strides, kMaxNormDims) != dims)
      bad_argument(op, name, "as many strides as dimensions");
    return {address(name, pair[0]), strides};
  }

  // (address, stride, dtype), or None.
  PerChannel per_channel(const char* name, pybind11::handle given) {
    if (given.is_none()) return {};
    if (!PyTuple_Check(given.ptr()) || PyTuple_GET_SIZE(given.ptr()) != 3)
      bad_argument(op, name, "an address, a stride and a dtype");
    const auto triple = pybind11::reinterpret_borrow<pybind11::tuple>(given);
    const int code = triple[2].cast<int>();
    if (code < 0 || code >= kNormFloatTypes) bad_argument(op, name, "a floating-point type");
    return {address(name, triple[0]), DType(code), triple[1].cast<int64_t>()};
  }

  void* address(const char* name, pybind11::handle value) {
    auto* p = reinterpret_cast<void*>(value.cast<uintptr_t>());
    if (!p) bad_argument(op, name, "an address");
    return p;
  }
};

}  // namespace fastnn
