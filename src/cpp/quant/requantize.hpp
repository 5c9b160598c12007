// How int32 sums of products of 8-bit integers become the elements of a result.
#pragma once
#include <cstdint>

#include "common/dtype.hpp"

namespace fastnn {

// Of column (output channel) j, in float32, each step rounded:
//
//   v = float(sum + start[j]) * scale[j] + shift[j] + (residual - residual_zero) * residual_scale
//
// kept between `low` and `high`. The result is v, or, where it has 8 bits, v rounded half to even
// plus `zero`, which the bounds keep within 8 bits; a NaN becomes `zero`.
struct Requantize {
  const int32_t* start = nullptr;  // what the zero point of the input adds to each sum
  const float* scale = nullptr;
  const float* shift = nullptr;
  float residual_scale = 0;
  int32_t residual_zero = 0;
  DType residual_type = DType::u8;  // or s8
  float low = 0, high = 0;
  int32_t zero = 0;
};

}  // namespace fastnn
