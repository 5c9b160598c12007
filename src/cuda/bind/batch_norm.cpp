// Batch and group norm, for Python.
#include "cuda/norm/batch_norm.hpp"

#include "cuda/bind/bind.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

struct Call {
  cuda::NormCall norm;
  int64_t shape[cuda::kNormDims], strides[cuda::kNormOperands][cuda::kNormDims];

  // Operands are (address, strides) or None, in the order of NormCall.
  Call(const char* op, py::handle sizes, int dtype, int64_t groups, py::tuple operands) {
    norm.type = dtype_argument(op, "dtype", dtype);
    norm.dims = read_tuple(op, "shape", sizes, shape, cuda::kNormDims);
    if (norm.dims < 2) bad_argument(op, "shape", "2 dimensions or more");
    for (int d = 0; d < norm.dims; d++)
      if (shape[d] < 1) bad_argument(op, "shape", "sizes of 1 or more");
    if (groups < 0 || (groups > 0 && shape[1] % groups))
      bad_argument(op, "groups", "0, or a divisor of the channels, got " + std::to_string(groups));
    norm.shape = shape, norm.groups = groups;
    if (operands.size() > cuda::kNormOperands) bad_argument(op, "operands", "5 at most");
    for (size_t o = 0; o < operands.size(); o++) {
      const py::handle given = operands[o];
      if (given.is_none()) continue;
      if (!PyTuple_Check(given.ptr()) || PyTuple_GET_SIZE(given.ptr()) != 2)
        bad_argument(op, "operand", "(address, strides)");
      const auto pair = py::reinterpret_borrow<py::tuple>(given);
      if (read_tuple(op, "strides", pair[1], strides[o], cuda::kNormDims) != norm.dims)
        bad_argument(op, "strides", "as many as dimensions");
      norm.operands[o] = {reinterpret_cast<void*>(pair[0].cast<uintptr_t>()), strides[o]};
    }
  }
};

// (address, stride, dtype) or None.
cuda::PerChannel per_channel(const char* op, const char* name, py::handle given) {
  if (given.is_none()) return {};
  if (!PyTuple_Check(given.ptr()) || PyTuple_GET_SIZE(given.ptr()) != 3)
    bad_argument(op, name, "an address, a stride and a dtype");
  const auto triple = py::reinterpret_borrow<py::tuple>(given);
  const DType type = dtype_argument(op, name, triple[2].cast<int>());
  if (type != DType::f32 && type != DType::bf16 && type != DType::f16)
    bad_argument(op, name, "float32, bfloat16 or float16");
  return {reinterpret_cast<void*>(triple[0].cast<uintptr_t>()), type, triple[1].cast<int64_t>()};
}

void need(const char* op, const char* name, const void* p) {
  if (!p) bad_argument(op, name, "an address");
}

}  // namespace

