// Quantization on a GPU: as quant/quantize.hpp, but that nobody looks at the values of scales and
// zero points, for which the host would have to wait. What a bad scale makes of numbers is not
// specified.
#pragma once
#include "quant/quantize.hpp"

namespace fastnn::cuda {

// `seed`, on the device, is for stochastic rounding; null: to nearest.
void quantize(const Numbers& numbers, const float* scale, const int32_t* zero_point,
              const uint64_t* seed, void* stream);
void dequantize(const Numbers& numbers, const float* scale, const int32_t* zero_point,
                void* stream);
// zero_point is null where symmetric.
void choose_scale(const Numbers& numbers, float* scale, int32_t* zero_point, void* stream);
void quantize_dynamic(const Numbers& numbers, float* scale, int32_t* zero_point,
                      const uint64_t* seed, void* stream);

}  // namespace fastnn::cuda
