// What the convolution of 8-bit images needs of one instruction set besides a matrix product.
#pragma once
#include <cstdint>

#include "quant/requantize.hpp"

namespace fastnn {

// Depthwise, channels side by side, in int32:
//   out[p * out_step + c] = q of the sum over t of w[t * channels + c] x[p * taps + t][c]
// `type`: of out, float32, bfloat16 or 8 bits; the residual, null or 8 bits, is out_step apart too.
using Int8DepthwiseFn = void (*)(const uint8_t* const* x, const int32_t* w, int taps,
                                 int64_t positions, int64_t channels, const Requantize& q,
                                 DType type, char* out, int64_t out_step, const char* residual);
Int8DepthwiseFn portable_int8_depthwise();
Int8DepthwiseFn avx2_int8_depthwise();
Int8DepthwiseFn avx512_int8_depthwise();

}  // namespace fastnn
