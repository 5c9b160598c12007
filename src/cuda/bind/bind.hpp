// The parts of the module fastnn._cuda.
#pragma once
#include <pybind11/pybind11.h>

#include "bind/arguments.hpp"
#include "cuda/device.hpp"

void bind_attention(pybind11::module_& m);
void bind_batch_norm(pybind11::module_& m);
void bind_conv(pybind11::module_& m);
void bind_cross_entropy(pybind11::module_& m);
void bind_fake_quantize(pybind11::module_& m);
void bind_gemm(pybind11::module_& m);
void bind_int8_conv(pybind11::module_& m);
void bind_dropout(pybind11::module_& m);
void bind_elementwise(pybind11::module_& m);
void bind_embedding(pybind11::module_& m);
void bind_pool(pybind11::module_& m);
void bind_reduce(pybind11::module_& m);
void bind_norm(pybind11::module_& m);
void bind_quant_linear(pybind11::module_& m);
void bind_quantize(pybind11::module_& m);
void bind_softmax(pybind11::module_& m);
void bind_tree(pybind11::module_& m);
