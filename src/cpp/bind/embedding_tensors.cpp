// The short ways of embedding and rotary position embedding: see tensors.cpp.
#include "bind/tensors.hpp"
#include "embedding/embedding.hpp"

namespace py = pybind11;
using namespace fastnn;
using namespace fastnn::tensors;

namespace {

PyObject* out_of_range() {
  PyErr_SetString(PyExc_IndexError, "index out of range in self");
  return nullptr;
}

// tensor_embedding(empty, input, weight): weight's rows; in a tuple where a gradient is wanted.
// empty(input, weight) makes a large result.
PyObject* tensor_embedding(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor weight, input, out;
  bool wide;
  if (n != 3 || !readable() || !read(args[2], weight) || weight.dims != 2 ||
      !read_integers(args[1], input, wide) || !input.contiguous() || input.dims >= kMaxDims ||
      !quiet())
    return not_taken();
  const bool grad = wants_grad(args[2]);
  if (PyErr_Occurred()) return not_taken();
  int64_t shape[kMaxDims];
  for (int d = 0; d < input.dims; d++) shape[d] = input.shape[d];
  shape[input.dims] = weight.shape[1];
  PyObject* result = new_result(weight, shape, input.dims + 1, out);
  if (!result && !PyErr_Occurred()) {
    result = PyObject_CallFunctionObjArgs(args[0], args[1], args[2], nullptr);
    if (result && !read(result, out, true)) Py_CLEAR(result);
  }
  if (!result) return not_taken();
  const Gather call{weight.type,
                    weight.data,
                    weight.shape[0],
                    weight.shape[1],
                    weight.strides[0],
                    weight.strides[1],
                    {input.data, wide, input.count()},
                    out.data};
  bool found = false;
  result = run(result, double(out.count()), [&] { found = gather(call); });
  if (result && !found) {
    Py_DECREF(result);
    return out_of_range();
  }
  return grad ? in_tuple(result) : result;
}

// tensor_embedding_backward(empty, grad, indices, rows, padding, by_frequency): the gradient of the
// weight. empty(grad, rows) makes a large result.
PyObject* tensor_embedding_backward(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor grad, indices, out;
  bool wide, by_frequency;
  if (n != 6 || !readable() || !read(args[1], grad) || !grad.contiguous() ||
      !read_integers(args[2], indices, wide) || !indices.contiguous() ||
      indices.dims + 1 != grad.dims || !PyLong_CheckExact(args[3]) || !PyLong_CheckExact(args[4]) ||
      !flag(args[5], by_frequency) || !quiet() || !grad_is_off())
    return not_taken();
  for (int d = 0; d < indices.dims; d++)
    if (indices.shape[d] != grad.shape[d]) return not_taken();
  const int64_t rows = PyLong_AsLongLong(args[3]), padding = PyLong_AsLongLong(args[4]);
  const int64_t columns = grad.size(-1), count = indices.count();
  if (PyErr_Occurred() || rows < 1 || rows > int64_t(UINT32_MAX) || count > int64_t(UINT32_MAX))
    return not_taken();
  const int64_t shape[2] = {rows, columns};
  PyObject* result = new_result(grad, shape, 2, out);
  if (!result && !PyErr_Occurred()) {
    result = PyObject_CallFunctionObjArgs(args[0], args[1], args[3], nullptr);
    if (result && !read(result, out, true)) Py_CLEAR(result);
  }
  if (!result) return not_taken();
  const ScatterAdd call{grad.type, grad.data, columns, {indices.data, wide, count},
                        rows,      columns,   padding, by_frequency,
                        out.data};
  bool found = false;
  result =
      run(result, double(rows + 2 * count) * double(columns), [&] { found = scatter_add(call); });
  if (result && !found) {
    Py_DECREF(result);
    return out_of_range();
  }
  return result;
}

// The strides of cos or sin along x's dimensions, the last of which is dense; see ops/rotary.py.
bool along(const Tensor& x, const Tensor& table, int64_t* strides) {
  const int last = x.dims - 1;
  const int64_t size = x.shape[last], width = table.size(-1);
  if (table.dims < 2 || (width != size && 2 * width != size) ||
      (width > 1 && table.stride(-1) != 1))
    return false;
  for (int d = 0; d < last; d++) strides[d] = 0;
  strides[last] = 1;
  auto set = [&](int d, int of) {
    if (table.shape[of] == x.shape[d])
      strides[d] = table.strides[of];
    else if (table.shape[of] != 1)
      return false;
    return true;
  };
  if (table.dims == 2) return set(last - 1, 0);
  if (table.dims == 3 && x.dims == 4) return set(0, 0) && set(2, 1);
  if (table.dims != x.dims) return false;
  for (int d = 0; d < last; d++)
    if (!set(d, d)) return false;
  return true;
}

// tensor_rotary(empty_like, x, cos, sin, interleaved, transposed): the result; in a tuple where a
// gradient of x is wanted.
PyObject* tensor_rotary(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor x, cos, sin, out;
  Rotary call;
  if (n != 6 || !readable() || !read(args[1], x) || x.dims < 2 || x.size(-1) % 2 ||
      x.stride(-1) != 1 || !read(args[2], cos) || !read(args[3], sin) || cos.type != sin.type ||
      cos.dims != sin.dims || !flag(args[4], call.interleaved) || !flag(args[5], call.transposed))
    return not_taken();
  if (cos.type != x.type && (cos.type != DType::f32 || x.type == DType::f64)) return not_taken();
  for (int d = 0; d < cos.dims; d++)
    if (cos.shape[d] != sin.shape[d]) return not_taken();
  int64_t cos_strides[kMaxDims], sin_strides[kMaxDims];
  if (!along(x, cos, cos_strides) || !along(x, sin, sin_strides) || !quiet()) return not_taken();
  const bool grad = wants_grad(args[1]);
  if (PyErr_Occurred() || wants_grad(args[2], args[3])) return not_taken();
  PyObject* result = x.contiguous() ? new_result(x, x.shape, x.dims, out) : nullptr;
  if (!result && !PyErr_Occurred()) result = made_by(args[0], x, out);
  if (!result || out.stride(-1) != 1) return not_taken(result);
  call.type = x.type, call.table_type = cos.type, call.dims = x.dims, call.shape = x.shape;
  call.x = x.data, call.x_strides = x.strides;
  call.out = out.data, call.out_strides = out.strides;
  call.cos = cos.data, call.cos_strides = cos_strides;
  call.sin = sin.data, call.sin_strides = sin_strides;
  call.paired = cos.size(-1) != x.size(-1);
  result = run(result, 3. * double(x.count()), [&] { rotary(call); });
  return grad ? in_tuple(result) : result;
}

PyMethodDef embedding_functions[] = {
    method("tensor_embedding", tensor_embedding,
           "Rows of a table; None where not taken, a tuple of it where a gradient is wanted."),
    method("tensor_embedding_backward", tensor_embedding_backward,
           "The gradient of the table; None where not taken."),
    method("tensor_rotary", tensor_rotary,
           "Pairs turned; None where not taken, a tuple of it where a gradient is wanted."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_embedding_tensors(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), embedding_functions) != 0) throw py::error_already_set();
}
