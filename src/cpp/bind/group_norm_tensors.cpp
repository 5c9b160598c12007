// The short way of group norm and instance norm: see tensors.cpp.
#include <memory>
#include <utility>

#include "bind/norm_tensors.hpp"
#include "norm/group_norm.hpp"

namespace py = pybind11;
using namespace fastnn;
using namespace fastnn::tensors;

namespace {

// A divisor of the channels; None: as many as there are.
bool read_groups(PyObject* object, const Tensor& x, int64_t& groups) {
  groups = x.shape[1];
  if (object == Py_None) return true;
  if (!PyLong_CheckExact(object)) return false;
  int overflow;
  groups = PyLong_AsLongLongAndOverflow(object, &overflow);
  return !overflow && groups > 0 && x.shape[1] % groups == 0;
}

// tensor_group_norm(empty_result, input, groups, weight, bias, eps): the result, or (result, mean,
// var) where a gradient is wanted. Without groups it is instance norm.
PyObject* tensor_group_norm(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor x, out;
  GroupNormForward call;
  if (n != 6 || !readable() || !read(args[1], x) || x.dims < 2 ||
      !read_groups(args[2], x, call.groups) || !number(args[5], call.eps))
    return not_taken();
  const bool instance = args[2] == Py_None;
  const int64_t count = x.count(), statistics = x.shape[0] * call.groups;
  // The errors of one value a group are the long way's. Instance norm's result is contiguous.
  if (count == (instance ? statistics : call.groups) || (instance && !x.contiguous()))
    return not_taken();
  Channels of(x);
  if (!of.take(args[3], call.weight) || !of.take(args[4], call.bias) || !quiet())
    return not_taken();
  PyObject* none = args[1];
  const bool grad =
      wants_grad(args[1], args[3] == Py_None ? none : args[3], args[4] == Py_None ? none : args[4]);
  if (PyErr_Occurred()) return not_taken();

  Held kept[2];
  std::unique_ptr<double[]> memory;
  if (grad) {
    const int64_t shape[2] = {x.shape[0], call.groups};
    Tensor found[2];
    for (int i = 0; i < 2; i++)
      if (!(kept[i].object = new_result(x, shape, 2, DType::f64, found[i]))) return not_taken();
    call.mean = reinterpret_cast<double*>(found[0].data);
    call.var = reinterpret_cast<double*>(found[1].data);
  } else {
    memory.reset(new (std::nothrow) double[size_t(2 * statistics)]);
    if (!memory) return PyErr_NoMemory();
    call.mean = memory.get(), call.var = memory.get() + statistics;
  }
  Held result{new_channels(args[0], x, out)};
  if (!result.object) return not_taken();
  call.type = x.type, call.dims = x.dims, call.shape = x.shape;
  call.x = {x.data, x.strides}, call.out = {out.data, out.strides};
  result.object = run(result.release(), 4. * double(count), [&] { group_norm(call); });
  if (!grad || !result.object) return result.release();
  return PyTuple_Pack(3, result.object, kept[0].object, kept[1].object);
}

// tensor_group_norm_backward(empty_result, grad, input, groups, weight, mean, var, eps, by_bias):
// the gradients of input, weight and bias, None where there is no such thing.
PyObject* tensor_group_norm_backward(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor grad, x, weight, mean, var;
  GroupNormBackward call;
  bool by_bias;
  if (n != 9 || !readable() || !read(args[1], grad) || !read(args[2], x) || x.dims < 2 ||
      !same_shape(grad, x) || !read_groups(args[3], x, call.groups) || !number(args[7], call.eps) ||
      !flag(args[8], by_bias) || !Channels(x).take(args[4], call.weight))
    return not_taken();
  // What the bias's dtype is the weight tells.
  const bool by_weight = call.weight.data != nullptr;
  if ((by_bias && !by_weight) || (by_weight && !read(args[4], weight))) return not_taken();
  for (auto [object, tensor] : {std::pair(args[5], &mean), std::pair(args[6], &var)})
    if (!read(object, *tensor) || tensor->type != DType::f64 || tensor->dims != 2 ||
        tensor->shape[0] != x.shape[0] || tensor->shape[1] != call.groups || !tensor->contiguous())
      return not_taken();
  if (!quiet() || !grad_is_off()) return not_taken();

  const int64_t channels = x.shape[1];
  std::unique_ptr<double[]> sums(new (std::nothrow) double[size_t(2 * channels)]);
  if (!sums) return PyErr_NoMemory();
  Tensor to_x, to_weight, to_bias;
  Held gradients[3];
  if (!(gradients[0].object = new_channels(args[0], x, to_x)) ||
      (by_weight && !(gradients[1].object = new_vector(weight, channels, false, to_weight))) ||
      (by_bias && !(gradients[2].object = new_vector(weight, channels, false, to_bias))))
    return not_taken();
  call.type = x.type, call.dims = x.dims, call.shape = x.shape;
  call.grad = {grad.data, grad.strides};
  call.x = {x.data, x.strides};
  call.grad_x = {to_x.data, to_x.strides};
  call.mean = reinterpret_cast<const double*>(mean.data);
  call.var = reinterpret_cast<const double*>(var.data);
  call.grad_weight = sums.get(), call.grad_bias = sums.get() + channels;
  gradients[0].object = run(gradients[0].release(), 6. * double(x.count()), [&] {
    group_norm_backward(call);
    if (by_weight) narrow(call.grad_weight, channels, to_weight.data, to_weight.type);
    if (by_bias) narrow(call.grad_bias, channels, to_bias.data, to_bias.type);
  });
  if (!gradients[0].object) return nullptr;
  PyObject* all[3];
  for (int i = 0; i < 3; i++) all[i] = gradients[i].object ? gradients[i].object : Py_None;
  return PyTuple_Pack(3, all[0], all[1], all[2]);
}

PyMethodDef group_norm_functions[] = {
    method("tensor_group_norm", tensor_group_norm,
           "Group norm; None where not taken, (result, mean, var) where a gradient is wanted."),
    method("tensor_group_norm_backward", tensor_group_norm_backward,
           "The gradients of input, weight and bias; None where not taken."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_group_norm_tensors(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), group_norm_functions) != 0) throw py::error_already_set();
}
