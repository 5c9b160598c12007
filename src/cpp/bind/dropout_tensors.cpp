// The short way of dropout: see tensors.cpp.
#include "bind/tensors.hpp"
#include "dropout/dropout.hpp"

namespace py = pybind11;
using namespace fastnn;
using namespace fastnn::tensors;

namespace {

// tensor_dropout(empty_like, input, seed, p): the result; where a gradient is wanted (result,
// seed). `seed` is a tensor, or a function that draws one, which is asked once the call is taken:
// what torch answers instead draws its own numbers alone.
PyObject* tensor_dropout(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor x, seed, out;
  bool wide;
  auto read_seed = [&](PyObject* object) {
    return read_integers(object, seed, wide) && wide && seed.dims == 0;
  };
  const bool draws = n == 4 && PyCallable_Check(args[2]);
  if (n != 4 || !readable() || !read(args[1], x) || !(draws || read_seed(args[2])) ||
      !PyFloat_CheckExact(args[3]))
    return not_taken();
  const double p = PyFloat_AS_DOUBLE(args[3]);
  if (!(p >= 0 && p <= 1) || !quiet()) return not_taken();
  const bool grad = wants_grad(args[1]);
  if (PyErr_Occurred()) return not_taken();
  Held result{x.contiguous() ? new_result(x, x.shape, x.dims, out) : nullptr};
  if (!result.object && !PyErr_Occurred()) result.object = made_by(args[0], x, out);
  if (!result.object) return not_taken();
  Held drawn{draws ? PyObject_CallNoArgs(args[2]) : Py_NewRef(args[2])};
  if (!drawn.object || (draws && !read_seed(drawn.object))) return not_taken();
  const Dropout call{
      x.type,    x.dims,   x.shape,     x.data,
      x.strides, out.data, out.strides, *reinterpret_cast<const uint64_t*>(seed.data),
      p};
  result.object = run(result.release(), 20. * double(x.count()), [&] { dropout(call); });
  if (!grad || !result.object) return result.release();
  return PyTuple_Pack(2, result.object, drawn.object);
}

PyMethodDef dropout_functions[] = {
    method("tensor_dropout", tensor_dropout,
           "Dropout; None where not taken, a tuple of it and its seed where a gradient is wanted."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_dropout_tensors(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), dropout_functions) != 0) throw py::error_already_set();
}
