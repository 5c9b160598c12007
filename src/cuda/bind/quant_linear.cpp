// The linear layers of quantized numbers, for Python.
#include "common/activation.hpp"
#include "cuda/bind/bind.hpp"
#include "cuda/quant/int8_linear.hpp"
#include "cuda/quant/weight_only.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

// More products of uint8 and int8 might not fit into 32 bits.
constexpr int64_t kInt8MostColumns = 65793;

DType float_argument(const char* op, const char* name, int code) {
  const DType type = dtype_argument(op, name, code);
  if (type != DType::f32 && type != DType::bf16 && type != DType::f16)
    bad_argument(op, name, "float32, bfloat16 or float16");
  return type;
}
int activation_argument(const char* op, int activation) {
  if (activation < 0 || activation >= kActivations) bad_argument(op, "activation", "0 to 7");
  return activation;
}

void int8_linear_call(uintptr_t q, int64_t m, int64_t k, int64_t q_row, uintptr_t x_scale,
                      uintptr_t x_zero, bool each, uintptr_t w, int64_t n, int64_t w_row,
                      int64_t w_column, uintptr_t w_sums, uintptr_t w_scale, bool one_scale,
                      uintptr_t bias, int bias_dtype, int activation, uintptr_t y, int dtype,
                      int device, uintptr_t stream) {
  const char* op = "int8_linear";
  cuda::Int8Linear c;
  if (m < 0 || n < 0 || k < 0 || k > kInt8MostColumns)
    bad_argument(op, "weight",
                 "at most " + std::to_string(kInt8MostColumns) +
                     " columns, whose sums fit into 32 bits, got " + std::to_string(k));
  if (m && n && (!x_scale || !x_zero || !w_scale || !y || (k && (!q || !w))))
    bad_argument(op, "q, x_scale, x_zero, w, w_scale, y", "addresses");
  c.m = m, c.n = n, c.k = k;
  c.q = reinterpret_cast<const uint8_t*>(q), c.q_row = q_row;
  c.x_scale = reinterpret_cast<const float*>(x_scale);
  c.x_zero = reinterpret_cast<const int32_t*>(x_zero), c.x_step = each;
  c.w = reinterpret_cast<const int8_t*>(w), c.w_row = w_row, c.w_column = w_column;
  c.w_sums = reinterpret_cast<const int32_t*>(w_sums);
  c.w_scale = reinterpret_cast<const float*>(w_scale), c.w_step = !one_scale;
  c.bias = reinterpret_cast<const void*>(bias);
  c.bias_type = float_argument(op, "bias_dtype", bias_dtype);
  c.activation = activation_argument(op, activation);
  c.y = reinterpret_cast<void*>(y), c.type = float_argument(op, "dtype", dtype);
  if (m && n && !w_sums && !cuda::few_rows(c)) bad_argument(op, "w_sums", "an address");
  py::gil_scoped_release release;
  cuda::OnDevice on(device);
  cuda::int8_linear(c, reinterpret_cast<void*>(stream));
}

