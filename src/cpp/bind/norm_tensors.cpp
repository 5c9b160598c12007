// The short way of batch norm: see tensors.cpp.
#include <memory>
#include <utility>

#include "bind/norm_tensors.hpp"

namespace py = pybind11;
using namespace fastnn;
using namespace fastnn::tensors;

namespace {

// tensor_batch_norm(empty_result, input, running_mean, running_var, weight, bias, residual,
// training, momentum, eps, relu): the result, or (result, mean, var) where a gradient is wanted. In
// training the running statistics are updated.
PyObject* tensor_batch_norm(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor x, residual, out;
  bool training, relu;
  double momentum, eps;
  if (n != 11 || !readable() || !read(args[1], x) || x.dims < 2 || !flag(args[7], training) ||
      !number(args[8], momentum) || !number(args[9], eps) || !flag(args[10], relu))
    return not_taken();
  PyObject *running_mean = args[2], *running_var = args[3];
  const bool running = running_mean != Py_None;
  const int64_t channels = x.shape[1], count = x.count() / channels;
  if (running != (running_var != Py_None) || (!training && !running)) return not_taken();
  if (training && (eps <= 0 || count == 1)) return not_taken();
  BatchNormForward call;
  PerChannel mean, var;
  Channels of(x);
  if (!of.take(running_mean, mean) || !of.take(running_var, var) ||
      !of.take(args[4], call.weight) || !of.take(args[5], call.bias))
    return not_taken();
  if (running && (requires_grad(running_mean) || requires_grad(running_var))) return not_taken();
  if (training && running && (channels > 1 && (mean.stride == 0 || var.stride == 0)))
    return not_taken();
  if (training && running && (!is_ordinary(running_mean) || !is_ordinary(running_var)))
    return not_taken();
  const bool added = args[6] != Py_None;
  if (added && (!read(args[6], residual) || !same_shape(residual, x))) return not_taken();
  if (!quiet()) return not_taken();
  PyObject* none = args[1];
  const bool grad = wants_grad(args[1], args[4] == Py_None ? none : args[4],
                               args[5] == Py_None ? none : args[5], added ? args[6] : none);
  if (PyErr_Occurred()) return not_taken();

  Held statistics[2];
  std::unique_ptr<double[]> memory;
  if (grad) {
    Tensor found[2];
    for (int i = 0; i < 2; i++)
      if (!(statistics[i].object = new_vector(x, channels, true, found[i]))) return not_taken();
    call.mean = reinterpret_cast<double*>(found[0].data);
    call.var = reinterpret_cast<double*>(found[1].data);
  } else {
    memory.reset(new (std::nothrow) double[size_t(2 * channels)]);
    if (!memory) return PyErr_NoMemory();
    call.mean = memory.get(), call.var = memory.get() + channels;
  }
  Held result{new_channels(args[0], x, out)};
  if (!result.object) return not_taken();
  call.type = x.type, call.dims = x.dims, call.shape = x.shape;
  call.x = {x.data, x.strides};
  if (added) call.residual = {residual.data, residual.strides};
  call.out = {out.data, out.strides};
  if (!training) call.given_mean = mean, call.given_var = var;
  call.eps = eps, call.relu = relu;
  result.object = run(result.release(), 4. * double(count * channels), [&] { batch_norm(call); });
  if (!result.object) return nullptr;
  if (training && running) {
    update_running(mean, channels, call.mean, 1, momentum);
    update_running(var, channels, call.var, double(count) / double(count - 1), momentum);
    if (!count_change({running_mean, running_var})) return nullptr;
  }
  if (!grad) return result.release();
  return PyTuple_Pack(3, result.object, statistics[0].object, statistics[1].object);
}

// tensor_batch_norm_backward(empty_result, grad, input, weight, mean, var, out, training, eps,
// by_bias, by_residual): the gradients of input, weight, bias and residual, None where there is no
// such thing. out: None, or the forward's where that ended in relu.
PyObject* tensor_batch_norm_backward(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor grad, x, weight, mean, var, out;
  BatchNormBackward call;
  bool by_bias, by_residual;
  if (n != 11 || !readable() || !read(args[1], grad) || !read(args[2], x) || x.dims < 2 ||
      !same_shape(grad, x) || !flag(args[7], call.training) || !number(args[8], call.eps) ||
      !flag(args[9], by_bias) || !flag(args[10], by_residual))
    return not_taken();
  const int64_t channels = x.shape[1];
  if (!Channels(x).take(args[3], call.weight)) return not_taken();
  // What the bias's dtype is the weight tells.
  const bool by_weight = call.weight.data != nullptr;
  if (by_bias && !by_weight) return not_taken();
  if (by_weight && !read(args[3], weight)) return not_taken();
  for (auto [object, tensor] : {std::pair(args[4], &mean), std::pair(args[5], &var)})
    if (!read(object, *tensor) || tensor->type != DType::f64 || tensor->dims != 1 ||
        tensor->shape[0] != channels || !tensor->contiguous())
      return not_taken();
  const bool relu = args[6] != Py_None;
  if (relu && (!read(args[6], out) || !same_shape(out, x))) return not_taken();
  if (!quiet() || !grad_is_off()) return not_taken();

  std::unique_ptr<double[]> sums(new (std::nothrow) double[size_t(2 * channels)]);
  if (!sums) return PyErr_NoMemory();
  Tensor to_x, to_residual, to_weight, to_bias;
  Held gradients[4];
  if (!(gradients[0].object = new_channels(args[0], x, to_x)) ||
      (by_weight && !(gradients[1].object = new_vector(weight, channels, false, to_weight))) ||
      (by_bias && !(gradients[2].object = new_vector(weight, channels, false, to_bias))) ||
      (by_residual && !(gradients[3].object = new_channels(args[0], x, to_residual))))
    return not_taken();
  call.type = x.type, call.dims = x.dims, call.shape = x.shape;
  call.grad = {grad.data, grad.strides};
  call.x = {x.data, x.strides};
  if (relu) call.out = {out.data, out.strides};
  call.grad_x = {to_x.data, to_x.strides};
  if (by_residual) call.grad_residual = {to_residual.data, to_residual.strides};
  call.mean = reinterpret_cast<const double*>(mean.data);
  call.var = reinterpret_cast<const double*>(var.data);
  call.grad_weight = sums.get(), call.grad_bias = sums.get() + channels;
  gradients[0].object = run(gradients[0].release(), 6. * double(x.count()), [&] {
    batch_norm_backward(call);
    if (by_weight) narrow(call.grad_weight, channels, to_weight.data, to_weight.type);
    if (by_bias) narrow(call.grad_bias, channels, to_bias.data, to_bias.type);
  });
  if (!gradients[0].object) return nullptr;
  PyObject* all[4];
  for (int i = 0; i < 4; i++) all[i] = gradients[i].object ? gradients[i].object : Py_None;
  return PyTuple_Pack(4, all[0], all[1], all[2], all[3]);
}

PyMethodDef norm_functions[] = {
    method("tensor_batch_norm", tensor_batch_norm,
           "Batch norm; None where not taken, (result, mean, var) where a gradient is wanted."),
    method("tensor_batch_norm_backward", tensor_batch_norm_backward,
           "The gradients of input, weight, bias and residual; None where not taken."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_norm_tensors(py::module_& m) {
  bind_group_norm_tensors(m);
  if (PyModule_AddFunctions(m.ptr(), norm_functions) != 0) throw py::error_already_set();
}
