// softmax for Python.
#include "softmax/softmax.hpp"

#include <pybind11/pybind11.h>

#include "bind/bind.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

struct Arguments {
  const char* op;
  SoftmaxCall call;
  int64_t shape[kMaxSoftmaxDims];

  Arguments(const char* name, py::handle sizes, int dtype, bool log, int dim) : op(name) {
    if (dtype < 0 || dtype >= kSoftmaxFloatTypes)
      bad_argument(op, "dtype", "a floating-point type (0 to 3), got " + std::to_string(dtype));
    call.type = DType(dtype), call.log = log, call.dim = dim, call.shape = shape;
    call.dims = read_tuple(op, "shape", sizes, shape, kMaxSoftmaxDims);
    for (int d = 0; d < call.dims; d++)
      if (shape[d] < 1) bad_argument(op, "shape", "sizes of 1 or more");
    if (dim < 0 || dim >= call.dims)
      bad_argument(op, "dim", "one of the shape's dimensions, got " + std::to_string(dim));
  }

  // (address, strides)
  SoftmaxOperand operand(const char* name, py::handle given, int64_t* strides) {
    if (!PyTuple_Check(given.ptr()) || PyTuple_GET_SIZE(given.ptr()) != 2)
      bad_argument(op, name, "an address and strides");
    const auto pair = py::reinterpret_borrow<py::tuple>(given);
    if (read_tuple(op, name, pair[1], strides, kMaxSoftmaxDims) != call.dims)
      bad_argument(op, name, "as many strides as dimensions");
    auto* p = reinterpret_cast<void*>(pair[0].cast<uintptr_t>());
    if (!p) bad_argument(op, name, "an address");
    return {p, strides};
  }
};

void forward(py::handle shape, int dtype, bool log, int dim, py::handle x, py::handle out) {
  Arguments a("softmax", shape, dtype, log, dim);
  int64_t strides[2][kMaxSoftmaxDims];
  const SoftmaxOperand from = a.operand("x", x, strides[0]), to = a.operand("out", out, strides[1]);
  py::gil_scoped_release release;
  softmax(a.call, from, to);
}

void backward(py::handle shape, int dtype, bool log, int dim, py::handle grad, py::handle saved,
              py::handle grad_x) {
  Arguments a("softmax_backward", shape, dtype, log, dim);
  int64_t strides[3][kMaxSoftmaxDims];
  const SoftmaxOperand g = a.operand("grad", grad, strides[0]),
                       s = a.operand("saved", saved, strides[1]),
                       to = a.operand("grad_x", grad_x, strides[2]);
  py::gil_scoped_release release;
  softmax_backward(a.call, g, s, to);
}

}  // namespace

void bind_softmax(py::module_& m) {
  m.def("softmax", &forward,
        "softmax, or its logarithm, along dim; tensors are (address, strides).", py::arg("shape"),
        py::arg("dtype"), py::arg("log"), py::arg("dim"), py::arg("x"), py::arg("out"));
  m.def("softmax_backward", &backward, "Its gradient, from its result `saved`.", py::arg("shape"),
        py::arg("dtype"), py::arg("log"), py::arg("dim"), py::arg("grad"), py::arg("saved"),
        py::arg("grad_x"));
}
