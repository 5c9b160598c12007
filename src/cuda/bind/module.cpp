// The module fastnn._cuda: torch-free. Tensors arrive as pointers, shapes and strides, with the
// device and the stream that the caller works on. It is compiled a second time without CUDA, as
// _cuda_emulated, in which the CPU plays the device.
#include "cuda/bind/bind.hpp"

#ifdef FASTNN_CUDA_EMULATED
#include "cuda/host_emulation/block.hpp"
#endif

namespace py = pybind11;

#ifdef FASTNN_CUDA_EMULATED
PYBIND11_MODULE(_cuda_emulated, m) {
  m.def("set_seed", &fastnn::emulation::set_seed, py::arg("seed"),
        "The order in which warps and blocks run; 0: as they are numbered.");
  py::register_exception<fastnn::emulation::Fault>(m, "Fault", PyExc_RuntimeError);
#else
PYBIND11_MODULE(_cuda, m) {
#endif
  m.doc() = "fastnn's CUDA kernels, on raw pointers.";
  m.attr("emulated") = fastnn::cuda::emulated();
  m.def("devices", &fastnn::cuda::devices, "How many devices there are; 0 without a driver.");
  m.def("limit_capability", &fastnn::cuda::limit_capability, py::arg("most"),
        "Kernels are chosen as if the device's compute capability (10 times major plus minor) were "
        "at most this; returns what was the most before. The emulation begins with 80.");
  bind_attention(m);
  bind_batch_norm(m);
  bind_conv(m);
  bind_cross_entropy(m);
  bind_gemm(m);
  bind_int8_conv(m);
  bind_dropout(m);
  bind_elementwise(m);
  bind_embedding(m);
  bind_fake_quantize(m);
  bind_pool(m);
  bind_reduce(m);
  bind_norm(m);
  bind_quant_linear(m);
  bind_quantize(m);
  bind_softmax(m);
  bind_tree(m);
}
