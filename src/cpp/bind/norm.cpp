// Batch normalization for Python.
#include <pybind11/pybind11.h>

#include "bind/norm.hpp"
#include "norm/batch_norm.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

void forward(py::handle shape, int dtype, py::handle x, py::handle residual, py::handle out,
             py::handle weight, py::handle bias, py::handle given_mean, py::handle given_var,
             py::handle mean, py::handle var, double eps, bool relu) {
  NormArguments a("batch_norm", shape, dtype, 2);
  int64_t strides[3][kMaxNormDims];
  BatchNormForward call;
  call.type = a.type, call.dims = a.dims, call.shape = a.shape;
  call.x = a.operand("x", x, strides[0]);
  call.residual = a.operand("residual", residual, strides[1], true);
  call.out = a.operand("out", out, strides[2]);
  call.weight = a.per_channel("weight", weight);
  call.bias = a.per_channel("bias", bias);
  call.given_mean = a.per_channel("given_mean", given_mean);
  call.given_var = a.per_channel("given_var", given_var);
  if (!call.given_mean.data != !call.given_var.data)
    bad_argument(a.op, "given_mean, given_var", "both or neither");
  call.mean = static_cast<double*>(a.address("mean", mean));
  call.var = static_cast<double*>(a.address("var", var));
  call.eps = eps, call.relu = relu;
  py::gil_scoped_release release;
  batch_norm(call);
}

void backward(py::handle shape, int dtype, py::handle grad, py::handle x, py::handle out,
              py::handle grad_x, py::handle grad_residual, py::handle weight, py::handle mean,
              py::handle var, py::handle grad_weight, py::handle grad_bias, bool training,
              double eps) {
  NormArguments a("batch_norm_backward", shape, dtype, 2);
  int64_t strides[5][kMaxNormDims];
  BatchNormBackward call;
  call.type = a.type, call.dims = a.dims, call.shape = a.shape;
  call.grad = a.operand("grad", grad, strides[0]);
  call.x = a.operand("x", x, strides[1]);
  call.out = a.operand("out", out, strides[2], true);
  call.grad_x = a.operand("grad_x", grad_x, strides[3]);
  call.grad_residual = a.operand("grad_residual", grad_residual, strides[4], true);
  call.weight = a.per_channel("weight", weight);
  call.mean = static_cast<const double*>(a.address("mean", mean));
  call.var = static_cast<const double*>(a.address("var", var));
  call.grad_weight = static_cast<double*>(a.address("grad_weight", grad_weight));
  call.grad_bias = static_cast<double*>(a.address("grad_bias", grad_bias));
  call.training = training, call.eps = eps;
  py::gil_scoped_release release;
  batch_norm_backward(call);
}

}  // namespace

void bind_norm(py::module_& m) {
  m.def("batch_norm", &forward,
        "Tensors are (address, strides), what is given for each channel (address, stride, dtype), "
        "or None; mean and var are addresses of float64, and written.",
        py::arg("shape"), py::arg("dtype"), py::arg("x"), py::arg("residual"), py::arg("out"),
        py::arg("weight"), py::arg("bias"), py::arg("given_mean"), py::arg("given_var"),
        py::arg("mean"), py::arg("var"), py::arg("eps"), py::arg("relu"));
  m.def("batch_norm_backward", &backward,
        "As batch_norm; grad_weight and grad_bias are addresses of float64, and written.",
        py::arg("shape"), py::arg("dtype"), py::arg("grad"), py::arg("x"), py::arg("out"),
        py::arg("grad_x"), py::arg("grad_residual"), py::arg("weight"), py::arg("mean"),
        py::arg("var"), py::arg("grad_weight"), py::arg("grad_bias"), py::arg("training"),
        py::arg("eps"));
}
