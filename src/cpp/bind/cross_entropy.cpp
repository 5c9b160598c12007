// Cross entropy for Python.
#include "softmax/cross_entropy.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "bind/bind.hpp"
#include "norm/batch_norm.hpp"
#include "softmax/linear_cross_entropy.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Reduction reduction_argument(const char* op, int reduction) {
  if (reduction < 0 || reduction > 2)
    bad_argument(op, "reduction", "0 to 2, got " + std::to_string(reduction));
  return Reduction(reduction);
}

struct Arguments {
  const char* op;
  int64_t shape[kMaxSoftmaxDims], strides[3][kMaxSoftmaxDims];
  CrossEntropy call;

  // x and probabilities: (address, strides); the index an address; either of the two last may be
  // None.
  Arguments(const char* name, py::handle sizes, int dtype, py::handle x, py::handle probabilities,
            uintptr_t index, uintptr_t weight, int64_t ignore_index, double smoothing,
            int reduction)
      : op(name) {
    if (dtype < 0 || dtype >= kSoftmaxFloatTypes)
      bad_argument(op, "dtype", "a floating-point type (0 to 3), got " + std::to_string(dtype));
    call.type = DType(dtype), call.shape = shape;
    call.dims = read_tuple(op, "shape", sizes, shape, kMaxSoftmaxDims);
    if (call.dims < 2) bad_argument(op, "shape", "two dimensions or more");
    for (int d = 0; d < call.dims; d++)
      if (shape[d] < 1) bad_argument(op, "shape", "sizes of 1 or more");
    call.x = operand("x", x, strides[0]);
    if (!probabilities.is_none())
      call.probabilities = operand("probabilities", probabilities, strides[1]);
    else if (!index)
      bad_argument(op, "index", "an address, or probabilities");
    else
      call.index = pointer<const int64_t>(index);
    call.weight = pointer<const void>(weight);
    call.ignore_index = ignore_index, call.smoothing = smoothing;
    call.reduction = reduction_argument(op, reduction);
  }

  SoftmaxOperand operand(const char* name, py::handle given, int64_t* to) {
    if (!PyTuple_Check(given.ptr()) || PyTuple_GET_SIZE(given.ptr()) != 2)
      bad_argument(op, name, "an address and strides");
    const auto pair = py::reinterpret_borrow<py::tuple>(given);
    if (read_tuple(op, name, pair[1], to, kMaxSoftmaxDims) != call.dims)
      bad_argument(op, name, "as many strides as dimensions");
    auto* p = pointer<void>(pair[0].cast<uintptr_t>());
    if (!p) bad_argument(op, name, "an address");
    return {p, to};
  }
};

// `statistics`: lse and mass of each position, and the total.
void forward(py::handle shape, int dtype, py::handle x, py::handle probabilities, uintptr_t index,
             uintptr_t weight, int64_t ignore_index, double smoothing, int reduction, uintptr_t out,
             uintptr_t statistics) {
  const char* op = "cross_entropy";
  Arguments a(op, shape, dtype, x, probabilities, index, weight, ignore_index, smoothing,
              reduction);
  if (!out || !statistics) bad_argument(op, "out, statistics", "addresses");
  const int64_t n = a.call.positions();
  auto* lse = pointer<double>(statistics);
  py::gil_scoped_release release;
  std::vector<double> loss(static_cast<size_t>(n));
  lse[2 * n] = check_targets(a.call);
  cross_entropy(a.call, loss.data(), lse, lse + n);
  if (a.call.reduction == Reduction::none) {
    narrow(loss.data(), n, pointer<void>(out), a.call.type);
  } else {
    const double whole = reduce_losses(a.call, loss.data(), lse[2 * n]);
    narrow(&whole, 1, pointer<void>(out), a.call.type);
  }
}

// `grad`: one number in float64 a position, or one for all.
void backward(py::handle shape, int dtype, py::handle x, py::handle probabilities, uintptr_t index,
              uintptr_t weight, int64_t ignore_index, double smoothing, int reduction,
              uintptr_t statistics, uintptr_t grad, py::handle grad_x) {
  const char* op = "cross_entropy_backward";
  Arguments a(op, shape, dtype, x, probabilities, index, weight, ignore_index, smoothing,
              reduction);
  if (!grad || !statistics) bad_argument(op, "grad, statistics", "addresses");
  const SoftmaxOperand to = a.operand("grad_x", grad_x, a.strides[2]);
  const int64_t n = a.call.positions();
  const auto* lse = pointer<const double>(statistics);
  const auto* given = pointer<const double>(grad);
  py::gil_scoped_release release;
  if (a.call.reduction == Reduction::none) {
    cross_entropy_backward(a.call, lse, lse + n, given, to);
    return;
  }
  const double one = a.call.reduction == Reduction::mean ? *given / lse[2 * n] : *given;
  const std::vector<double> scale(static_cast<size_t>(n), one);
  cross_entropy_backward(a.call, lse, lse + n, scale.data(), to);
}

