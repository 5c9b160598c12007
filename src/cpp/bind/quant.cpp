// Quantization for Python.
#include <pybind11/pybind11.h>

#include "bind/bind.hpp"
#include "quant/quantize.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

// Numbers, as Python tells them: shapes and strides are tuples, read into the arrays here.
struct Arguments {
  int64_t shape[kMaxQuantizeDims], x_strides[kMaxQuantizeDims], q_strides[kMaxQuantizeDims],
      scale_strides[kMaxQuantizeDims];
  Numbers numbers{};

  Arguments(const char* op, py::handle shape_, int dtype, uintptr_t x, py::handle x_strides_,
            int scheme, uintptr_t q, py::handle q_strides_, py::handle scale_strides_,
            int64_t scales, bool has_q) {
    if (dtype < 0 || dtype >= kQuantizeTypes)
      bad_argument(op, "dtype", "a floating-point type (0 to 3), got " + std::to_string(dtype));
    if (scheme < 0 || scheme >= kSchemes)
      bad_argument(op, "scheme", "0 to 5, got " + std::to_string(scheme));
    const int dims = read_tuple(op, "shape", shape_, shape, kMaxQuantizeDims);
    bool empty = false;
    for (int d = 0; d < dims; d++) {
      if (shape[d] < 0) bad_argument(op, "shape", "sizes of 0 or more");
      empty |= shape[d] == 0;
    }
    auto strides = [&](const char* name, py::handle tuple, int64_t* to) {
      if (read_tuple(op, name, tuple, to, kMaxQuantizeDims) != dims)
        bad_argument(op, name, "as many strides as dimensions");
    };
    strides("x_strides", x_strides_, x_strides);
    if (has_q) strides("q_strides", q_strides_, q_strides);
    strides("scale_strides", scale_strides_, scale_strides);
    int64_t last = 0;  // scale
    for (int d = 0; d < dims; d++) {
      if (scale_strides[d] < 0) bad_argument(op, "scale_strides", "strides of 0 or more");
      if (shape[d] > 0) last += (shape[d] - 1) * scale_strides[d];
    }
    if (scales < 0 || (!empty && last >= scales))
      bad_argument(op, "scales", "as many as the strides reach");
    if ((!x || (has_q && !q)) && !empty) bad_argument(op, "x, q", "addresses");
    numbers = {dims,
               shape,
               DType(dtype),
               reinterpret_cast<void*>(x),
               x_strides,
               Scheme(scheme),
               reinterpret_cast<void*>(q),
               has_q ? q_strides : nullptr,
               scale_strides,
               scales};
    if (has_q && is_packed(Scheme(scheme)) && !empty) check_packed(op);
  }

  // Elements are halves of bytes: the innermost dimensions are dense up to an even size (so that
  // they become one loop: those of x are, too), and all around them begin at whole bytes.
  void check_packed(const char* op) {
    int64_t dense = 1, x_step = 0;
    int d = numbers.dims - 1;
    for (; d >= 0 && dense % 2; d--) {
      if (shape[d] == 1) continue;
      if (!x_step) x_step = x_strides[d];
      if (q_strides[d] != dense || x_strides[d] != x_step * dense)
        bad_argument(op, "x_strides, q_strides", "dense groups where two numbers make a byte");
      dense *= shape[d];
    }
    if (dense % 2)
      bad_argument(op, "shape", "an even last dimension where two numbers make a byte");
    for (; d >= 0; d--)
      if (shape[d] != 1 && q_strides[d] % 2)
        bad_argument(op, "q_strides", "even strides where two numbers make a byte");
  }
  Arguments(const Arguments&) = delete;
};

const float* scale_argument(const char* op, uintptr_t scale, int64_t scales) {
  if (!scale && scales) bad_argument(op, "scale", "an address");
  return reinterpret_cast<const float*>(scale);
}

void quantize_call(uintptr_t x, uintptr_t q, uintptr_t scale, uintptr_t zero_point,
                   py::handle shape, py::handle x_strides, py::handle q_strides,
                   py::handle scale_strides, int64_t scales, int dtype, int scheme, bool stochastic,
                   uint64_t seed) {
  const char* op = "quantize";
  const Arguments arguments(op, shape, dtype, x, x_strides, scheme, q, q_strides, scale_strides,
                            scales, true);
  const float* scale_ = scale_argument(op, scale, scales);
  py::gil_scoped_release release;
  quantize(arguments.numbers, scale_, reinterpret_cast<const int32_t*>(zero_point),
           {stochastic, seed});
}

