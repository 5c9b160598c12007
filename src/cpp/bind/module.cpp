// The module fastnn._cpu: torch-free. Tensors arrive as pointers, shapes and strides.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind/bind.hpp"
#include "bind/fake_quantize.hpp"
#include "bind/int8_conv.hpp"
#include "bind/tree.hpp"
#include "bind/weight_only.hpp"
#include "common/cpu_features.hpp"
#include "common/parallel.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_cpu, m) {
  m.doc() =
      "fastnn's CPU kernels, on raw pointers. Import torch first: its OpenMP runtime is used.";
  m.def(
      "isa", [] { return fastnn::isa_name(fastnn::active_isa()); }, "The instruction set in use.");
  m.def("available_isas", &fastnn::available_isas,
        "Instruction sets that this build and this CPU both have.");
  m.def("set_isa", &fastnn::set_isa, py::arg("name"),
        "Caps the instruction set. Raises ValueError for an unknown name.");
  m.def("assume_amx", &fastnn::assume_amx, py::arg("assumed"),
        "Whether this CPU counts as one with AMX though it is none: for tests that execute its "
        "instructions themselves.");
  m.def("cpu_features", [] {
    const fastnn::CpuFeatures& f = fastnn::cpu_features();
    py::dict d;
    d["avx2"] = f.avx2;
    d["avx512"] = f.avx512;
    d["avx512_bf16"] = f.avx512_bf16;
    d["avx512_vnni"] = f.avx512_vnni;
    d["amx_bf16"] = f.amx_bf16;
    d["amx_int8"] = f.amx_int8;
    return d;
  });
  m.def("max_threads", &fastnn::max_threads, "Threads of a parallel region started here.");
  bind_gemm(m);
  bind_dropout(m);
  bind_attention(m);
  bind_attention_tensors(m);
  bind_elementwise(m);
  bind_embedding(m);
  bind_embedding_tensors(m);
  bind_fake_quantize(m);
  bind_int8_linear(m);
  bind_pool(m);
  bind_norm(m);
  bind_layer_norm(m);
  bind_group_norm(m);
  bind_allocator(m);
  bind_conv(m);
  bind_int8_conv(m);
  bind_tensors(m);
  bind_norm_tensors(m);
  bind_dropout_tensors(m);
  bind_layer_norm_tensors(m);
  bind_conv_tensors(m);
  bind_conv_chain(m);
  bind_watch(m);
  bind_weight_only(m);
  bind_weight_only_tensors(m);
  bind_pool_tensors(m);
  bind_quant(m);
  bind_softmax(m);
  bind_cross_entropy(m);
  bind_cross_entropy_tensors(m);
  bind_softmax_tensors(m);
  bind_tree_predict(m);
  bind_tree_exact(m);
  bind_tree_hist(m);
}
