// Fake quantization, for Python.
#include "cuda/quant/fake_quantize.hpp"

#include "bind/fake_quantize_arguments.hpp"
#include "cuda/bind/bind.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

void forward(uintptr_t x, uintptr_t out, uintptr_t mask, py::handle shape, py::handle x_strides,
             py::handle out_strides, int dtype, const py::tuple& grid_arguments, int device,
             uintptr_t stream) {
  const FakeForwardArgument argument("fake_quantize", x, out, mask, shape, x_strides, out_strides,
                                     dtype, grid_arguments);
  py::gil_scoped_release release;
  cuda::OnDevice on(device);
  cuda::fake_quantize(argument.call, reinterpret_cast<void*>(stream));
}

void masked(uintptr_t grad, uintptr_t out, uintptr_t mask, py::handle shape,
            py::handle grad_strides, py::handle out_strides, int dtype, int device,
            uintptr_t stream) {
  const FakeMaskedArgument argument("fake_quantize_masked", grad, out, mask, shape, grad_strides,
                                    out_strides, dtype);
  py::gil_scoped_release release;
  cuda::OnDevice on(device);
  cuda::fake_masked(argument.call, reinterpret_cast<void*>(stream));
}

int64_t workspace_of(py::handle shape, const py::tuple& grid_arguments) {
  const FakeLayout layout("fake_quantize_gradients", shape);
  const FakeGridArgument grid("fake_quantize_gradients", layout, grid_arguments);
  return cuda::fake_gradients_workspace(layout.dims, layout.shape, grid.strides);
}

void gradients(uintptr_t grad, uintptr_t x, uintptr_t out, uintptr_t mask, py::handle shape,
               int dtype, const py::tuple& grid_arguments, double factor, uintptr_t by_scale,
               uintptr_t by_zero_point, uintptr_t workspace, int device, uintptr_t stream) {
  const char* op = "fake_quantize_gradients";
  const FakeLayout layout(op, shape);
  const FakeGridArgument grid(op, layout, grid_arguments);
  const FakeGradients call{
      fake_type_argument(op, dtype),
      layout.dims,
      layout.shape,
      fake_pointer<const void>(op, "grad", grad, !layout.empty),
      nullptr,
      fake_pointer<const void>(op, "x", x, !layout.empty),
      nullptr,
      fake_pointer<void>(op, "out", out, !layout.empty),
      nullptr,
      fake_pointer<const uint8_t>(op, "mask", mask, !layout.empty),
      grid.grid,
      grid.count,
      factor,
      fake_pointer<float>(op, "by_scale", by_scale, grid.count != 0),
      fake_pointer<float>(op, "by_zero_point", by_zero_point, grid.count != 0)};
  float* partial = fake_pointer<float>(op, "workspace", workspace, !layout.empty);
  py::gil_scoped_release release;
  cuda::OnDevice on(device);
  cuda::fake_gradients(call, partial, reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_fake_quantize(py::module_& m) {
  m.def("fake_quantize", &forward,
        "As that of fastnn._cpu, but that values of scales and zero points are not checked.",
        py::arg("x"), py::arg("out"), py::arg("mask"), py::arg("shape"), py::arg("x_strides"),
        py::arg("out_strides"), py::arg("dtype"), py::arg("grid"), py::arg("device"),
        py::arg("stream"));
  m.def("fake_quantize_masked", &masked, "out = grad where the mask's bit is set, else 0 grad.",
        py::arg("grad"), py::arg("out"), py::arg("mask"), py::arg("shape"), py::arg("grad_strides"),
        py::arg("out_strides"), py::arg("dtype"), py::arg("device"), py::arg("stream"));
  m.def("fake_quantize_workspace", &workspace_of, py::arg("shape"), py::arg("grid"),
        "How many float32 fake_quantize_gradients needs beside.");
  m.def("fake_quantize_gradients", &gradients,
        "The gradients of x, scale and zero point, of contiguous tensors.", py::arg("grad"),
        py::arg("x"), py::arg("out"), py::arg("mask"), py::arg("shape"), py::arg("dtype"),
        py::arg("grid"), py::arg("factor"), py::arg("by_scale"), py::arg("by_zero_point"),
        py::arg("workspace"), py::arg("device"), py::arg("stream"));
}
