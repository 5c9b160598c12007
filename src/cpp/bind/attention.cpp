// Attention for Python.
#include "attention/attention.hpp"

#include <pybind11/pybind11.h>

#include "bind/attention_arguments.hpp"
#include "bind/bind.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

void forward(int dtype, py::handle shape, py::handle q, py::handle k, py::handle v, py::handle out,
             py::handle log_sum, double scale, py::handle mask, py::handle bounds,
             py::handle slopes, py::handle dropout) {
  const AttentionArguments a{"attention"};
  AttentionForward call;
  a.common(call, dtype, shape, q, k, v, scale, mask, bounds, slopes, dropout);
  call.out = a.operand("out", out);
  if (!log_sum.is_none()) call.log_sum = a.address("log_sum", log_sum);
  py::gil_scoped_release release;
  attention(call);
}

void backward(int dtype, py::handle shape, py::handle q, py::handle k, py::handle v, py::handle out,
              py::handle log_sum, py::handle grad, py::handle grad_q, py::handle grad_k,
              py::handle grad_v, py::handle grad_scores, double scale, py::handle mask,
              py::handle bounds, py::handle slopes, py::handle dropout, bool batch_invariant) {
  const AttentionArguments a{"attention_backward"};
  AttentionBackward call;
  a.common(call, dtype, shape, q, k, v, scale, mask, bounds, slopes, dropout);
  call.out = a.operand("out", out), call.grad = a.operand("grad", grad);
  call.log_sum = a.address("log_sum", log_sum);
  call.grad_q = a.operand("grad_q", grad_q), call.grad_k = a.operand("grad_k", grad_k);
  call.grad_v = a.operand("grad_v", grad_v);
  if (!grad_scores.is_none()) call.grad_scores = a.operand("grad_scores", grad_scores);
  call.batch_invariant = batch_invariant;
  py::gil_scoped_release release;
  attention_backward(call);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention", &forward,
        "shape: batch, heads, kv_heads, q_length, k_length, head_size, value_size. Tensors are "
        "(address, four strides); mask is None or (address, strides, dtype), slopes None or "
        "(address, batch stride, head stride, shift), dropout None or (probability, address of the "
        "seed), bounds "
        "(low, high) with None for none; log_sum is an address or None.",
        py::arg("dtype"), py::arg("shape"), py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("out"), py::arg("log_sum"), py::arg("scale"), py::arg("mask"), py::arg("bounds"),
        py::arg("slopes"), py::arg("dropout"));
  m.def("attention_backward", &backward,
        "As attention; grad_scores is None or (address, strides) of float32 (float64 for that).",
        py::arg("dtype"), py::arg("shape"), py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("out"), py::arg("log_sum"), py::arg("grad"), py::arg("grad_q"), py::arg("grad_k"),
        py::arg("grad_v"), py::arg("grad_scores"), py::arg("scale"), py::arg("mask"),
        py::arg("bounds"), py::arg("slopes"), py::arg("dropout"),
        py::arg("batch_invariant") = false);
  m.def("attention_path",
        [](int dtype) { return attention_path(dtype_argument("attention_path", "dtype", dtype)); });
}
