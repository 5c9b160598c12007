// The convolution of 8-bit images for Python.
#include "conv/int8_conv.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>

#include "bind/conv_arguments.hpp"
#include "bind/int8_conv.hpp"
#include "bind/pool.hpp"
#include "conv/int8_program.hpp"
#include "gemm/prepared.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

const char* const op = "int8_conv";

bool is_last(const Tensor5& t) { return t.size[1] == 1 || t.stride[1] == 1; }

Int8Conv convolution(uintptr_t x_ptr, py::handle x_shape, py::handle x_strides, uintptr_t w_ptr,
                     py::handle w_shape, py::handle w_strides, uintptr_t y_ptr, py::handle y_shape,
                     py::handle y_strides, int dtype, py::handle stride, py::handle padding,
                     py::handle dilation, int64_t groups, int outside, uintptr_t start,
                     uintptr_t scale, uintptr_t shift, float low, float high, int zero,
                     uintptr_t residual, int residual_dtype, float residual_scale,
                     int residual_zero, Prepared* prepared) {
  Int8Conv c;
  c.x = tensor5_argument(op, "x", x_ptr, x_shape, x_strides);
  c.w = tensor5_argument(op, "w", w_ptr, w_shape, w_strides);
  c.y = tensor5_argument(op, "y", y_ptr, y_shape, y_strides);
  c.type = dtype_argument(op, "dtype", dtype);
  if (c.type != DType::f32 && c.type != DType::bf16 && c.type != DType::u8 && c.type != DType::s8)
    bad_argument(op, "dtype", "float32, bfloat16, uint8 or int8");
  read_geometry(op, c, stride, padding, dilation, groups, true);
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
  c.outside = outside;
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
  return c;
}

// The same arguments, for a call and for a step of a program, where places are in place of
// addresses.
template <class... Arguments>
auto caller(Int8Conv (*read)(Arguments...)) {
  return [read](Arguments... arguments) {
    const Int8Conv c = read(arguments...);
    py::gil_scoped_release release;
    int8_conv(c);
  };
}
template <class... Arguments>
auto adder(Int8Conv (*read)(Arguments...)) {
  return [read](Int8Program& program, Arguments... arguments) { program.add(read(arguments...)); };
}

}  // namespace

void bind_int8_conv(py::module_& m) {
  m.def("int8_conv", caller(&convolution),
        "y = requantized convolution of x (uint8) with w (int8), see conv/int8_conv.hpp and "
        "quant/requantize.hpp; shapes (N, C, D, H, W), strides in elements, channels of x and y "
        "neighbours; the padding of both ends, or of the beginnings and then of the ends; start "
        "(int32), scale and shift (float32): one an output channel; the residual "
        "with the strides of y.",
        py::arg("x_ptr"), py::arg("x_shape"), py::arg("x_strides"), py::arg("w_ptr"),
        py::arg("w_shape"), py::arg("w_strides"), py::arg("y_ptr"), py::arg("y_shape"),
        py::arg("y_strides"), py::arg("dtype"), py::arg("stride"), py::arg("padding"),
        py::arg("dilation"), py::arg("groups"), py::arg("outside"), py::arg("start"),
        py::arg("scale"), py::arg("shift"), py::arg("low"), py::arg("high"), py::arg("zero"),
        py::arg("residual") = 0, py::arg("residual_dtype") = 5, py::arg("residual_scale") = 0,
        py::arg("residual_zero") = 0, py::arg("prepared") = py::none());
  py::class_<Int8Program>(
      m, "Int8Program",
      "int8_conv and int8_max_pool, one after the other: see conv/int8_program.hpp.")
      .def(py::init<>())
      .def("place", &Int8Program::place, py::arg("base"), py::arg("offset"))
      .def("conv", adder(&convolution), "As int8_conv, all arguments in their order.")
      .def(
          "max_pool",
          [](Int8Program& program, uintptr_t x, py::handle shape, uintptr_t y, py::handle out,
             py::handle kernel, py::handle stride, py::handle padding) {
            Int8MaxPool p;
            if (int8_max_pool_arguments(p, x, shape, y, out, kernel, stride, padding))
              program.add(p);
          },
          "As int8_max_pool.")
      .def(
          "run",
          [](const Int8Program& program, const std::vector<uintptr_t>& bases) {
            py::gil_scoped_release release;
            program.run(bases);
          },
          py::arg("bases"));
}
