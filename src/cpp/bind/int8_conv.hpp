// The convolution of 8-bit images, as the module has it.
#pragma once
#include <pybind11/pybind11.h>

void bind_int8_conv(pybind11::module_& m);
