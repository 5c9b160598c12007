// Maximum and average pooling and their gradients, on a GPU, of what the CPU's takes
// (pool/pool.hpp), but float64.
#pragma once
#include "pool/pool.hpp"

namespace fastnn::cuda {

// On the device that is current. Throws std::invalid_argument for windows that do not meet the
// input and for types that have no kernel, std::runtime_error where CUDA refuses.
void pool(PoolJob job, const PoolCall& call, void* stream);

}  // namespace fastnn::cuda