Matrix matrix_argument(const char* op, const char* name, py::handle given, DType type) {
  if (!PyTuple_Check(given.ptr()) || PyTuple_GET_SIZE(given.ptr()) != 2)
    bad_argument(op, name, "an address and strides");
  const auto pair = py::reinterpret_borrow<py::tuple>(given);
  int64_t strides[2];
  if (read_tuple(op, name, pair[1], strides, 2) != 2) bad_argument(op, name, "two strides");
  Matrix m;
  m.data = pointer<char>(pair[0].cast<uintptr_t>());
  if (!m.data) bad_argument(op, name, "an address");
  m.type = type, m.rs = strides[0], m.cs = strides[1];
  return m;
}

// Gives the total. `grad` is as in cross_entropy_backward, with 0 for no gradients.
double linear(py::handle shape, int dtype, py::handle x, py::handle weight, py::handle bias,
              uintptr_t index, uintptr_t class_weight, int64_t ignore_index, double smoothing,
              int reduction, int precision, bool batch_invariant, uintptr_t out, int out_dtype,
              uintptr_t grad, uintptr_t grad_x, uintptr_t grad_weight, uintptr_t grad_bias) {
  const char* op = "linear_cross_entropy";
  int64_t sizes[3];
  if (read_tuple(op, "shape", shape, sizes, 3) != 3)
    bad_argument(op, "shape", "rows, classes and features");
  for (int64_t n : sizes)
    if (n < 1) bad_argument(op, "shape", "sizes of 1 or more");
  if (dtype < 0 || dtype >= kSoftmaxFloatTypes)
    bad_argument(op, "dtype", "a floating-point type (0 to 3), got " + std::to_string(dtype));
  if (out_dtype < 0 || out_dtype >= kSoftmaxFloatTypes)
    bad_argument(op, "out_dtype",
                 "a floating-point type (0 to 3), got " + std::to_string(out_dtype));
  if (precision < 0 || precision > 2) bad_argument(op, "precision", "0 to 2");
  if (!index) bad_argument(op, "index", "an address");
  LinearCrossEntropy c;
  c.type = DType(dtype), c.rows = sizes[0], c.classes = sizes[1], c.features = sizes[2];
  c.x = matrix_argument(op, "x", x, c.type),
  c.weight = matrix_argument(op, "weight", weight, c.type);
  if (!bias.is_none()) {  // (address, stride)
    const auto pair = py::cast<std::pair<uintptr_t, int64_t>>(bias);
    c.bias = pointer<const char>(pair.first), c.bias_stride = pair.second;
  }
  c.index = pointer<const int64_t>(index), c.class_weight = pointer<const void>(class_weight);
  c.ignore_index = ignore_index, c.smoothing = smoothing;
  c.precision = Precision(precision), c.batch_invariant = batch_invariant;
  c.grad_x = pointer<void>(grad_x), c.grad_weight = pointer<void>(grad_weight);
  c.grad_bias = pointer<void>(grad_bias);
  const Reduction how = reduction_argument(op, reduction);

  py::gil_scoped_release release;
  const int64_t matrix[] = {c.rows, c.classes};
  CrossEntropy targets;
  targets.type = c.type, targets.dims = 2, targets.shape = matrix, targets.index = c.index;
  targets.weight = c.class_weight, targets.ignore_index = c.ignore_index, targets.reduction = how;
  const double total = check_targets(targets);
  std::vector<double> loss(static_cast<size_t>(c.rows)), scale;
  c.loss = loss.data();
  if (grad) {
    const auto* given = pointer<const double>(grad);
    c.scale = given;
    if (how != Reduction::none) {
      scale.assign(size_t(c.rows), how == Reduction::mean ? *given / total : *given);
      c.scale = scale.data();
    }
  }
  linear_cross_entropy(c);
  if (out) {
    const double whole = how == Reduction::none ? 0 : reduce_losses(targets, loss.data(), total);
    if (how == Reduction::none)
      narrow(loss.data(), c.rows, pointer<void>(out), DType(out_dtype));
    else
      narrow(&whole, 1, pointer<void>(out), DType(out_dtype));
  }
  return total;
}

}  // namespace

void bind_cross_entropy(py::module_& m) {
  m.def("cross_entropy", &forward,
        "Tensors are (address, strides), everything else addresses, 0 where there is none; "
        "IndexError "
        "for an index that is no class.",
        py::arg("shape"), py::arg("dtype"), py::arg("x"), py::arg("probabilities"),
        py::arg("index"), py::arg("weight"), py::arg("ignore_index"), py::arg("smoothing"),
        py::arg("reduction"), py::arg("out"), py::arg("statistics"));
  m.def("cross_entropy_backward", &backward, "Its gradient by the logits.", py::arg("shape"),
        py::arg("dtype"), py::arg("x"), py::arg("probabilities"), py::arg("index"),
        py::arg("weight"), py::arg("ignore_index"), py::arg("smoothing"), py::arg("reduction"),
        py::arg("statistics"), py::arg("grad"), py::arg("grad_x"));
  m.def("linear_cross_entropy", &linear,
        "Of x weightᵀ + bias, with the gradients that have an address; shape: rows, classes, "
        "features.",
        py::arg("shape"), py::arg("dtype"), py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("index"), py::arg("class_weight"), py::arg("ignore_index"), py::arg("smoothing"),
        py::arg("reduction"), py::arg("precision"), py::arg("batch_invariant"), py::arg("out"),
        py::arg("out_dtype"), py::arg("grad"), py::arg("grad_x"), py::arg("grad_weight"),
        py::arg("grad_bias"));
}
