// softmax, for Python.
#include "cuda/softmax/softmax.hpp"

#include "cuda/bind/rows.hpp"

namespace py = pybind11;
using namespace fastnn;

void bind_softmax(py::module_& m) {
  m.def(
      "softmax",
      [](py::handle shape, int dtype, bool log, int dim, py::handle x, py::handle out, int device,
         uintptr_t stream) {
        const auto rows = rows_argument("softmax", shape, dim, {x, out});
        const DType type = dtype_argument("softmax", "x", dtype);
        py::gil_scoped_release release;
        cuda::OnDevice on(device);
        cuda::softmax(rows, type, log, reinterpret_cast<void*>(stream));
      },
      py::arg("shape"), py::arg("dtype"), py::arg("log"), py::arg("dim"), py::arg("x"),
      py::arg("out"), py::arg("device"), py::arg("stream"),
      "softmax or log_softmax along dim; operands are (address, strides).");
  m.def(
      "softmax_backward",
      [](py::handle shape, int dtype, bool log, int dim, py::handle grad, py::handle saved,
         py::handle grad_x, int device, uintptr_t stream) {
        const auto rows = rows_argument("softmax_backward", shape, dim, {grad, saved, grad_x});
        const DType type = dtype_argument("softmax_backward", "saved", dtype);
        py::gil_scoped_release release;
        cuda::OnDevice on(device);
        cuda::softmax_backward(rows, type, log, reinterpret_cast<void*>(stream));
      },
      py::arg("shape"), py::arg("dtype"), py::arg("log"), py::arg("dim"), py::arg("grad"),
      py::arg("saved"), py::arg("grad_x"), py::arg("device"), py::arg("stream"),
      "The gradient by softmax's input, from its result.");
}
