// The short way of layer norm and rms norm: see tensors.cpp.
#include <memory>

#include "bind/tensors.hpp"
#include "norm/layer_norm.hpp"

namespace py = pybind11;
using namespace fastnn;
using namespace fastnn::tensors;

namespace {

// One number an element of a row, or None: all of them in the input's dtype, or, beside one of 16
// bits, all in float32.
class Columns {
 public:
  Columns(const Tensor& x, int dims) : x_(x), dims_(dims) {}
  bool take(PyObject* object, PerChannel& to) {
    to = {};
    if (object == Py_None) return true;
    Tensor t;
    if (!read(object, t) || t.dims != dims_ || !t.contiguous()) return false;
    for (int d = 0; d < dims_; d++)
      if (t.shape[d] != x_.shape[x_.dims - dims_ + d]) return false;
    const bool half = x_.type == DType::bf16 || x_.type == DType::f16;
    if (t.type != x_.type && !(half && t.type == DType::f32)) return false;
    if (taken_ && t.type != type_) return false;
    taken_ = true, type_ = t.type;
    to = {t.data, t.type, 1};
    return true;
  }

 private:
  const Tensor& x_;
  const int dims_;
  DType type_ = DType::f32;
  bool taken_ = false;
};

// How many of x's last dimensions a tuple or list names; 0 where it is not taken.
int row_dims_of(PyObject* shape, const Tensor& x) {
  const bool tuple = PyTuple_Check(shape);
  if (!tuple && !PyList_CheckExact(shape)) return 0;
  const Py_ssize_t n = tuple ? PyTuple_GET_SIZE(shape) : PyList_GET_SIZE(shape);
  if (n < 1 || n > x.dims) return 0;
  for (Py_ssize_t d = 0; d < n; d++) {
    PyObject* size = tuple ? PyTuple_GET_ITEM(shape, d) : PyList_GET_ITEM(shape, d);
    if (!PyLong_CheckExact(size) || PyLong_AsLongLong(size) != x.shape[x.dims - n + d]) {
      PyErr_Clear();
      return 0;
    }
  }
  return int(n);
}

// A contiguous result, made by `make` where it is large.
PyObject* new_contiguous(PyObject* make, const Tensor& x, Tensor& out) {
  if (x.count() * int64_t(dtype_size(x.type)) > kLargeBytes) return made_by(make, x, out);
  return new_result(x, x.shape, x.dims, out);
}

// tensor_row_norm(empty_contiguous, input, normalized_shape, weight, bias, eps, centered): the
// result, in a tuple where a gradient is wanted. eps: a number, or four, one for each dtype.
PyObject* tensor_row_norm(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor x, out;
  RowNormForward call;
  if (n != 7 || !readable() || !read(args[1], x) || !flag(args[6], call.centered))
    return not_taken();
  // rms norm's result is channels-last where its input is.
  if (!call.centered && !x.contiguous()) return not_taken();
  PyObject* eps = args[5];
  if (PyTuple_CheckExact(eps) && PyTuple_GET_SIZE(eps) == kNormFloatTypes)
    eps = PyTuple_GET_ITEM(eps, int(x.type));
  if (!PyFloat_CheckExact(eps)) return not_taken();
  call.eps = PyFloat_AS_DOUBLE(eps);
  if (!(call.row_dims = row_dims_of(args[2], x))) return not_taken();
  Columns columns(x, call.row_dims);
  if (!columns.take(args[3], call.weight) || !columns.take(args[4], call.bias) || !quiet())
    return not_taken();
  PyObject* none = args[1];
  const bool grad =
      wants_grad(args[1], args[3] == Py_None ? none : args[3], args[4] == Py_None ? none : args[4]);
  if (PyErr_Occurred()) return not_taken();
  PyObject* result = new_contiguous(args[0], x, out);
  if (!result) return not_taken();
  call.type = x.type, call.dims = x.dims, call.shape = x.shape;
  call.x = {x.data, x.strides};
  call.out = {out.data, out.strides};
  result = run(result, 4. * double(x.count()), [&] { row_norm(call); });
  return grad ? in_tuple(result) : result;
}

// tensor_row_norm_backward(empty_contiguous, grad, input, row_dims, weight, eps, centered,
// by_bias): the gradients of input, weight and bias, None where there is no such thing.
PyObject* tensor_row_norm_backward(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor grad, x, weight;
  RowNormBackward call;
  bool by_bias;
  if (n != 8 || !readable() || !read(args[1], grad) || !read(args[2], x) || grad.type != x.type ||
      grad.dims != x.dims || !x.contiguous() || !integer(args[3], x.dims, call.row_dims) ||
      call.row_dims < 1 || !PyFloat_CheckExact(args[5]) || !flag(args[6], call.centered) ||
      !flag(args[7], by_bias))
    return not_taken();
  for (int d = 0; d < x.dims; d++)
    if (grad.shape[d] != x.shape[d]) return not_taken();
  call.eps = PyFloat_AS_DOUBLE(args[5]);
  if (!Columns(x, call.row_dims).take(args[4], call.weight)) return not_taken();
  // What the bias's dtype is the weight tells.
  const bool by_weight = call.weight.data != nullptr;
  if ((by_bias && !by_weight) || (by_weight && !read(args[4], weight))) return not_taken();
  if (!quiet() || !grad_is_off()) return not_taken();

  const int64_t columns = by_weight ? weight.count() : 0;
  std::unique_ptr<double[]> sums;
  if (by_weight) {
    sums.reset(new (std::nothrow) double[size_t(2 * columns)]);
    if (!sums) return PyErr_NoMemory();
  }
  Tensor to_x, to_weight, to_bias;
  Held gradients[3];
  auto like_weight = [&](Tensor& out) {
    return new_result(weight, weight.shape, weight.dims, out);
  };
  if (!(gradients[0].object = new_contiguous(args[0], x, to_x)) ||
      (by_weight && !(gradients[1].object = like_weight(to_weight))) ||
      (by_bias && !(gradients[2].object = like_weight(to_bias))))
    return not_taken();
  call.type = x.type, call.dims = x.dims, call.shape = x.shape;
  call.grad = {grad.data, grad.strides};
  call.x = {x.data, x.strides};
  call.grad_x = {to_x.data, to_x.strides};
  call.grad_weight = sums.get();
  call.grad_bias = by_bias ? sums.get() + columns : nullptr;
  gradients[0].object = run(gradients[0].release(), 6. * double(x.count()), [&] {
    row_norm_backward(call);
    if (by_weight) narrow(call.grad_weight, columns, to_weight.data, to_weight.type);
    if (by_bias) narrow(call.grad_bias, columns, to_bias.data, to_bias.type);
  });
  if (!gradients[0].object) return nullptr;
  PyObject* all[3];
  for (int i = 0; i < 3; i++) all[i] = gradients[i].object ? gradients[i].object : Py_None;
  return PyTuple_Pack(3, all[0], all[1], all[2]);
}

PyMethodDef layer_norm_functions[] = {
    method("tensor_row_norm", tensor_row_norm,
           "Layer norm or rms norm; None where not taken, a tuple of it where a gradient is "
           "wanted."),
    method("tensor_row_norm_backward", tensor_row_norm_backward,
           "The gradients of input, weight and bias; None where not taken."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_layer_norm_tensors(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), layer_norm_functions) != 0) throw py::error_already_set();
}
