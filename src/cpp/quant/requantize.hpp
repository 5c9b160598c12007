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
  // Whether every v, before it is bounded, is a number within 31 bits. Saturation then bounds it.
  bool small = false;
};

// Whether it is, for `columns` columns and any sum and 8-bit residual.
inline bool has_small_results(const Requantize& q, int64_t columns) {
  constexpr float most = 1 << 29;  // of each of the three summands; a NaN is no less
  int large = !(q.residual_scale <= most / 512 && q.residual_scale >= -most / 512);
  for (int64_t j = 0; j < columns; j++)
    large |=
        !(q.scale[j] <= 0.25f && q.scale[j] >= -0.25f && q.shift[j] <= most && q.shift[j] >= -most);
  return !large;
}

}  // namespace fastnn
