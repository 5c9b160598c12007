// The convolution of 8-bit images for Python.
#include "conv/int8_conv.hpp"

#include <pybind11/pybind11.h>

#include <cmath>

#include "bind/bind.hpp"
#include "bind/int8_conv.hpp"
#include "gemm/prepared.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

const char* const op = "int8_conv";

Tensor5 tensor(const char* name, uintptr_t ptr, py::handle shape, py::handle strides) {
  Tensor5 t;
  if (read_tuple(op, name, shape, t.size, 5) != 5 ||
      read_tuple(op, name, strides, t.stride, 5) != 5)
    bad_argument(op, name, "five sizes and strides");
  for (const int64_t size : t.size)
    if (size < 0) bad_argument(op, name, "sizes of 0 or more");
  if (!ptr && t.count()) bad_argument(op, name, "an address");
  t.data = reinterpret_cast<char*>(ptr);
  return t;
}

bool is_last(const Tensor5& t) { return t.size[1] == 1 || t.stride[1] == 1; }

void call(uintptr_t x_ptr, py::handle x_shape, py::handle x_strides, uintptr_t w_ptr,
          py::handle w_shape, py::handle w_strides, uintptr_t y_ptr, py::handle y_shape,
          py::handle y_strides, int dtype, py::handle stride, py::handle padding,
          py::handle dilation, int64_t groups, int outside, uintptr_t start, uintptr_t scale,
          uintptr_t shift, float low, float high, int zero, uintptr_t residual, int residual_dtype,
          float residual_scale, int residual_zero, Prepared* prepared) {
  Int8Conv c;
  c.x = tensor("x", x_ptr, x_shape, x_strides);
  c.w = tensor("w", w_ptr, w_shape, w_strides);
  c.y = tensor("y", y_ptr, y_shape, y_strides);
  c.type = dtype_argument(op, "dtype", dtype);
  if (c.type != DType::f32 && c.type != DType::bf16 && c.type != DType::u8 && c.type != DType::s8)
    bad_argument(op, "dtype", "float32, bfloat16, uint8 or int8");
  if (read_tuple(op, "stride", stride, c.stride, kSpatial) != kSpatial ||
      read_tuple(op, "padding", padding, c.padding, kSpatial) != kSpatial ||
      read_tuple(op, "dilation", dilation, c.dilation, kSpatial) != kSpatial)
    bad_argument(op, "stride, padding, dilation", "three numbers each");
  if (groups < 1 || c.x.size[1] != c.w.size[1] * groups || c.w.size[0] % groups ||
      c.y.size[1] != c.w.size[0])
    bad_argument(op, "groups", "channels that groups divide");
  if (c.x.size[0] != c.y.size[0]) bad_argument(op, "y", "as many images as x");
  for (int d = 0; d < kSpatial; d++) {
    if (c.stride[d] < 1 || c.dilation[d] < 1 || c.padding[d] < 0)
      bad_argument(op, "stride, padding, dilation", "positive numbers");
    const int64_t reach =
        c.x.size[2 + d] + 2 * c.padding[d] - c.dilation[d] * (c.w.size[2 + d] - 1) - 1;
    if (c.w.size[2 + d] < 1 || (c.y.count() && c.y.size[2 + d] != reach / c.stride[d] + 1) ||
        (c.y.count() && reach < 0))
      bad_argument(op, "y", "the size that x, w, stride, padding and dilation give");
  }
  if (!is_last(c.x) || !is_last(c.y))
    bad_argument(op, "x, y", "images whose channels are neighbours");
  if (c.w.size[1] * c.w.spatial() > kInt8Depth)
    bad_argument(op, "w",
                 "at most " + std::to_string(kInt8Depth) +
                     " elements a filter, whose sum is exact in int32, got " +
                     std::to_string(c.w.size[1] * c.w.spatial()));
  if (outside < 0 || outside > 255) bad_argument(op, "outside", "0 to 255");
  if (c.y.count() && (!start || !scale || !shift))
    bad_argument(op, "start, scale, shift", "addresses");
  c.groups = groups, c.outside = outside;
  Requantize& q = c.requantize;
  q.start = reinterpret_cast<const int32_t*>(start);
  q.scale = reinterpret_cast<const float*>(scale);
  q.shift = reinterpret_cast<const float*>(shift);
  q.low = low, q.high = high, q.zero = zero;
  const bool narrow = c.type == DType::u8 || c.type == DType::s8;
  if (narrow && !(std::abs(low) <= 255 && std::abs(high) <= 255 && std::abs(zero) <= 255))
    bad_argument(op, "low, high, zero", "8 bits");
  c.residual = reinterpret_cast<const char*>(residual);
  q.residual_type = dtype_argument(op, "residual_dtype", residual_dtype);
  if (q.residual_type != DType::u8 && q.residual_type != DType::s8)
    bad_argument(op, "residual_dtype", "uint8 or int8");
  q.residual_scale = residual_scale, q.residual_zero = residual_zero;
  c.prepared = prepared;
  py::gil_scoped_release release;
  int8_conv(c);
}

}  // namespace

void bind_int8_conv(py::module_& m) {
  m.def("int8_conv", &call,
        "y = requantized convolution of x (uint8) with w (int8), see conv/int8_conv.hpp and "
        "quant/requantize.hpp; shapes (N, C, D, H, W), strides in elements, channels of x and y "
        "neighbours; start (int32), scale and shift (float32): one an output channel; the residual "
        "with the strides of y.",
        py::arg("x_ptr"), py::arg("x_shape"), py::arg("x_strides"), py::arg("w_ptr"),
        py::arg("w_shape"), py::arg("w_strides"), py::arg("y_ptr"), py::arg("y_shape"),
        py::arg("y_strides"), py::arg("dtype"), py::arg("stride"), py::arg("padding"),
        py::arg("dilation"), py::arg("groups"), py::arg("outside"), py::arg("start"),
        py::arg("scale"), py::arg("shift"), py::arg("low"), py::arg("high"), py::arg("zero"),
        py::arg("residual") = 0, py::arg("residual_dtype") = 5, py::arg("residual_scale") = 0,
        py::arg("residual_zero") = 0, py::arg("prepared") = py::none());
}
