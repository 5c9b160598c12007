// Dropout for Python.
#include "dropout/dropout.hpp"

#include <pybind11/pybind11.h>

#include "bind/bind.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

void dropout_call(uintptr_t x, uintptr_t out, py::handle shape, py::handle x_strides,
                  py::handle out_strides, int dtype, uint64_t seed, double p) {
  const char* op = "dropout";
  if (dtype < 0 || dtype >= kDropoutTypes)
    bad_argument(op, "dtype", "a floating-point type (0 to 3), got " + std::to_string(dtype));
  if (!(p >= 0 && p <= 1)) bad_argument(op, "p", "0 to 1, got " + std::to_string(p));
  int64_t size[kMaxDropoutDims], xs[kMaxDropoutDims], os[kMaxDropoutDims];
  const int dims = read_tuple(op, "shape", shape, size, kMaxDropoutDims);
  bool empty = false;
  for (int d = 0; d < dims; d++) {
    if (size[d] < 0) bad_argument(op, "shape", "sizes of 0 or more");
    empty |= size[d] == 0;
  }
  if (read_tuple(op, "x_strides", x_strides, xs, kMaxDropoutDims) != dims ||
      read_tuple(op, "out_strides", out_strides, os, kMaxDropoutDims) != dims)
    bad_argument(op, "x_strides, out_strides", "as many strides as dimensions");
  if ((!x || !out) && !empty) bad_argument(op, "x, out", "addresses");
  const Dropout call{
      DType(dtype), dims, size, reinterpret_cast<const void*>(x), xs, reinterpret_cast<void*>(out),
      os,           seed, p};
  py::gil_scoped_release release;
  dropout(call);
}

}  // namespace

void bind_dropout(py::module_& m) {
  m.def("dropout", &dropout_call,
        "out = x / (1 - p) where the word of the element's index is kept, else 0 x; out may be x.",
        py::arg("x"), py::arg("out"), py::arg("shape"), py::arg("x_strides"),
        py::arg("out_strides"), py::arg("dtype"), py::arg("seed"), py::arg("p"));
  m.def(
      "dropout_words",
      [](uint64_t seed, uint64_t first, int64_t n, uintptr_t words) {
        if (n < 0) bad_argument("dropout_words", "n", "0 or more");
        if (!words && n) bad_argument("dropout_words", "words", "an address");
        py::gil_scoped_release release;
        dropout_words(seed, first, n, reinterpret_cast<uint32_t*>(words));
      },
      "words[i] = the 32 bits of element first + i: word e % 4 of counter e / 4.", py::arg("seed"),
      py::arg("first"), py::arg("n"), py::arg("words"));
}
