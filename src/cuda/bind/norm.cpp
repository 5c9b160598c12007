// Norms of rows, for Python.
#include "cuda/bind/rows.hpp"
#include "cuda/norm/layer_norm.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

cuda::RowNorm arguments(const char* op, py::handle shape, int dtype,
                        std::initializer_list<py::handle> operands, uintptr_t weight,
                        uintptr_t bias, int parameter_dtype, double eps, bool centered) {
  cuda::RowNorm norm;
  const int dims = PyTuple_Check(shape.ptr()) ? int(PyTuple_GET_SIZE(shape.ptr())) : 0;
  norm.rows = rows_argument(op, shape, dims - 1, operands);
  norm.type = dtype_argument(op, "x", dtype);
  norm.parameter_type = dtype_argument(op, "weight", parameter_dtype);
  if ((weight || bias) && norm.parameter_type != norm.type && norm.parameter_type != DType::f32)
    bad_argument(op, "weight", "the dtype of x, or float32");
  norm.weight = reinterpret_cast<const void*>(weight);
  norm.bias = reinterpret_cast<const void*>(bias);
  norm.eps = eps, norm.centered = centered;
  return norm;
}

}  // namespace

void bind_norm(py::module_& m) {
  m.def("row_norm_workspace", &cuda::row_norm_workspace, py::arg("rows"), py::arg("n"),
        "How many float32 row_norm_backward needs for the gradients of weight and bias.");
  m.def(
      "row_norm",
      [](py::handle shape, int dtype, py::handle x, py::handle out, uintptr_t weight,
         uintptr_t bias, int parameter_dtype, double eps, bool centered, int device,
         uintptr_t stream) {
        const auto norm = arguments("row_norm", shape, dtype, {x, out}, weight, bias,
                                    parameter_dtype, eps, centered);
        py::gil_scoped_release release;
        cuda::OnDevice on(device);
        cuda::row_norm(norm, reinterpret_cast<void*>(stream));
      },
      py::arg("shape"), py::arg("dtype"), py::arg("x"), py::arg("out"), py::arg("weight"),
      py::arg("bias"), py::arg("parameter_dtype"), py::arg("eps"), py::arg("centered"),
      py::arg("device"), py::arg("stream"),
      "Layer norm (centered) or rms norm along the last dimension; operands are (address, "
      "strides), weight and bias addresses of neighbours, or 0.");
  m.def(
      "row_norm_backward",
      [](py::handle shape, int dtype, py::handle grad, py::handle x, py::handle grad_x,
         uintptr_t weight, int parameter_dtype, double eps, bool centered, uintptr_t by_weight,
         uintptr_t by_bias, uintptr_t workspace, int device, uintptr_t stream) {
        auto norm = arguments("row_norm_backward", shape, dtype, {grad, x, grad_x}, weight, 0,
                              parameter_dtype, eps, centered);
        if ((by_weight || by_bias) && !workspace)
          bad_argument("row_norm_backward", "workspace", "an address");
        norm.by_weight = reinterpret_cast<double*>(by_weight);
        norm.by_bias = reinterpret_cast<double*>(by_bias);
        norm.workspace = reinterpret_cast<float*>(workspace);
        py::gil_scoped_release release;
        cuda::OnDevice on(device);
        cuda::row_norm_backward(norm, reinterpret_cast<void*>(stream));
      },
      py::arg("shape"), py::arg("dtype"), py::arg("grad"), py::arg("x"), py::arg("grad_x"),
      py::arg("weight"), py::arg("parameter_dtype"), py::arg("eps"), py::arg("centered"),
      py::arg("by_weight"), py::arg("by_bias"), py::arg("workspace"), py::arg("device"),
      py::arg("stream"), "The gradients of x, and of weight and bias in float64.");
}
