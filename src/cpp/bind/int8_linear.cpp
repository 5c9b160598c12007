// The int8 linear layer for Python, on pointers and on tensors (the short way: see tensors.cpp).
#include "quant/int8_linear.hpp"

#include "bind/tensors.hpp"
#include "common/activation.hpp"

namespace py = pybind11;
using namespace fastnn;
using namespace fastnn::tensors;

namespace {

void int8_linear_call(uintptr_t x, int64_t m, int64_t k, int64_t x_row, int64_t x_col, int dtype,
                      uintptr_t w, int64_t n, int64_t w_row, int64_t w_col, uintptr_t w_scale,
                      bool one_scale, uintptr_t bias, int bias_dtype, bool fixed, float x_scale,
                      int x_zero, int activation, uintptr_t packed, int64_t packed_bytes,
                      uintptr_t y) {
  const char* op = "int8_linear";
  Int8Linear c;
  if (m < 0 || n < 0 || k < 0) bad_argument(op, "m, n, k", "0 or more");
  c.type = dtype_argument(op, "dtype", dtype), c.bias_type = dtype_argument(op, "bias", bias_dtype);
  if (c.type > DType::f16 || c.type == DType::f64 || c.bias_type > DType::f16 ||
      c.bias_type == DType::f64)
    bad_argument(op, "dtype, bias_dtype", "float32, bfloat16 or float16");
  if (n && (!w_scale || (k && !w) || (m && !y) || (m && k && !x)))
    bad_argument(op, "x, w, w_scale, y", "addresses");
  if (activation < 0 || activation >= kActivations) bad_argument(op, "activation", "0 to 7");
  c.m = m, c.n = n, c.k = k;
  c.x = reinterpret_cast<const char*>(x), c.x_row = x_row, c.x_col = x_col;
  c.w = reinterpret_cast<const int8_t*>(w), c.w_row = w_row, c.w_col = w_col;
  c.packed = reinterpret_cast<const char*>(packed), c.packed_bytes = packed_bytes;
  c.w_scale = reinterpret_cast<const float*>(w_scale), c.one_scale = one_scale;
  c.bias = reinterpret_cast<const char*>(bias);
  c.activation = activation;
  c.fixed = fixed, c.x_scale = x_scale, c.x_zero = x_zero;
  c.y = reinterpret_cast<char*>(y), c.y_row = n;
  py::gil_scoped_release release;
  int8_linear(c);
}

bool small_float(const Tensor& t) { return t.type <= DType::f16 && t.type != DType::f64; }

// A number, or a tensor without dimensions.
bool read_scale(PyObject* object, float& value) {
  double number;
  if (PyFloat_CheckExact(object))
    number = PyFloat_AS_DOUBLE(object);
  else if (!read_number(object, number))
    return false;
  value = float(number);
  return true;
}
bool read_zero_point(PyObject* object, int32_t& value) {
  Tensor t;
  bool wide;
  int64_t number;
  if (PyLong_CheckExact(object)) {
    int overflow;
    number = PyLong_AsLongLongAndOverflow(object, &overflow);
    if (overflow) return false;
  } else if (read_integers(object, t, wide) && t.dims == 0) {
    number = wide ? *reinterpret_cast<const int64_t*>(t.data)
                  : *reinterpret_cast<const int32_t*>(t.data);
  } else {
    return false;
  }
  value = int32_t(number);
  return number == value;
}

// tensor_int8_linear(make, input, weight, weight_scale, bias, input_scale, input_zero_point,
// activation, packed). `make` allocates the result where it is large, of its shape and input.
PyObject* tensor_int8_linear(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor x, w, scale, bias, packed, out;
  Int8Linear c;
  if (n != 9 || !readable() || !read(args[1], x) || !small_float(x) || !read_bytes(args[2], w) ||
      w.type != DType::s8 || w.dims != 2 || w.shape[1] != x.size(-1) || !read(args[3], scale) ||
      scale.type != DType::f32 || scale.dims != 1 ||
      (scale.shape[0] != 1 && (scale.shape[0] != w.shape[0] || scale.strides[0] != 1)) ||
      !integer(args[7], kActivations - 1, c.activation))
    return not_taken();
  const bool has_bias = args[4] != Py_None;
  if (has_bias) {
    if (!read(args[4], bias) || !small_float(bias) || bias.dims != 1 ||
        bias.shape[0] != w.shape[0] || (bias.strides[0] != 1 && bias.shape[0] != 1))
      return not_taken();
    c.bias = bias.data, c.bias_type = bias.type;
  }
  c.fixed = args[5] != Py_None;
  if (c.fixed) {
    c.x_zero = 128;
    if (!read_scale(args[5], c.x_scale) ||
        (args[6] != Py_None && !read_zero_point(args[6], c.x_zero)))
      return not_taken();
  } else if (args[6] != Py_None) {
    return not_taken();
  }
  if (args[8] != Py_None) {
    if (!read_bytes(args[8], packed) || packed.type != DType::u8 || packed.dims != 1 ||
        (packed.strides[0] != 1 && packed.shape[0] != 1))
      return not_taken();
    c.packed = packed.data, c.packed_bytes = packed.shape[0];
  }
  if (!fold_rows(x, c.m, c.x_row) || !quiet()) return not_taken();
  if (wants_grad(args[1], args[3], has_bias ? args[4] : args[1]) || PyErr_Occurred())
    return not_taken();
  int64_t shape[kMaxDims];
  for (int d = 0; d < x.dims - 1; d++) shape[d] = x.shape[d];
  shape[x.dims - 1] = w.shape[0];
  PyObject* result = new_result(x, shape, x.dims, out);
  if (!result && !PyErr_Occurred()) {
    Held sizes{to_tuple(shape, x.dims)};
    if (sizes.object)
      result = PyObject_CallFunctionObjArgs(args[0], sizes.object, args[1], nullptr);
    if (result && !read(result, out, true)) Py_CLEAR(result);
  }
  if (!result) return not_taken();
  c.n = w.shape[0], c.k = w.shape[1];
  c.type = x.type, c.x = x.data, c.x_col = x.stride(-1);
  c.w = reinterpret_cast<const int8_t*>(w.data), c.w_row = w.strides[0], c.w_col = w.strides[1];
  c.w_scale = reinterpret_cast<const float*>(scale.data), c.one_scale = scale.shape[0] == 1;
  c.y = out.data, c.y_row = c.n;
  return run(result, double(c.m) * double(c.n) * double(c.k), [&] { int8_linear(c); });
}

PyMethodDef int8_linear_functions[] = {method("tensor_int8_linear", tensor_int8_linear,
                                              "A linear layer in int8; None where not taken."),
                                       {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_int8_linear(py::module_& m) {
  m.def(
      "int8_linear", &int8_linear_call,
      "y = activation(x_scale * w_scale * (q - x_zero) @ w.T + bias), q being x as uint8, by rows "
      "or, if `fixed`, by one scale and zero point.",
      py::arg("x"), py::arg("m"), py::arg("k"), py::arg("x_row"), py::arg("x_col"),
      py::arg("dtype"), py::arg("w"), py::arg("n"), py::arg("w_row"), py::arg("w_col"),
      py::arg("w_scale"), py::arg("one_scale"), py::arg("bias"), py::arg("bias_dtype"),
      py::arg("fixed"), py::arg("x_scale"), py::arg("x_zero"), py::arg("activation"),
      py::arg("packed"), py::arg("packed_bytes"), py::arg("y"));
  m.def("packed_int8_bytes", &packed_int8_bytes, py::arg("n"), py::arg("k"),
        "The bytes that pack_int8 fills on the active instruction set.");
  m.def(
      "pack_int8",
      [](uintptr_t w, int64_t n, int64_t k, int64_t w_row, int64_t w_col, uintptr_t to) {
        if (n < 0 || k < 0) bad_argument("pack_int8", "n, k", "0 or more");
        if (!to || (n && k && !w)) bad_argument("pack_int8", "w, to", "addresses");
        py::gil_scoped_release release;
        pack_int8(reinterpret_cast<const int8_t*>(w), n, k, w_row, w_col,
                  reinterpret_cast<char*>(to));
      },
      py::arg("w"), py::arg("n"), py::arg("k"), py::arg("w_row"), py::arg("w_col"), py::arg("to"));
  if (PyModule_AddFunctions(m.ptr(), int8_linear_functions) != 0) throw py::error_already_set();
}
