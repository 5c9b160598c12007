// Linear layers whose weight alone is quantized, for Python.
#include "quant/weight_only.hpp"

#include <pybind11/pybind11.h>

#include "bind/bind.hpp"
#include "bind/weight_only.hpp"
#include "common/activation.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

void weight_only_call(uintptr_t x, int64_t m, int64_t n, int64_t k, int64_t x_row, int dtype,
                      uintptr_t w, int64_t w_row, int format, uintptr_t scale, uintptr_t zero,
                      int64_t groups, uintptr_t bias, int bias_dtype, int activation, uintptr_t out,
                      int precision, bool batch_invariant) {
  const char* op = "weight_only_linear";
  if (m < 0 || n < 0 || k < 0) bad_argument(op, "m, n, k", "0 or more");
  const DType type = dtype_argument(op, "dtype", dtype);
  const DType bias_type = dtype_argument(op, "bias_dtype", bias_dtype);
  if (type != DType::f32 && type != DType::bf16 && type != DType::f16)
    bad_argument(op, "dtype", "float32, bfloat16 or float16");
  if (bias_type != DType::f32 && bias_type != type)
    bad_argument(op, "bias_dtype", "float32 or the dtype of x");
  if (format < 0 || format >= kWeightFormats)
    bad_argument(op, "format", "0 to 4, got " + std::to_string(format));
  if (is_nibble(WeightFormat(format)) && k % 2) bad_argument(op, "k", "an even number");
  if (groups < 1 || k % groups)
    bad_argument(op, "groups", "a divisor of k, got " + std::to_string(groups));
  if (activation < 0 || activation >= kActivations)
    bad_argument(op, "activation", "0 to 7, got " + std::to_string(activation));
  if (precision < 0 || precision > 2)
    bad_argument(op, "precision", "0 to 2, got " + std::to_string(precision));
  if (m && n && (!out || !scale || (k && (!x || !w))))
    bad_argument(op, "x, w, scale, out", "addresses");
  const WeightOnly call{m,
                        n,
                        k,
                        type,
                        reinterpret_cast<const char*>(x),
                        x_row,
                        WeightFormat(format),
                        reinterpret_cast<const uint8_t*>(w),
                        w_row,
                        groups,
                        reinterpret_cast<const float*>(scale),
                        reinterpret_cast<const int32_t*>(zero),
                        reinterpret_cast<const char*>(bias),
                        bias_type,
                        activation,
                        reinterpret_cast<char*>(out),
                        Precision(precision),
                        batch_invariant};
  py::gil_scoped_release release;
  weight_only(call);
}

}  // namespace

void bind_weight_only(py::module_& m) {
  m.def("weight_only_linear", &weight_only_call,
        "out = activation(x ((w - zero) * scale).T + bias), rows of x and w dense", py::arg("x"),
        py::arg("m"), py::arg("n"), py::arg("k"), py::arg("x_row"), py::arg("dtype"), py::arg("w"),
        py::arg("w_row"), py::arg("format"), py::arg("scale"), py::arg("zero"), py::arg("groups"),
        py::arg("bias"), py::arg("bias_dtype"), py::arg("activation"), py::arg("out"),
        py::arg("precision"), py::arg("batch_invariant"));
}