void bind_batch_norm(py::module_& m) {
  m.def(
      "norm",
      [](py::handle shape, int dtype, int64_t groups, py::tuple operands, py::handle weight,
         py::handle bias, py::handle given_mean, py::handle given_var, uintptr_t mean,
         uintptr_t var, double eps, bool relu, const py::object& workspace, int device,
         uintptr_t stream) {
        const char* op = "norm";
        Call call(op, shape, dtype, groups, operands);
        auto& norm = call.norm;
        need(op, "x", norm.operands[0].data), need(op, "out", norm.operands[2].data);
        norm.weight = per_channel(op, "weight", weight);
        norm.bias = per_channel(op, "bias", bias);
        norm.given_mean = per_channel(op, "given_mean", given_mean);
        norm.given_var = per_channel(op, "given_var", given_var);
        if (!norm.given_mean.data != !norm.given_var.data || (norm.given_mean.data && groups))
          bad_argument(op, "given_mean, given_var", "both or neither, and no groups");
        norm.mean = reinterpret_cast<double*>(mean), norm.var = reinterpret_cast<double*>(var);
        need(op, "mean", norm.mean), need(op, "var", norm.var);
        norm.eps = eps, norm.relu = relu;
        if (const int64_t bytes = cuda::norm_workspace(norm))
          norm.workspace = reinterpret_cast<void*>(workspace(bytes).cast<uintptr_t>());
        py::gil_scoped_release release;
        cuda::OnDevice on(device);
        cuda::norm(norm, reinterpret_cast<void*>(stream));
      },
      py::arg("shape"), py::arg("dtype"), py::arg("groups"), py::arg("operands"), py::arg("weight"),
      py::arg("bias"), py::arg("given_mean"), py::arg("given_var"), py::arg("mean"), py::arg("var"),
      py::arg("eps"), py::arg("relu"), py::arg("workspace"), py::arg("device"), py::arg("stream"),
      "Batch norm, or group norm where there are groups, of (x, residual, out): (address, "
      "strides), "
      "or None. What is given for each channel is (address, stride, dtype), or None; mean and var "
      "are addresses of float64, and written. workspace(bytes) is the address of so much memory.");
  m.def(
      "norm_backward",
      [](py::handle shape, int dtype, int64_t groups, py::tuple operands, py::handle weight,
         uintptr_t mean, uintptr_t var, uintptr_t by_weight, uintptr_t by_bias, bool training,
         double eps, const py::object& workspace, int device, uintptr_t stream) {
        const char* op = "norm_backward";
        Call call(op, shape, dtype, groups, operands);
        auto& norm = call.norm;
        need(op, "grad", norm.operands[0].data), need(op, "x", norm.operands[1].data);
        need(op, "grad_x", norm.operands[3].data);
        norm.weight = per_channel(op, "weight", weight);
        norm.mean = reinterpret_cast<double*>(mean), norm.var = reinterpret_cast<double*>(var);
        norm.by_weight = reinterpret_cast<double*>(by_weight);
        norm.by_bias = reinterpret_cast<double*>(by_bias);
        need(op, "mean", norm.mean), need(op, "var", norm.var);
        need(op, "by_weight", norm.by_weight), need(op, "by_bias", norm.by_bias);
        norm.training = training, norm.eps = eps;
        if (const int64_t bytes = cuda::norm_backward_workspace(norm))
          norm.workspace = reinterpret_cast<void*>(workspace(bytes).cast<uintptr_t>());
        py::gil_scoped_release release;
        cuda::OnDevice on(device);
        cuda::norm_backward(norm, reinterpret_cast<void*>(stream));
      },
      py::arg("shape"), py::arg("dtype"), py::arg("groups"), py::arg("operands"), py::arg("weight"),
      py::arg("mean"), py::arg("var"), py::arg("by_weight"), py::arg("by_bias"),
      py::arg("training"), py::arg("eps"), py::arg("workspace"), py::arg("device"),
      py::arg("stream"),
      "As norm, of (grad, x, out, grad_x, grad_residual), out being None where no relu was; "
      "by_weight and by_bias are addresses of float64, and written.");
  m.def(
      "update_running",
      [](py::handle mean, py::handle var, int64_t channels, uintptr_t found_mean,
         uintptr_t found_var, double factor, double momentum, int device, uintptr_t stream) {
        const auto to_mean = per_channel("update_running", "mean", mean);
        const auto to_var = per_channel("update_running", "var", var);
        need("update_running", "mean", to_mean.data), need("update_running", "var", to_var.data);
        py::gil_scoped_release release;
        cuda::OnDevice on(device);
        cuda::update_running(to_mean, to_var, channels, reinterpret_cast<double*>(found_mean),
                             reinterpret_cast<double*>(found_var), factor, momentum,
                             reinterpret_cast<void*>(stream));
      },
      py::arg("mean"), py::arg("var"), py::arg("channels"), py::arg("found_mean"),
      py::arg("found_var"), py::arg("factor"), py::arg("momentum"), py::arg("device"),
      py::arg("stream"),
      "running = (1 - momentum) * running + momentum * found, of the variances times factor.");
}