void dequantize_call(uintptr_t q, uintptr_t x, uintptr_t scale, uintptr_t zero_point,
                     py::handle shape, py::handle q_strides, py::handle x_strides,
                     py::handle scale_strides, int64_t scales, int scheme, int dtype) {
  const char* op = "dequantize";
  const Arguments arguments(op, shape, dtype, x, x_strides, scheme, q, q_strides, scale_strides,
                            scales, true);
  const float* scale_ = scale_argument(op, scale, scales);
  py::gil_scoped_release release;
  dequantize(arguments.numbers, scale_, reinterpret_cast<const int32_t*>(zero_point));
}

void choose_scale_call(uintptr_t x, uintptr_t scale, uintptr_t zero_point, py::handle shape,
                       py::handle x_strides, py::handle scale_strides, int64_t scales, int dtype,
                       int scheme, bool symmetric) {
  const char* op = "choose_scale";
  const Arguments arguments(op, shape, dtype, x, x_strides, scheme, 0, {}, scale_strides, scales,
                            false);
  scale_argument(op, scale, scales);
  py::gil_scoped_release release;
  choose_scale(arguments.numbers, symmetric, reinterpret_cast<float*>(scale),
               reinterpret_cast<int32_t*>(zero_point));
}

void quantize_dynamic_call(uintptr_t x, uintptr_t q, uintptr_t scale, uintptr_t zero_point,
                           py::handle shape, py::handle x_strides, py::handle q_strides,
                           py::handle scale_strides, int64_t scales, int dtype, int scheme,
                           bool symmetric, bool stochastic, uint64_t seed) {
  const char* op = "quantize_dynamic";
  const Arguments arguments(op, shape, dtype, x, x_strides, scheme, q, q_strides, scale_strides,
                            scales, true);
  scale_argument(op, scale, scales);
  py::gil_scoped_release release;
  quantize_dynamic(arguments.numbers, symmetric, reinterpret_cast<float*>(scale),
                   reinterpret_cast<int32_t*>(zero_point), {stochastic, seed});
}

}  // namespace

void bind_quant(py::module_& m) {
  m.def("quantize", &quantize_call,
        "q = round(x / scale) + zero_point, saturated. zero_point may be 0, for none; "
        "scale_strides has a stride for each dimension, in scales.",
        py::arg("x"), py::arg("q"), py::arg("scale"), py::arg("zero_point"), py::arg("shape"),
        py::arg("x_strides"), py::arg("q_strides"), py::arg("scale_strides"), py::arg("scales"),
        py::arg("dtype"), py::arg("scheme"), py::arg("stochastic") = false, py::arg("seed") = 0);
  m.def("dequantize", &dequantize_call, "x = (q - zero_point) * scale.", py::arg("q"), py::arg("x"),
        py::arg("scale"), py::arg("zero_point"), py::arg("shape"), py::arg("q_strides"),
        py::arg("x_strides"), py::arg("scale_strides"), py::arg("scales"), py::arg("scheme"),
        py::arg("dtype"));
  m.def("choose_scale", &choose_scale_call,
        "The scales, and zero points unless symmetric, that fit the finite values of x.",
        py::arg("x"), py::arg("scale"), py::arg("zero_point"), py::arg("shape"),
        py::arg("x_strides"), py::arg("scale_strides"), py::arg("scales"), py::arg("dtype"),
        py::arg("scheme"), py::arg("symmetric"));
  m.def("quantize_dynamic", &quantize_dynamic_call, "choose_scale and quantize.", py::arg("x"),
        py::arg("q"), py::arg("scale"), py::arg("zero_point"), py::arg("shape"),
        py::arg("x_strides"), py::arg("q_strides"), py::arg("scale_strides"), py::arg("scales"),
        py::arg("dtype"), py::arg("scheme"), py::arg("symmetric"), py::arg("stochastic") = false,
        py::arg("seed") = 0);
}
