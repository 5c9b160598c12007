// The short way of pooling: see tensors.cpp.
#include <algorithm>

#include "bind/pool_windows.hpp"

namespace py = pybind11;
using namespace fastnn;
using namespace fastnn::tensors;

namespace {

bool has_shape(const Tensor& t, const int64_t* shape, int dims) {
  return t.dims == dims && std::equal(shape, shape + dims, t.shape);
}

// tensor_pool(make, kind, dims, x, windows), of x (N, C, *spatial): the result, or, where a
// gradient is wanted, (result, codes or None, whether they are channels-last).
PyObject* tensor_pool(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor x, out, codes;
  Pool pool;
  int kind, dims;
  if (n != 5 || !readable() || !integer(args[1], kAverage, kind) ||
      !integer(args[2], kMostSpatial, dims) || !read(args[3], x) || x.dims != dims + 2 ||
      !pool.read(args[4], x.type, x.shape, x.dims) || !quiet())
    return not_taken();
  const bool grad = wants_grad(args[3]);
  if (PyErr_Occurred()) return not_taken();
  const bool last = pool.gives_channels_last(x, PoolKind(kind), grad);
  Held result{new_image(args[0], x, pool.shape, x.dims, last, x.type, out)}, found;
  if (!result.object) return not_taken();
  if (grad && kind == kMaximum) {
    found.object = new_image(args[0], x, pool.shape, x.dims, last, pool.code_type(), codes);
    if (!found.object) return not_taken();
    set(pool.call.codes, codes);
  }
  set(pool.call.x, x), set(pool.call.out, out);
  result.object = run(result.release(), pool.operations(),
                      [&] { kind == kMaximum ? max_pool(pool.call) : avg_pool(pool.call); });
  if (!grad || !result.object) return result.release();
  return PyTuple_Pack(3, result.object, found.object ? found.object : Py_None,
                      last ? Py_True : Py_False);
}

// tensor_pool_backward(make, kind, size, grad, codes, last, windows): the gradient of an input of
// shape `size`, channels-last or not, from what tensor_pool gave.
PyObject* tensor_pool_backward(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor grad, codes, out;
  Pool pool;
  int kind;
  bool last;
  int64_t size[kMaxDims];
  if (n != 7 || !readable() || !integer(args[1], kAverage, kind) || !PyTuple_Check(args[2]) ||
      !read(args[3], grad) || PyTuple_GET_SIZE(args[2]) != grad.dims || !flag(args[5], last))
    return not_taken();
  for (int d = 0; d < grad.dims; d++)
    if (!numbers(PyTuple_GET_ITEM(args[2], d), 1, 1, size + d)) return not_taken();
  if (!pool.read(args[6], grad.type, size, grad.dims) || !has_shape(grad, pool.shape, grad.dims))
    return not_taken();
  if (kind == kMaximum) {
    if (!read_codes(args[4], codes) || codes.type != pool.code_type() ||
        !has_shape(codes, pool.shape, grad.dims))
      return not_taken();
    set(pool.call.codes, codes);
  }
  if (!quiet() || !grad_is_off()) return not_taken();
  PyObject* result = new_image(args[0], grad, size, grad.dims, last, grad.type, out);
  if (!result) return not_taken();
  set(pool.call.x, out), set(pool.call.out, grad);
  return run(result, pool.operations(), [&] {
    kind == kMaximum ? max_pool_scatter(pool.call) : avg_pool_backward(pool.call);
  });
}

PyMethodDef pool_functions[] = {
    method("tensor_pool", tensor_pool,
           "Pooling; None where not taken, (result, codes, channels_last) where a gradient is "
           "wanted."),
    method("tensor_pool_backward", tensor_pool_backward,
           "The gradient of the input; None where not taken."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_pool_tensors(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), pool_functions) != 0) throw py::error_already_set();
}
