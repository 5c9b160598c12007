// Fake quantization for Python.
#include "bind/fake_quantize.hpp"

#include <cstdio>

#include "bind/bind.hpp"
#include "bind/fake_quantize_arguments.hpp"
#include "quant/scheme.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

[[noreturn]] void refuse_scale(const float* scale, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    if (is_scale(scale[i])) continue;
    char text[32];
    std::snprintf(text, sizeof(text), "%.9g", double(scale[i]));
    bad_argument("fake_quantize", "scale",
                 "positive, normal and finite float32 numbers, got " + std::string(text));
  }
  bad_argument("fake_quantize", "scale", "positive, normal and finite float32 numbers");
}

[[noreturn]] void refuse_zero_point(const FakeGrid& grid, int64_t count) {
  std::string got = grid.zero_kind == ZeroPoint::none ? "none, which is 0" : "";
  for (int64_t i = 0; i < count && got.empty(); i++) {
    const bool whole = grid.zero_kind == ZeroPoint::integers;
    const double zero = whole ? double(static_cast<const int32_t*>(grid.zero_point)[i])
                              : double(static_cast<const float*>(grid.zero_point)[i]);
    if (whole ? zero < double(grid.lowest) || zero > double(grid.highest) : zero != zero)
      got = whole ? std::to_string(int64_t(zero)) : "NaN";
  }
  bad_argument("fake_quantize", "zero_point",
               std::to_string(int64_t(grid.lowest)) + " to " +
                   std::to_string(int64_t(grid.highest)) + ", got " + got);
}

void forward(uintptr_t x, uintptr_t out, uintptr_t mask, py::handle shape, py::handle x_strides,
             py::handle out_strides, int dtype, const py::tuple& grid_arguments) {
  const FakeForwardArgument argument("fake_quantize", x, out, mask, shape, x_strides, out_strides,
                                     dtype, grid_arguments);
  BadGrid bad;
  {
    py::gil_scoped_release release;
    bad = fake_quantize(argument.call);
  }
  if (bad == BadGrid::scale) refuse_scale(argument.call.grid.scale, argument.grid.count);
  if (bad == BadGrid::zero_point) refuse_zero_point(argument.call.grid, argument.grid.count);
}

void masked(uintptr_t grad, uintptr_t out, uintptr_t mask, py::handle shape,
            py::handle grad_strides, py::handle out_strides, int dtype) {
  const FakeMaskedArgument argument("fake_quantize_masked", grad, out, mask, shape, grad_strides,
                                    out_strides, dtype);
  py::gil_scoped_release release;
  fake_masked(argument.call);
}

void gradients(uintptr_t grad, uintptr_t x, uintptr_t out, uintptr_t mask, py::handle shape,
               py::handle grad_strides, py::handle x_strides, py::handle out_strides, int dtype,
               const py::tuple& grid_arguments, double factor, uintptr_t by_scale,
               uintptr_t by_zero_point) {
  const char* op = "fake_quantize_gradients";
  const FakeLayout layout(op, shape);
  int64_t gs[kMaxFakeDims], xs[kMaxFakeDims], os[kMaxFakeDims];
  layout.read_strides(op, "grad_strides", grad_strides, gs);
  layout.read_strides(op, "x_strides", x_strides, xs);
  layout.read_strides(op, "out_strides", out_strides, os);
  const FakeGridArgument grid(op, layout, grid_arguments);
  const FakeGradients call{fake_type_argument(op, dtype),
                           layout.dims,
                           layout.shape,
                           fake_pointer<const void>(op, "grad", grad, !layout.empty),
                           gs,
                           fake_pointer<const void>(op, "x", x, !layout.empty),
                           xs,
                           fake_pointer<void>(op, "out", out, !layout.empty),
                           os,
                           fake_pointer<const uint8_t>(op, "mask", mask, !layout.empty),
                           grid.grid,
                           grid.count,
                           factor,
                           fake_pointer<float>(op, "by_scale", by_scale, grid.count != 0),
                           fake_pointer<float>(op, "by_zero_point", by_zero_point, false)};
  py::gil_scoped_release release;
  fake_gradients(call);
}

}  // namespace

void bind_fake_quantize(py::module_& m) {
  m.def("fake_quantize", &forward,
        "out = clamp(round(x / scale)) * scale, and into mask a bit an element: whether it was "
        "within the range.",
        py::arg("x"), py::arg("out"), py::arg("mask"), py::arg("shape"), py::arg("x_strides"),
        py::arg("out_strides"), py::arg("dtype"), py::arg("grid"));
  m.def("fake_quantize_masked", &masked, "out = grad where the mask's bit is set, else 0 grad.",
        py::arg("grad"), py::arg("out"), py::arg("mask"), py::arg("shape"), py::arg("grad_strides"),
        py::arg("out_strides"), py::arg("dtype"));
  m.def("fake_quantize_gradients", &gradients,
        "The gradients of x, scale and zero point in one pass.", py::arg("grad"), py::arg("x"),
        py::arg("out"), py::arg("mask"), py::arg("shape"), py::arg("grad_strides"),
        py::arg("x_strides"), py::arg("out_strides"), py::arg("dtype"), py::arg("grid"),
        py::arg("factor"), py::arg("by_scale"), py::arg("by_zero_point"));
  m.def(
      "fake_mask_bytes", [](int64_t n) { return fake_mask_bytes(n); },
      "How long the mask of n elements is.", py::arg("n"));
}
