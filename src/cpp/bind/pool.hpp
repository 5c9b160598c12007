// What the bindings of maximum pooling of 8-bit images read of their arguments.
#pragma once
#include <pybind11/pybind11.h>

#include "pool/int8_max.hpp"

namespace fastnn {

// False where there is nothing to do.
bool int8_max_pool_arguments(Int8MaxPool& p, uintptr_t x, pybind11::handle shape, uintptr_t y,
                             pybind11::handle out, pybind11::handle kernel, pybind11::handle stride,
                             pybind11::handle padding);

}  // namespace fastnn
