// The short way of cross entropy with class indices: see tensors.cpp.
#include <vector>

#include "bind/tensors.hpp"
#include "norm/batch_norm.hpp"
#include "softmax/cross_entropy.hpp"

namespace py = pybind11;
using namespace fastnn;
using namespace fastnn::tensors;

namespace {

// What both directions are given: input, target, weight, ignore_index, reduction, smoothing.
class LossArguments {
 public:
  CrossEntropy call;
  Tensor x;
  int64_t positions;

  bool read_from(PyObject* const* args) {
    Tensor target, weight;
    bool wide;
    if (!read(args[0], x) || x.dims < 2 || !read_integers(args[1], target, wide) || !wide ||
        target.dims != x.dims - 1 || !target.contiguous() || target.shape[0] != x.shape[0])
      return false;
    for (int d = 1; d < target.dims; d++)
      if (target.shape[d] != x.shape[d + 1]) return false;
    if (args[2] != Py_None) {
      if ((x.type != DType::f32 && x.type != DType::f64) || !read(args[2], weight) ||
          weight.type != x.type || weight.dims != 1 || weight.shape[0] != x.shape[1] ||
          !weight.contiguous() || requires_grad(args[2]))
        return false;
      call.weight = weight.data;
    }
    if (!PyLong_CheckExact(args[3]) || !reduction(args[4]) || !PyFloat_CheckExact(args[5]))
      return false;
    int overflow;
    call.ignore_index = PyLong_AsLongLongAndOverflow(args[3], &overflow);
    call.smoothing = PyFloat_AS_DOUBLE(args[5]);
    if (overflow || !(call.smoothing >= 0 && call.smoothing <= 1)) return false;
    call.type = x.type, call.dims = x.dims, call.shape = x.shape;
    call.x = {x.data, x.strides};
    call.index = reinterpret_cast<const int64_t*>(target.data);
    positions = call.positions();
    return true;
  }

 private:
  bool reduction(PyObject* name) {
    if (!PyUnicode_CheckExact(name)) return false;
    const char* names[] = {"none", "mean", "sum"};
    for (int i = 0; i < 3; i++)
      if (PyUnicode_CompareWithASCIIString(name, names[i]) == 0) {
        call.reduction = Reduction(i);
        return true;
      }
    return false;
  }
};

// tensor_cross_entropy(input, target, weight, ignore_index, reduction, smoothing): the result, or
// (result, statistics) where a gradient is wanted.
PyObject* tensor_cross_entropy(PyObject*, PyObject* const* args, Py_ssize_t n) {
  LossArguments a;
  if (n != 6 || !readable() || !a.read_from(args) || !quiet()) return not_taken();
  const bool grad = wants_grad(args[0]);
  if (PyErr_Occurred()) return not_taken();
  const int64_t positions = a.positions;
  Tensor found;
  Held statistics{new_vector(a.x, 2 * positions + 1, true, found)};
  if (!statistics.object) return not_taken();
  auto* lse = reinterpret_cast<double*>(found.data);
  const bool whole = a.call.reduction != Reduction::none;
  int64_t shape[kMaxDims];
  for (int d = 0, k = 0; d < a.x.dims; d++)
    if (d != 1) shape[k++] = a.x.shape[d];
  Tensor out;
  char* data = nullptr;
  Held result{whole ? new_number(a.x, data) : new_result(a.x, shape, a.x.dims - 1, out)};
  if (!result.object) return not_taken();
  if (!whole) data = out.data;
  result.object = run(result.release(), 20. * double(a.x.count()), [&] {
    std::vector<double> loss(static_cast<size_t>(positions));
    lse[2 * positions] = check_targets(a.call);
    cross_entropy(a.call, loss.data(), lse, lse + positions);
    if (whole) loss[0] = reduce_losses(a.call, loss.data(), lse[2 * positions]);
    narrow(loss.data(), whole ? 1 : positions, data, a.x.type);
  });
  if (!result.object) return nullptr;
  return grad ? PyTuple_Pack(2, result.object, statistics.object) : result.release();
}

// tensor_cross_entropy_backward(grad, statistics, input, ...): by the input, of what was reduced.
PyObject* tensor_cross_entropy_backward(PyObject*, PyObject* const* args, Py_ssize_t n) {
  LossArguments a;
  Tensor statistics, out;
  double grad;
  if (n != 8 || !readable() || !a.read_from(args + 2) || a.call.reduction == Reduction::none ||
      !read(args[1], statistics) || statistics.type != DType::f64 || statistics.dims != 1 ||
      !statistics.contiguous() || statistics.shape[0] != 2 * a.positions + 1 ||
      !read_number(args[0], grad) || !quiet() || !grad_is_off())
    return not_taken();
  PyObject* result = new_result(a.x, a.x.shape, a.x.dims, out);
  if (!result) return not_taken();
  const auto* lse = reinterpret_cast<const double*>(statistics.data);
  if (a.call.reduction == Reduction::mean) grad /= lse[2 * a.positions];
  return run(result, 20. * double(a.x.count()), [&] {
    const std::vector<double> scale(static_cast<size_t>(a.positions), grad);
    cross_entropy_backward(a.call, lse, lse + a.positions, scale.data(), {out.data, out.strides});
  });
}

PyMethodDef cross_entropy_functions[] = {
    method("tensor_cross_entropy", tensor_cross_entropy,
           "Cross entropy; None where not taken, (result, statistics) where a gradient is wanted."),
    method("tensor_cross_entropy_backward", tensor_cross_entropy_backward,
           "Its gradient by the input; None where not taken."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_cross_entropy_tensors(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), cross_entropy_functions) != 0) throw py::error_already_set();
}
