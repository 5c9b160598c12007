// Linear layers whose weight alone is quantized, on a GPU; quant/weight_only.hpp has the call. The
// rows of x are dense.
#pragma once
#include "quant/weight_only.hpp"

namespace fastnn::cuda {

// Throws std::invalid_argument where x has 16 bits and groups are no multiples of 32.
void weight_only(const WeightOnly& call, void* stream);

}  // namespace fastnn::cuda
