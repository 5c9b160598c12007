// The short way of embedding: see tensors.cpp.
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

PyMethodDef functions[] = {
    method("tensor_embedding", tensor_embedding,
           "Rows of a table; None where not taken, a tuple of it where a gradient is wanted."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_embedding_tensors(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), functions) != 0) throw py::error_already_set();
}
