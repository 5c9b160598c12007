// Quantization for Python.
#include "bind/bind.hpp"
#include "bind/quant_arguments.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

Rounding rounding_argument(uintptr_t seed) {
  return {seed != 0, seed ? *reinterpret_cast<const uint64_t*>(seed) : 0};
}

void quantize_call(uintptr_t x, uintptr_t q, uintptr_t scale, uintptr_t zero_point,
                   py::handle shape, py::handle x_strides, py::handle q_strides,
                   py::handle scale_strides, int64_t scales, int dtype, int scheme,
                   uintptr_t seed) {
  const char* op = "quantize";
  const NumbersArgument arguments(op, shape, dtype, x, x_strides, scheme, q, q_strides,
                                  scale_strides, scales, true);
  const float* scale_ = scale_argument(op, scale, scales);
  py::gil_scoped_release release;
  quantize(arguments.numbers, scale_, reinterpret_cast<const int32_t*>(zero_point),
           rounding_argument(seed));
}

void dequantize_call(uintptr_t q, uintptr_t x, uintptr_t scale, uintptr_t zero_point,
                     py::handle shape, py::handle q_strides, py::handle x_strides,
                     py::handle scale_strides, int64_t scales, int scheme, int dtype) {
  const char* op = "dequantize";
  const NumbersArgument arguments(op, shape, dtype, x, x_strides, scheme, q, q_strides,
                                  scale_strides, scales, true);
  const float* scale_ = scale_argument(op, scale, scales);
  py::gil_scoped_release release;
  dequantize(arguments.numbers, scale_, reinterpret_cast<const int32_t*>(zero_point));
}

void choose_scale_call(uintptr_t x, uintptr_t scale, uintptr_t zero_point, py::handle shape,
                       py::handle x_strides, py::handle scale_strides, int64_t scales, int dtype,
                       int scheme) {
  const char* op = "choose_scale";
  const NumbersArgument arguments(op, shape, dtype, x, x_strides, scheme, 0, {}, scale_strides,
                                  scales, false);
  scale_argument(op, scale, scales);
  py::gil_scoped_release release;
  choose_scale(arguments.numbers, !zero_point, reinterpret_cast<float*>(scale),
               reinterpret_cast<int32_t*>(zero_point));
}

void quantize_dynamic_call(uintptr_t x, uintptr_t q, uintptr_t scale, uintptr_t zero_point,
                           py::handle shape, py::handle x_strides, py::handle q_strides,
                           py::handle scale_strides, int64_t scales, int dtype, int scheme,
                           uintptr_t seed) {
  const char* op = "quantize_dynamic";
  const NumbersArgument arguments(op, shape, dtype, x, x_strides, scheme, q, q_strides,
                                  scale_strides, scales, true);
  scale_argument(op, scale, scales);
  py::gil_scoped_release release;
  quantize_dynamic(arguments.numbers, !zero_point, reinterpret_cast<float*>(scale),
                   reinterpret_cast<int32_t*>(zero_point), rounding_argument(seed));
}

}  // namespace

void bind_quant(py::module_& m) {
  m.def("quantize", &quantize_call,
        "q = round(x / scale) + zero_point, saturated. zero_point may be 0, for none; "
        "scale_strides has a stride for each dimension, in scales; seed is the address of 64 bits "
        "for stochastic rounding, 0 is to nearest.",
        py::arg("x"), py::arg("q"), py::arg("scale"), py::arg("zero_point"), py::arg("shape"),
        py::arg("x_strides"), py::arg("q_strides"), py::arg("scale_strides"), py::arg("scales"),
        py::arg("dtype"), py::arg("scheme"), py::arg("seed"));
  m.def("dequantize", &dequantize_call, "x = (q - zero_point) * scale.", py::arg("q"), py::arg("x"),
        py::arg("scale"), py::arg("zero_point"), py::arg("shape"), py::arg("q_strides"),
        py::arg("x_strides"), py::arg("scale_strides"), py::arg("scales"), py::arg("scheme"),
        py::arg("dtype"));
  m.def("choose_scale", &choose_scale_call,
        "The scales that fit the finite values of x, and the zero points, unless their address is "
        "0: symmetric.",
        py::arg("x"), py::arg("scale"), py::arg("zero_point"), py::arg("shape"),
        py::arg("x_strides"), py::arg("scale_strides"), py::arg("scales"), py::arg("dtype"),
        py::arg("scheme"));
  m.def("quantize_dynamic", &quantize_dynamic_call, "choose_scale and quantize.", py::arg("x"),
        py::arg("q"), py::arg("scale"), py::arg("zero_point"), py::arg("shape"),
        py::arg("x_strides"), py::arg("q_strides"), py::arg("scale_strides"), py::arg("scales"),
        py::arg("dtype"), py::arg("scheme"), py::arg("seed"));
}
