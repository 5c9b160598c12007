// The short way of linear layers whose weight alone is quantized: see tensors.cpp.
#include "bind/tensors.hpp"
#include "bind/weight_only.hpp"
#include "common/activation.hpp"
#include "quant/weight_only.hpp"

namespace py = pybind11;
using namespace fastnn;
using namespace fastnn::tensors;

namespace {

// Dense, of shape (n) or (n, groups).
bool of_groups(const Tensor& t, int64_t n, int64_t groups, bool grouped) {
  return t.contiguous() && t.dims == (grouped ? 2 : 1) && t.shape[0] == n &&
         (!grouped || t.shape[1] == groups);
}

// tensor_weight_only(input, weight, scale, zero_point, bias, group_size or None, format,
// activation): the result, where no gradient is wanted. `format` is int8's, or four bits'.
PyObject* tensor_weight_only(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor x, weight, scale, zero, bias, out;
  int format, activation, size = 0;
  if (n != 8 || !readable() || !read(args[0], x) || x.type == DType::f64 || x.dims < 1 ||
      !read_bytes(args[1], weight) || weight.dims != 2 || !read(args[2], scale) ||
      scale.type != DType::f32 || !integer(args[6], int(WeightFormat::u4), format) ||
      !integer(args[7], kActivations - 1, activation))
    return not_taken();
  const bool grouped = args[5] != Py_None;
  if (grouped && (!PyLong_CheckExact(args[5]) || !integer(args[5], 1 << 30, size) || !size))
    return not_taken();
  WeightOnly c{};
  c.format = WeightFormat(format);
  c.type = x.type;
  c.n = weight.shape[0], c.k = x.size(-1), c.m = c.k ? x.count() / c.k : 0;
  c.groups = grouped ? c.k / size : 1;
  if ((weight.type == DType::u8) != is_nibble(c.format) || !x.contiguous() || c.k == 0 ||
      (grouped && c.k % size) || (is_nibble(c.format) && c.k % 2) ||
      weight.shape[1] != weight_bytes(c.format, c.k) ||
      (weight.strides[1] != 1 && weight.shape[1] != 1) || !of_groups(scale, c.n, c.groups, grouped))
    return not_taken();
  if (args[3] != Py_None) {
    if (!read_codes(args[3], zero) || zero.type != DType::s32 ||
        !of_groups(zero, c.n, c.groups, grouped))
      return not_taken();
    c.zero = reinterpret_cast<const int32_t*>(zero.data);
  }
  if (args[4] != Py_None) {
    if (!read(args[4], bias) || (bias.type != DType::f32 && bias.type != x.type) ||
        bias.dims != 1 || bias.shape[0] != c.n || !bias.contiguous())
      return not_taken();
    c.bias = bias.data, c.bias_type = bias.type;
  }
  const double operations = double(c.m) * double(c.n) * double(c.k);
  if (!precision_of(x.type, operations, c.precision) || !quiet() ||
      wants_grad(args[0], args[4] != Py_None ? args[4] : args[0]) || PyErr_Occurred())
    return not_taken();
  int64_t shape[kMaxDims];
  for (int d = 0; d < x.dims - 1; d++) shape[d] = x.shape[d];
  shape[x.dims - 1] = c.n;
  PyObject* result = new_result(x, shape, x.dims, out);
  if (!result) return not_taken();
  c.x = x.data, c.x_row = c.k;
  c.w = reinterpret_cast<const uint8_t*>(weight.data), c.w_row = weight.strides[0];
  c.scale = reinterpret_cast<const float*>(scale.data);
  c.activation = activation;
  c.out = out.data;
  return run(result, operations, [&] { weight_only(c); });
}

PyMethodDef weight_only_functions[] = {
    method("tensor_weight_only", tensor_weight_only,
           "A linear layer with a quantized weight; None where not taken."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_weight_only_tensors(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), weight_only_functions) != 0) throw py::error_already_set();
}