void weight_only_call(uintptr_t x, int64_t m, int64_t n, int64_t k, int64_t x_row, int dtype,
                      uintptr_t w, int64_t w_row, int format, uintptr_t scale, uintptr_t zero,
                      int64_t groups, uintptr_t bias, int bias_dtype, int activation, uintptr_t out,
                      bool batch_invariant, int device, uintptr_t stream) {
  const char* op = "weight_only_linear";
  WeightOnly c{};
  if (m < 0 || n < 0 || k < 0 || groups < 1 || k % groups)
    bad_argument(op, "m, n, k, groups", "sizes of 0 or more, and groups that divide k");
  if (format < 0 || format >= kWeightFormats) bad_argument(op, "format", "0 to 4");
  if (m && n && (!out || (k && (!x || !w || !scale))))
    bad_argument(op, "x, w, scale, out", "addresses");
  c.m = m, c.n = n, c.k = k, c.type = float_argument(op, "dtype", dtype);
  c.x = reinterpret_cast<const char*>(x), c.x_row = x_row;
  c.format = WeightFormat(format);
  if (is_nibble(c.format) && k % 2) bad_argument(op, "k", "an even number of elements of 4 bits");
  c.w = reinterpret_cast<const uint8_t*>(w), c.w_row = w_row;
  c.groups = groups, c.scale = reinterpret_cast<const float*>(scale);
  c.zero = reinterpret_cast<const int32_t*>(zero);
  c.bias = reinterpret_cast<const char*>(bias);
  c.bias_type = float_argument(op, "bias_dtype", bias_dtype);
  c.activation = activation_argument(op, activation);
  c.out = reinterpret_cast<char*>(out), c.batch_invariant = batch_invariant;
  py::gil_scoped_release release;
  cuda::OnDevice on(device);
  cuda::weight_only(c, reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_quant_linear(py::module_& m) {
  m.def("int8_linear", &int8_linear_call,
        "activation(x_scale * w_scale * ((q - x_zero) Wᵀ) + bias). `each`: a scale and a zero "
        "point a row. w_sums, of the weight's rows, may be 0 where int8_few_rows.",
        py::arg("q"), py::arg("m"), py::arg("k"), py::arg("q_row"), py::arg("x_scale"),
        py::arg("x_zero"), py::arg("each"), py::arg("w"), py::arg("n"), py::arg("w_row"),
        py::arg("w_column"), py::arg("w_sums"), py::arg("w_scale"), py::arg("one_scale"),
        py::arg("bias"), py::arg("bias_dtype"), py::arg("activation"), py::arg("y"),
        py::arg("dtype"), py::arg("device"), py::arg("stream"));
  m.def(
      "int8_few_rows",
      [](uintptr_t q, int64_t rows, int64_t k, int64_t q_row, uintptr_t w, int64_t w_row,
         int64_t w_column) {
        cuda::Int8Linear c;
        c.m = rows, c.k = k, c.q = reinterpret_cast<const uint8_t*>(q), c.q_row = q_row;
        c.w = reinterpret_cast<const int8_t*>(w), c.w_row = w_row, c.w_column = w_column;
        return cuda::few_rows(c);
      },
      "Whether int8_linear needs no sums of the weight's rows.", py::arg("q"), py::arg("m"),
      py::arg("k"), py::arg("q_row"), py::arg("w"), py::arg("w_row"), py::arg("w_column"));
  m.def(
      "int8_row_sums",
      [](uintptr_t w, int64_t n, int64_t k, int64_t w_row, int64_t w_column, uintptr_t sums,
         int device, uintptr_t stream) {
        if (n < 0 || k < 0 || (n && (!sums || (k && !w))))
          bad_argument("int8_row_sums", "w, sums", "addresses");
        py::gil_scoped_release release;
        cuda::OnDevice on(device);
        cuda::row_sums(reinterpret_cast<const int8_t*>(w), n, k, w_row, w_column,
                       reinterpret_cast<int32_t*>(sums), reinterpret_cast<void*>(stream));
      },
      "The sums of a weight's rows, int32.", py::arg("w"), py::arg("n"), py::arg("k"),
      py::arg("w_row"), py::arg("w_column"), py::arg("sums"), py::arg("device"), py::arg("stream"));
  m.def("weight_only_linear", &weight_only_call,
        "activation(x Wᵀ + bias) with W = (w - zero) * scale, as that of fastnn._cpu. Of 16 bits x "
        "wants groups of multiples of 32.",
        py::arg("x"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("x_row"), py::arg("dtype"),
        py::arg("w"), py::arg("w_row"), py::arg("format"), py::arg("scale"), py::arg("zero"),
        py::arg("groups"), py::arg("bias"), py::arg("bias_dtype"), py::arg("activation"),
        py::arg("out"), py::arg("batch_invariant"), py::arg("device"), py::arg("stream"));
}
