// How the bindings read their arguments, on CPUs and GPUs alike.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/dtype.hpp"

namespace fastnn {

[[noreturn]] inline void bad_argument(const std::string& op, const std::string& name,
                                      const std::string& expected) {
  throw std::invalid_argument(op + ": " + name + ": expected " + expected);
}

inline DType dtype_argument(const char* op, const char* name, int code) {
  if (code < 0 || code >= kDTypes)
    bad_argument(op, name, "a dtype code from 0 to 6, got " + std::to_string(code));
  return DType(code);
}

// Reads a tuple (torch.Size is one) of integers. Returns how many there were.
inline int read_tuple(const char* op, const char* name, pybind11::handle t, int64_t* out,
                      int most) {
  if (!PyTuple_Check(t.ptr())) bad_argument(op, name, "a tuple of integers");
  const Py_ssize_t n = PyTuple_GET_SIZE(t.ptr());
  if (n > most)
    bad_argument(op, name,
                 "at most " + std::to_string(most) + " entries, got " + std::to_string(n));
  for (Py_ssize_t i = 0; i < n; i++) {
    out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(t.ptr(), i));
    if (out[i] == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
  }
  return int(n);
}

}  // namespace fastnn
