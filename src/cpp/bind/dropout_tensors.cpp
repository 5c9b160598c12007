// The short way of dropout: see tensors.cpp.
#include "bind/tensors.hpp"
#include "dropout/dropout.hpp"

namespace py = pybind11;
using namespace fastnn;
using namespace fastnn::tensors;

namespace {

// tensor_dropout(empty_like, input, seed, p): the result; in a tuple where a gradient is wanted.
PyObject* tensor_dropout(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor x, seed, out;
  bool wide;
  if (n != 4 || !readable() || !read(args[1], x) || !read_integers(args[2], seed, wide) || !wide ||
      seed.dims != 0 || !PyFloat_CheckExact(args[3]))
    return not_taken();
  const double p = PyFloat_AS_DOUBLE(args[3]);
  if (!(p >= 0 && p <= 1) || !quiet()) return not_taken();
  const bool grad = wants_grad(args[1]);
  if (PyErr_Occurred()) return not_taken();
  PyObject* result = x.contiguous() ? new_result(x, x.shape, x.dims, out) : nullptr;
  if (!result && !PyErr_Occurred()) result = made_by(args[0], x, out);
  if (!result) return not_taken();
  const Dropout call{
      x.type,    x.dims,   x.shape,     x.data,
      x.strides, out.data, out.strides, *reinterpret_cast<const uint64_t*>(seed.data),
      p};
  result = run(result, 20. * double(x.count()), [&] { dropout(call); });
  return grad ? in_tuple(result) : result;
}

PyMethodDef functions[] = {
    method("tensor_dropout", tensor_dropout,
           "Dropout; None where not taken, a tuple of it where a gradient is wanted."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_dropout_tensors(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), functions) != 0) throw py::error_already_set();
}
