// Fake quantization's part of the module fastnn._cpu.
#pragma once
#include <pybind11/pybind11.h>

void bind_fake_quantize(pybind11::module_& m);
