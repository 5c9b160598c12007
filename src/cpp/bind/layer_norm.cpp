// Layer norm and rms norm for Python.
#include "norm/layer_norm.hpp"

#include "bind/norm.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

int row_dims_of(const NormArguments& a, int given) {
  if (given < 1 || given > a.dims)
    bad_argument(a.op, "row_dims", "1 to the number of dimensions, got " + std::to_string(given));
  return given;
}

void forward(py::handle shape, int dtype, int row_dims, py::handle x, py::handle out,
             py::handle weight, py::handle bias, double eps, bool centered) {
  NormArguments a("row_norm", shape, dtype, 1);
  int64_t strides[2][kMaxNormDims];
  RowNormForward call;
  call.type = a.type, call.dims = a.dims, call.shape = a.shape;
  call.row_dims = row_dims_of(a, row_dims);
  call.x = a.operand("x", x, strides[0]);
  call.out = a.operand("out", out, strides[1]);
  call.weight = a.per_channel("weight", weight);
  call.bias = a.per_channel("bias", bias);
  call.eps = eps, call.centered = centered;
  py::gil_scoped_release release;
  row_norm(call);
}

void backward(py::handle shape, int dtype, int row_dims, py::handle grad, py::handle x,
              py::handle grad_x, py::handle weight, py::handle grad_weight, py::handle grad_bias,
              double eps, bool centered) {
  NormArguments a("row_norm_backward", shape, dtype, 1);
  int64_t strides[3][kMaxNormDims];
  RowNormBackward call;
  call.type = a.type, call.dims = a.dims, call.shape = a.shape;
  call.row_dims = row_dims_of(a, row_dims);
  call.grad = a.operand("grad", grad, strides[0]);
  call.x = a.operand("x", x, strides[1]);
  call.grad_x = a.operand("grad_x", grad_x, strides[2]);
  call.weight = a.per_channel("weight", weight);
  auto sums = [&](const char* name, py::handle given) {
    return given.is_none() ? nullptr : static_cast<double*>(a.address(name, given));
  };
  call.grad_weight = sums("grad_weight", grad_weight);
  call.grad_bias = sums("grad_bias", grad_bias);
  call.eps = eps, call.centered = centered;
  py::gil_scoped_release release;
  row_norm_backward(call);
}

}  // namespace

void bind_layer_norm(py::module_& m) {
  m.def("row_norm", &forward,
        "Tensors are (address, strides), numbers for the columns (address, stride, dtype) or None.",
        py::arg("shape"), py::arg("dtype"), py::arg("row_dims"), py::arg("x"), py::arg("out"),
        py::arg("weight"), py::arg("bias"), py::arg("eps"), py::arg("centered"));
  m.def("row_norm_backward", &backward,
        "As row_norm; grad_weight and grad_bias are addresses of float64, which is written, or "
        "None.",
        py::arg("shape"), py::arg("dtype"), py::arg("row_dims"), py::arg("grad"), py::arg("x"),
        py::arg("grad_x"), py::arg("weight"), py::arg("grad_weight"), py::arg("grad_bias"),
        py::arg("eps"), py::arg("centered"));
}
