// The parts of the module for linear layers whose weight alone is quantized.
#pragma once
#include <pybind11/pybind11.h>

void bind_weight_only(pybind11::module_& m);
void bind_weight_only_tensors(pybind11::module_& m);
