// The elementwise kernels for Python.
#include "elementwise/elementwise.hpp"

#include <pybind11/pybind11.h>

#include "bind/bind.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

DType float_argument(const char* op, int code) {
  if (code < 0 || code >= kFloatTypes)
    bad_argument(op, "dtype", "a floating-point type (0 to 3), got " + std::to_string(code));
  return DType(code);
}

int kind_argument(const char* op, int kind) {
  if (kind < 1 || kind >= kActivations)
    bad_argument(op, "kind", "1 to 7, got " + std::to_string(kind));
  return kind;
}

struct Shape {
  int64_t size[kMaxElementwiseDims];
  int dims;
  bool empty = false;
};

Shape shape_argument(const char* op, py::handle shape) {
  Shape s;
  s.dims = read_tuple(op, "shape", shape, s.size, kMaxElementwiseDims);
  for (int d = 0; d < s.dims; d++) {
    if (s.size[d] < 0) bad_argument(op, "shape", "sizes of 0 or more");
    s.empty |= s.size[d] == 0;
  }
  return s;
}

Operand operand(const char* op, const char* name, uintptr_t ptr, py::handle strides, const Shape& s,
                int64_t* storage) {
  if (read_tuple(op, name, strides, storage, kMaxElementwiseDims) != s.dims)
    bad_argument(op, name, "as many strides as dimensions");
  if (!ptr && !s.empty) bad_argument(op, name, "an address");
  return {reinterpret_cast<void*>(ptr), storage};
}

void activation_call(int kind, uintptr_t x_ptr, uintptr_t out_ptr, py::handle shape,
                     py::handle x_strides, py::handle out_strides, int dtype) {
  const char* op = "activation";
  kind_argument(op, kind);
  const DType type = float_argument(op, dtype);
  const Shape s = shape_argument(op, shape);
  int64_t xs[kMaxElementwiseDims], os[kMaxElementwiseDims];
  const Operand x = operand(op, "x", x_ptr, x_strides, s, xs);
  const Operand out = operand(op, "out", out_ptr, out_strides, s, os);
  py::gil_scoped_release release;
  unary(kind, type, s.dims, s.size, x, out);
}

// The short way: both contiguous, or both dense in the same order.
void activation_dense_call(int kind, uintptr_t x_ptr, uintptr_t out_ptr, int64_t n, int dtype) {
  const char* op = "activation_dense";
  kind_argument(op, kind);
  const DType type = float_argument(op, dtype);
  if (n < 0) bad_argument(op, "n", "0 or more, got " + std::to_string(n));
  if ((!x_ptr || !out_ptr) && n) bad_argument(op, "x_ptr, out_ptr", "addresses");
  const int64_t one = 1;
  py::gil_scoped_release release;
  unary(kind, type, 1, &n, {reinterpret_cast<void*>(x_ptr), &one},
        {reinterpret_cast<void*>(out_ptr), &one});
}

void activation_backward_call(int kind, uintptr_t grad_ptr, uintptr_t saved_ptr, uintptr_t out_ptr,
                              py::handle shape, py::handle grad_strides, py::handle saved_strides,
                              py::handle out_strides, int dtype) {
  const char* op = "activation_backward";
  kind_argument(op, kind);
  const DType type = float_argument(op, dtype);
  const Shape s = shape_argument(op, shape);
  int64_t gs[kMaxElementwiseDims], ss[kMaxElementwiseDims], os[kMaxElementwiseDims];
  const Operand grad = operand(op, "grad", grad_ptr, grad_strides, s, gs);
  const Operand saved = operand(op, "saved", saved_ptr, saved_strides, s, ss);
  const Operand out = operand(op, "out", out_ptr, out_strides, s, os);
  py::gil_scoped_release release;
  activation_backward(kind, type, s.dims, s.size, grad, saved, out);
}

int function_argument(const char* op, const std::string& name) {
  static const char* names[kErf + 1] = {"",        "relu", "gelu",  "gelu_tanh", "silu",
                                        "sigmoid", "tanh", "relu6", "exp",       "erf"};
  for (int i = 1; i <= kErf; i++)
    if (name == names[i]) return i;
  bad_argument(op, "function",
               "relu, gelu, gelu_tanh, silu, sigmoid, tanh, relu6, exp or erf, got '" + name + "'");
}

}  // namespace

void bind_elementwise(py::module_& m) {
  m.def("activation", &activation_call,
        "(kind, x_ptr, out_ptr, shape, x_strides, out_strides, dtype): out = f(x); out may be x.",
        py::arg("kind"), py::arg("x_ptr"), py::arg("out_ptr"), py::arg("shape"),
        py::arg("x_strides"), py::arg("out_strides"), py::arg("dtype"));
  m.def("activation_dense", &activation_dense_call,
        "(kind, x_ptr, out_ptr, n, dtype): activation of n elements that lie together in both.");
  m.def("activation_backward", &activation_backward_call,
        "out = grad * f'. `saved` is the output of relu, relu6, sigmoid and tanh, and the input of "
        "the "
        "others.",
        py::arg("kind"), py::arg("grad_ptr"), py::arg("saved_ptr"), py::arg("out_ptr"),
        py::arg("shape"), py::arg("grad_strides"), py::arg("saved_strides"), py::arg("out_strides"),
        py::arg("dtype"));
  m.def(
      "math_function",
      [](const std::string& function, uintptr_t x_ptr, uintptr_t out_ptr, int64_t n, int dtype) {
        const int kind = function_argument("math_function", function);
        if (dtype < 0 || dtype > 1) bad_argument("math_function", "dtype", "float32 or float64");
        const int64_t one = 1;
        py::gil_scoped_release release;
        unary(kind, DType(dtype), 1, &n, {reinterpret_cast<void*>(x_ptr), &one},
              {reinterpret_cast<void*>(out_ptr), &one});
      },
      "out = function(x) on n contiguous float32 or float64: an activation, exp or erf.",
      py::arg("function"), py::arg("x_ptr"), py::arg("out_ptr"), py::arg("n"), py::arg("dtype"));
  m.def(
      "largest_ulp_error",
      [](const std::string& function, uint32_t first, uint64_t count, uint64_t step) {
        const int kind = function_argument("largest_ulp_error", function);
        UlpError worst;
        {
          py::gil_scoped_release release;
          worst = largest_ulp_error(kind, first, count, step);
        }
        return py::make_tuple(worst.error, worst.at);
      },
      "(error, where): the largest error of a float32 function, in units in the last place, over "
      "`count` floats from the bit pattern `first`, every `step`-th.",
      py::arg("function"), py::arg("first") = 0, py::arg("count") = uint64_t(1) << 32,
      py::arg("step") = 1);
}
