// Dropout, for Python.
#include "cuda/dropout/dropout.hpp"

#include "cuda/bind/bind.hpp"

namespace py = pybind11;
using namespace fastnn;

void bind_dropout(py::module_& m) {
  m.def(
      "dropout",
      [](uintptr_t x, uintptr_t y, py::handle shape, py::handle x_strides, py::handle y_strides,
         int dtype, uintptr_t seed, double p, int device, uintptr_t stream) {
        const char* op = "dropout";
        cuda::Dropout d;
        d.type = dtype_argument(op, "x", dtype);
        d.dims = read_tuple(op, "shape", shape, d.shape, cuda::kDropoutDims);
        if (read_tuple(op, "x_strides", x_strides, d.x_strides, cuda::kDropoutDims) != d.dims)
          bad_argument(op, "x_strides", "as many strides as dimensions");
        if (read_tuple(op, "y_strides", y_strides, d.y_strides, cuda::kDropoutDims) != d.dims)
          bad_argument(op, "y_strides", "as many strides as dimensions");
        if (!(p >= 0 && p <= 1)) bad_argument(op, "p", "0 to 1, got " + std::to_string(p));
        d.x = reinterpret_cast<const void*>(x), d.y = reinterpret_cast<void*>(y);
        if (!seed) bad_argument(op, "seed", "an address");
        d.seed = reinterpret_cast<const uint64_t*>(seed), d.p = p;
        py::gil_scoped_release release;
        cuda::OnDevice on(device);
        cuda::dropout(d, reinterpret_cast<void*>(stream));
      },
      py::arg("x"), py::arg("y"), py::arg("shape"), py::arg("x_strides"), py::arg("y_strides"),
      py::arg("dtype"), py::arg("seed"), py::arg("p"), py::arg("device"), py::arg("stream"),
      "y = x / (1 - p) where an element is kept, else 0 x; y may be x. seed is the address of "
      "an int64 on the device.");
}
