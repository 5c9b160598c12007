// The short way of softmax: see tensors.cpp.
#include "bind/tensors.hpp"
#include "softmax/softmax.hpp"

namespace py = pybind11;
using namespace fastnn;
using namespace fastnn::tensors;

namespace {

// A dimension counted from either end.
bool dimension(PyObject* object, int dims, int& dim) {
  if (!PyLong_CheckExact(object)) return false;
  const long d = PyLong_AsLong(object);
  if (d == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  dim = int(d < 0 ? d + dims : d);
  return d >= -dims && d < dims;
}

// tensor_softmax(input, dim, log)
PyObject* tensor_softmax(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor x, out;
  SoftmaxCall call;
  if (n != 3 || !readable() || !read(args[0], x) || !dimension(args[1], x.dims, call.dim) ||
      !flag(args[2], call.log) || !quiet())
    return not_taken();
  const bool grad = wants_grad(args[0]);
  if (PyErr_Occurred()) return not_taken();
  PyObject* result = new_result(x, x.shape, x.dims, out);
  if (!result) return not_taken();
  call.type = x.type, call.dims = x.dims, call.shape = x.shape;
  result = run(result, 20. * double(x.count()),
               [&] { softmax(call, {x.data, x.strides}, {out.data, out.strides}); });
  return grad ? in_tuple(result) : result;
}

// tensor_softmax_backward(grad, saved, dim, log)
PyObject* tensor_softmax_backward(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor grad, saved, out;
  SoftmaxCall call;
  if (n != 4 || !readable() || !read(args[0], grad) || !read(args[1], saved) ||
      grad.type != saved.type || grad.dims != saved.dims ||
      !dimension(args[2], grad.dims, call.dim) || !flag(args[3], call.log) || !quiet() ||
      !grad_is_off())
    return not_taken();
  for (int d = 0; d < grad.dims; d++)
    if (grad.shape[d] != saved.shape[d]) return not_taken();
  PyObject* result = new_result(saved, saved.shape, saved.dims, out);
  if (!result) return not_taken();
  call.type = saved.type, call.dims = saved.dims, call.shape = saved.shape;
  return run(result, 10. * double(saved.count()), [&] {
    softmax_backward(call, {grad.data, grad.strides}, {saved.data, saved.strides},
                     {out.data, out.strides});
  });
}

PyMethodDef softmax_functions[] = {
    method("tensor_softmax", tensor_softmax,
           "softmax or log_softmax; None where not taken, a tuple of it where a gradient is "
           "wanted."),
    method("tensor_softmax_backward", tensor_softmax_backward,
           "Its gradient; None where not taken."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_softmax_tensors(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), softmax_functions) != 0) throw py::error_already_set();
}
