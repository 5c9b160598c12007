// Attention for Python, with the arguments of the CPU's, a device and a stream.
#include "cuda/attention/attention.hpp"
#include "cuda/attention/decode.hpp"
#include "cuda/attention/hopper.hpp"

#include "bind/attention_arguments.hpp"
#include "cuda/bind/bind.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

void forward(int dtype, py::handle shape, py::handle q, py::handle k, py::handle v, py::handle out,
             py::handle log_sum, double scale, py::handle mask, py::handle bounds,
             py::handle slopes, py::handle dropout, uintptr_t workspace, bool batch_invariant,
             int device, uintptr_t stream) {
  const AttentionArguments a{"attention"};
  AttentionForward call;
  a.common(call, dtype, shape, q, k, v, scale, mask, bounds, slopes, dropout);
  call.out = a.operand("out", out);
  if (!log_sum.is_none()) call.log_sum = a.address("log_sum", log_sum);
  if (!workspace && cuda::decode_workspace(call, batch_invariant))
    bad_argument("attention", "workspace", "what attention_workspace says");
  py::gil_scoped_release release;
  cuda::OnDevice on(device);
  cuda::attention(call, reinterpret_cast<float*>(workspace), batch_invariant,
                  reinterpret_cast<void*>(stream));
}

int64_t workspace(int dtype, py::handle shape, py::handle bounds, bool batch_invariant) {
  AttentionForward call;
  AttentionArguments{"attention_workspace"}.sizes(call, dtype, shape, bounds);
  return cuda::decode_workspace(call, batch_invariant);
}

void backward(int dtype, py::handle shape, py::handle q, py::handle k, py::handle v, py::handle out,
              py::handle log_sum, py::handle grad, py::handle grad_q, py::handle grad_k,
              py::handle grad_v, py::handle grad_scores, double scale, py::handle mask,
              py::handle bounds, py::handle slopes, py::handle dropout, py::handle workspace,
              int device, uintptr_t stream) {
  const AttentionArguments a{"attention_backward"};
  AttentionBackward call;
  a.common(call, dtype, shape, q, k, v, scale, mask, bounds, slopes, dropout);
  call.out = a.operand("out", out), call.grad = a.operand("grad", grad);
  call.log_sum = a.address("log_sum", log_sum);
  call.grad_q = a.operand("grad_q", grad_q), call.grad_k = a.operand("grad_k", grad_k);
  call.grad_v = a.operand("grad_v", grad_v);
  if (!grad_scores.is_none()) call.grad_scores = a.operand("grad_scores", grad_scores);
  auto* deltas = reinterpret_cast<float*>(a.address("workspace", workspace));
  py::gil_scoped_release release;
  cuda::OnDevice on(device);
  cuda::attention_backward(call, deltas, reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention", &forward, "As fastnn._cpu.attention, on a device and a stream.",
        py::arg("dtype"), py::arg("shape"), py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("out"), py::arg("log_sum"), py::arg("scale"), py::arg("mask"), py::arg("bounds"),
        py::arg("slopes"), py::arg("dropout"), py::arg("workspace"), py::arg("batch_invariant"),
        py::arg("device"), py::arg("stream"));
  m.def("attention_workspace", &workspace,
        "How many float32 of scratch memory attention without dropout wants.", py::arg("dtype"),
        py::arg("shape"), py::arg("bounds"), py::arg("batch_invariant"));
  m.def("attention_backward", &backward,
        "As fastnn._cpu.attention_backward; workspace: batch x heads x q_length float32.",
        py::arg("dtype"), py::arg("shape"), py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("out"), py::arg("log_sum"), py::arg("grad"), py::arg("grad_q"), py::arg("grad_k"),
        py::arg("grad_v"), py::arg("grad_scores"), py::arg("scale"), py::arg("mask"),
        py::arg("bounds"), py::arg("slopes"), py::arg("dropout"), py::arg("workspace"),
        py::arg("device"), py::arg("stream"));
  m.def("attentions_on_hopper", &cuda::attentions_on_hopper,
        "How many attentions the kernel of sm_90a has computed.");
}
