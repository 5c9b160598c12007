// Activations, for Python.
#include "cuda/elementwise/elementwise.hpp"

#include "common/activation.hpp"
#include "cuda/bind/bind.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

void strides_argument(const char* op, const char* name, py::handle strides, int dims, int64_t* to) {
  if (read_tuple(op, name, strides, to, cuda::kMaxDims) != dims)
    bad_argument(op, name, "as many strides as dimensions");
}

cuda::Elementwise arguments(const char* op, int kind, uintptr_t x, uintptr_t y, py::handle shape,
                            py::handle x_strides, py::handle y_strides, int dtype) {
  cuda::Elementwise e;
  if (kind < 0 || kind >= kActivations)
    bad_argument(op, "kind", "0 to 7, got " + std::to_string(kind));
  e.kind = kind;
  e.type = dtype_argument(op, "x", dtype);
  e.dims = read_tuple(op, "shape", shape, e.shape, cuda::kMaxDims);
  strides_argument(op, "x_strides", x_strides, e.dims, e.x_strides);
  strides_argument(op, "y_strides", y_strides, e.dims, e.y_strides);
  e.x = reinterpret_cast<const void*>(x), e.y = reinterpret_cast<void*>(y);
  return e;
}

}  // namespace

void bind_elementwise(py::module_& m) {
  m.def(
      "activation",
      [](int kind, uintptr_t x, uintptr_t y, py::handle shape, py::handle x_strides,
         py::handle y_strides, int dtype, int device, uintptr_t stream) {
        const auto e = arguments("activation", kind, x, y, shape, x_strides, y_strides, dtype);
        py::gil_scoped_release release;
        cuda::OnDevice on(device);
        cuda::activation(e, reinterpret_cast<void*>(stream));
      },
      py::arg("kind"), py::arg("x"), py::arg("y"), py::arg("shape"), py::arg("x_strides"),
      py::arg("y_strides"), py::arg("dtype"), py::arg("device"), py::arg("stream"),
      "y = activation(x).");
  m.def(
      "activation_backward",
      [](int kind, uintptr_t grad, uintptr_t saved, uintptr_t out, py::handle shape,
         py::handle grad_strides, py::handle saved_strides, py::handle out_strides, int dtype,
         int device, uintptr_t stream) {
        auto e = arguments("activation_backward", kind, grad, out, shape, grad_strides, out_strides,
                           dtype);
        strides_argument("activation_backward", "saved_strides", saved_strides, e.dims,
                         e.saved_strides);
        e.saved = reinterpret_cast<const void*>(saved);
        py::gil_scoped_release release;
        cuda::OnDevice on(device);
        cuda::activation_backward(e, reinterpret_cast<void*>(stream));
      },
      py::arg("kind"), py::arg("grad"), py::arg("saved"), py::arg("out"), py::arg("shape"),
      py::arg("grad_strides"), py::arg("saved_strides"), py::arg("out_strides"), py::arg("dtype"),
      py::arg("device"), py::arg("stream"), "out = grad times the activation's derivative.");
}
