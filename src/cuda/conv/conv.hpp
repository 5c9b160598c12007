// Convolution in up to three dimensions and its two gradients, on a GPU, of what the CPU's takes
// (conv/conv.hpp), but float64; what is kept of filters for other calls is not used.
#pragma once
#include <cstddef>
#include <functional>

#include "conv/conv.hpp"

namespace fastnn::cuda {

enum class Product { forward, input, weight };

// Gives so many bytes of the device's memory, at an address that 16 divides, until the kernels that
// are launched meanwhile have run.
using Allocate = std::function<void*(size_t)>;

// On the device that is current. Throws std::invalid_argument for what has no kernel,
// std::runtime_error where CUDA refuses.
void conv(Product which, const Conv& c, const Allocate& allocate, void* stream);

}  // namespace fastnn::cuda
