// The parts of the module fastnn._cpu.
#pragma once
#include <pybind11/pybind11.h>

#include "bind/arguments.hpp"

void bind_gemm(pybind11::module_& m);
void bind_dropout(pybind11::module_& m);
void bind_attention(pybind11::module_& m);
void bind_attention_tensors(pybind11::module_& m);
void bind_elementwise(pybind11::module_& m);
void bind_embedding(pybind11::module_& m);
void bind_embedding_tensors(pybind11::module_& m);
void bind_int8_linear(pybind11::module_& m);
void bind_pool(pybind11::module_& m);
void bind_norm(pybind11::module_& m);
void bind_layer_norm(pybind11::module_& m);
void bind_group_norm(pybind11::module_& m);
void bind_allocator(pybind11::module_& m);
void bind_conv(pybind11::module_& m);
void bind_tensors(pybind11::module_& m);
void bind_norm_tensors(pybind11::module_& m);
void bind_dropout_tensors(pybind11::module_& m);
void bind_layer_norm_tensors(pybind11::module_& m);
void bind_conv_tensors(pybind11::module_& m);
void bind_conv_chain(pybind11::module_& m);
void bind_watch(pybind11::module_& m);
void bind_quant(pybind11::module_& m);
void bind_pool_tensors(pybind11::module_& m);
void bind_softmax(pybind11::module_& m);
void bind_cross_entropy(pybind11::module_& m);
void bind_cross_entropy_tensors(pybind11::module_& m);
void bind_softmax_tensors(pybind11::module_& m);
