// Fake quantization for Python.
#include "bind/fake_quantize.hpp"

#include <cstdio>

#include "bind/bind.hpp"
#include "quant/fake_quantize.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

// The shapes and strides of a call.
struct Layout {
  int dims;
  bool empty = false;
  int64_t shape[kMaxFakeDims];

  Layout(const char* op, py::handle sizes) {
    dims = read_tuple(op, "shape", sizes, shape, kMaxFakeDims);
    for (int d = 0; d < dims; d++) {
      if (shape[d] < 0) bad_argument(op, "shape", "sizes of 0 or more");
      empty |= shape[d] == 0;
    }
  }
  void read_strides(const char* op, const char* name, py::handle t, int64_t* strides) const {
    if (read_tuple(op, name, t, strides, kMaxFakeDims) != dims)
      bad_argument(op, name, "as many strides as dimensions");
  }
};

DType type_argument(const char* op, int code) {
  if (code < 0 || code >= kFakeTypes)
    bad_argument(op, "dtype", "a floating-point type (0 to 3), got " + std::to_string(code));
  return DType(code);
}

template <class T>
T* pointer(const char* op, const char* name, uintptr_t address, bool needed) {
  if (!address && needed) bad_argument(op, name, "an address");
  return reinterpret_cast<T*>(address);
}

// (scale, scale_shape, zero_point, zero_kind, quant_min, quant_max, as_torch, wide, random, seed):
// scale and zero point lie contiguously in scale_shape, which broadcasts to the shape.
struct Grid {
  FakeGrid grid;
  int64_t count = 1;
  int64_t strides[kMaxFakeDims] = {};

  Grid(const char* op, const Layout& layout, const py::tuple& given) {
    if (given.size() != 10) bad_argument(op, "grid", "ten entries");
    grid.scale = pointer<const float>(op, "scale", given[0].cast<uintptr_t>(), !layout.empty);
    int64_t sizes[kMaxFakeDims];
    const int dims = read_tuple(op, "scale_shape", given[1], sizes, kMaxFakeDims);
    if (dims > layout.dims) bad_argument(op, "scale_shape", "no more dimensions than x has");
    for (int d = dims - 1; d >= 0; d--) {
      const int at = layout.dims - dims + d;
      if (sizes[d] != 1 && sizes[d] != layout.shape[at])
        bad_argument(op, "scale_shape", "sizes that broadcast to those of x");
      strides[at] = sizes[d] == 1 ? 0 : count;
      count *= sizes[d];
    }
    const int kind = given[3].cast<int>();
    if (kind < 0 || kind > 2) bad_argument(op, "zero_kind", "0, 1 or 2");
    grid.zero_kind = ZeroPoint(kind);
    grid.zero_point =
        pointer<const void>(op, "zero_point", given[2].cast<uintptr_t>(), kind && !layout.empty);
    grid.strides = strides;
    const int64_t lowest = given[4].cast<int64_t>(), highest = given[5].cast<int64_t>();
    // Beyond, float32 does not hold all integers and their differences.
    constexpr int64_t most = 1 << 22;
    if (lowest > highest || lowest < -most || highest > most)
      bad_argument(op, "quant_min, quant_max", "a range within -2^22 to 2^22");
    grid.lowest = float(lowest), grid.highest = float(highest);
    grid.as_torch = given[6].cast<bool>(), grid.wide = given[7].cast<bool>();
    grid.random = given[8].cast<bool>(), grid.seed = given[9].cast<uint64_t>();
  }
};

[[noreturn]] void refuse_scale(const float* scale, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    if (scale[i] >= 0x1p-126f && scale[i] <= 0x1.fffffep127f) continue;
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
  const char* op = "fake_quantize";
  const Layout layout(op, shape);
  int64_t xs[kMaxFakeDims], os[kMaxFakeDims];
  layout.read_strides(op, "x_strides", x_strides, xs);
  layout.read_strides(op, "out_strides", out_strides, os);
  const Grid grid(op, layout, grid_arguments);
  const FakeQuantize call{type_argument(op, dtype),
                          layout.dims,
                          layout.shape,
                          pointer<const void>(op, "x", x, !layout.empty),
                          xs,
                          pointer<void>(op, "out", out, !layout.empty),
                          os,
                          pointer<uint8_t>(op, "mask", mask, false),
                          grid.grid};
  BadGrid bad;
  {
    py::gil_scoped_release release;
    bad = fake_quantize(call);
  }
  if (bad == BadGrid::scale) refuse_scale(grid.grid.scale, grid.count);
  if (bad == BadGrid::zero_point) refuse_zero_point(grid.grid, grid.count);
}

void masked(uintptr_t grad, uintptr_t out, uintptr_t mask, py::handle shape,
            py::handle grad_strides, py::handle out_strides, int dtype) {
  const char* op = "fake_quantize_masked";
  const Layout layout(op, shape);
  int64_t gs[kMaxFakeDims], os[kMaxFakeDims];
  layout.read_strides(op, "grad_strides", grad_strides, gs);
  layout.read_strides(op, "out_strides", out_strides, os);
  const FakeMasked call{type_argument(op, dtype),
                        layout.dims,
                        layout.shape,
                        pointer<const void>(op, "grad", grad, !layout.empty),
                        gs,
                        pointer<void>(op, "out", out, !layout.empty),
                        os,
                        pointer<const uint8_t>(op, "mask", mask, !layout.empty)};
  py::gil_scoped_release release;
  fake_masked(call);
}

void gradients(uintptr_t grad, uintptr_t x, uintptr_t out, uintptr_t mask, py::handle shape,
               py::handle grad_strides, py::handle x_strides, py::handle out_strides, int dtype,
               const py::tuple& grid_arguments, double factor, uintptr_t by_scale,
               uintptr_t by_zero_point) {
  const char* op = "fake_quantize_gradients";
  const Layout layout(op, shape);
  int64_t gs[kMaxFakeDims], xs[kMaxFakeDims], os[kMaxFakeDims];
  layout.read_strides(op, "grad_strides", grad_strides, gs);
  layout.read_strides(op, "x_strides", x_strides, xs);
  layout.read_strides(op, "out_strides", out_strides, os);
  const Grid grid(op, layout, grid_arguments);
  const FakeGradients call{type_argument(op, dtype),
                           layout.dims,
                           layout.shape,
                           pointer<const void>(op, "grad", grad, !layout.empty),
                           gs,
                           pointer<const void>(op, "x", x, !layout.empty),
                           xs,
                           pointer<void>(op, "out", out, !layout.empty),
                           os,
                           pointer<const uint8_t>(op, "mask", mask, !layout.empty),
                           grid.grid,
                           grid.count,
                           factor,
                           pointer<float>(op, "by_scale", by_scale, grid.count != 0),
                           pointer<float>(op, "by_zero_point", by_zero_point, false)};
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
