// From statistics and sums to what a pass multiplies and adds.
#pragma once
#include "cuda/device.cuh"
#include "cuda/norm/passes.cuh"

namespace fastnn::cuda {

__device__ inline float read(const PerChannel& given, int64_t c, float missing) {
  if (!given.data) return missing;
  const int64_t i = c * given.stride;
  if (given.type == DType::f32) return static_cast<const float*>(given.data)[i];
  if (given.type == DType::bf16) return to_float(static_cast<const __nv_bfloat16*>(given.data)[i]);
  return to_float(static_cast<const __half*>(given.data)[i]);
}

__device__ inline void write(const PerChannel& to, int64_t c, float x) {
  const int64_t i = c * to.stride;
  if (to.type == DType::f32)
    static_cast<float*>(to.data)[i] = x;
  else if (to.type == DType::bf16)
    static_cast<__nv_bfloat16*>(to.data)[i] = from_float<__nv_bfloat16>(x);
  else
    static_cast<__half*>(to.data)[i] = from_float<__half>(x);
}

__device__ inline double inverse_deviation(double var, double eps) { return 1 / sqrt(var + eps); }

// (x - mean) where the mean is rounded: the rest of it goes into another term.
__device__ inline double rest_of(double mean, float center) {  // 0 where that is not finite
  return mean - mean == 0 ? mean - double(center) : 0;
}

__device__ inline Coefficients forward_coefficients(double mean, double inverse, float weight,
                                                    float bias) {
  Coefficients c;
  const double scale = double(weight) * inverse;
  c.center = float(mean), c.scale = float(scale), c.by_x = 0;
  c.shift = scale - scale == 0 ? float(double(bias) - rest_of(mean, c.center) * scale) : bias;
  return c;
}

// sum and along: of weight * grad and of weight * grad * x^, of all that the statistics are of,
// each divided by its number.
__device__ inline Coefficients backward_coefficients(double mean, double inverse, float weight,
                                                     double sum, double along) {
  Coefficients c;
  const double by_x = -inverse * inverse * along;
  c.center = float(mean), c.scale = float(double(weight) * inverse), c.by_x = float(by_x);
  c.shift = float(-inverse * sum - by_x * rest_of(mean, c.center));
  return c;
}

__device__ inline float relu_of(float x) { return x <= 0 ? 0 : x; }  // NaN stays

}  // namespace fastnn::cuda
