// Group normalization for Python.
#include "norm/group_norm.hpp"

#include "bind/norm.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

int64_t groups_of(const NormArguments& a, int64_t groups) {
  if (a.dims >= kMaxNormDims) bad_argument(a.op, "shape", "fewer dimensions");
  if (groups < 1 || a.shape[1] % groups != 0)
    bad_argument(a.op, "groups", "a divisor of the channels, got " + std::to_string(groups));
  return groups;
}

void forward(py::handle shape, int dtype, int64_t groups, py::handle x, py::handle out,
             py::handle weight, py::handle bias, py::handle mean, py::handle var, double eps) {
  NormArguments a("group_norm", shape, dtype, 2);
  int64_t strides[2][kMaxNormDims];
  GroupNormForward call;
  call.type = a.type, call.dims = a.dims, call.shape = a.shape;
  call.groups = groups_of(a, groups);
  call.x = a.operand("x", x, strides[0]);
  call.out = a.operand("out", out, strides[1]);
  call.weight = a.per_channel("weight", weight);
  call.bias = a.per_channel("bias", bias);
  call.mean = static_cast<double*>(a.address("mean", mean));
  call.var = static_cast<double*>(a.address("var", var));
  call.eps = eps;
  py::gil_scoped_release release;
  group_norm(call);
}

void backward(py::handle shape, int dtype, int64_t groups, py::handle grad, py::handle x,
              py::handle grad_x, py::handle weight, py::handle mean, py::handle var,
              py::handle grad_weight, py::handle grad_bias, double eps) {
  NormArguments a("group_norm_backward", shape, dtype, 2);
  int64_t strides[3][kMaxNormDims];
  GroupNormBackward call;
  call.type = a.type, call.dims = a.dims, call.shape = a.shape;
  call.groups = groups_of(a, groups);
  call.grad = a.operand("grad", grad, strides[0]);
  call.x = a.operand("x", x, strides[1]);
  call.grad_x = a.operand("grad_x", grad_x, strides[2]);
  call.weight = a.per_channel("weight", weight);
  call.mean = static_cast<const double*>(a.address("mean", mean));
  call.var = static_cast<const double*>(a.address("var", var));
  call.grad_weight = static_cast<double*>(a.address("grad_weight", grad_weight));
  call.grad_bias = static_cast<double*>(a.address("grad_bias", grad_bias));
  call.eps = eps;
  py::gil_scoped_release release;
  group_norm_backward(call);
}

}  // namespace

void bind_group_norm(py::module_& m) {
  m.def("group_norm", &forward,
        "Tensors are (address, strides), what is given for each channel (address, stride, dtype) "
        "or None; mean and var are addresses of float64, (N, groups), and written.",
        py::arg("shape"), py::arg("dtype"), py::arg("groups"), py::arg("x"), py::arg("out"),
        py::arg("weight"), py::arg("bias"), py::arg("mean"), py::arg("var"), py::arg("eps"));
  m.def("group_norm_backward", &backward,
        "As group_norm; grad_weight and grad_bias are addresses of float64, (C), and written.",
        py::arg("shape"), py::arg("dtype"), py::arg("groups"), py::arg("grad"), py::arg("x"),
        py::arg("grad_x"), py::arg("weight"), py::arg("mean"), py::arg("var"),
        py::arg("grad_weight"), py::arg("grad_bias"), py::arg("eps"));
}
