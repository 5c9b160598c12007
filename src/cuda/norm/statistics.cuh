// Mean and variance of elements that a group of threads holds: in float32, of any magnitude, and
// with a mean of any distance from 0.
#pragma once
#include "cuda/reduce/rows.cuh"

namespace fastnn::cuda {

// How many elements there are; a power of two by which their sum stays finite; 1 / (of * share).
struct Count {
  float of, share, unshare;
};

// In units of the power of two that the largest element is near to, so that squares stay in range,
// the mean is shift + off. `off` is what rounding left of it, without which a mean far from 0 would
// hide the deviations.
struct Moments {
  float scale, shift, off, var;
  __device__ float centered(float x) const { return fmaf(x, scale, -shift); }
  // From the sums of n centered elements and of their squares.
  __device__ void find(float first, float squares, float n, bool has_mean) {
    off = has_mean ? first / n : 0;
    var = (has_mean ? squares - first * off : squares) / n;
    if (var < 0) var = 0;  // of rounding; NaN stays
  }
  // In units of 1.
  __device__ double mean() const { return (double(shift) + double(off)) / double(scale); }
  __device__ double variance() const { return double(var) / double(scale) / double(scale); }
};

// The power of two that brings a number of this magnitude near 1.
__device__ __forceinline__ float unit_scale(float magnitude) {
  int exponent = int(__float_as_uint(magnitude) >> 23);
  exponent = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
  return __uint_as_float(unsigned(254 - exponent) << 23);
}

// visit(f) calls f(x) for each of this thread's elements.
template <class G, class Visit>
__device__ __forceinline__ Moments moments(G& group, const Count& count, float sqrt_eps,
                                           bool centered, Visit visit) {
  float sum = 0, largest = 0;
  visit([&](float x) { sum += x * count.share, largest = fmaxf(largest, fabsf(x)); });
  group.template reduce<Add, Largest>(sum, largest);
  Moments m;
  m.scale = unit_scale(fmaxf(largest, sqrt_eps));  // sqrt(eps) is as large where it decides
  m.shift = centered ? sum * count.unshare * m.scale : 0;
  float first = 0, squares = 0;
  visit([&](float x) {
    const float d = m.centered(x);
    first += d, squares += d * d;
  });
  group.template reduce<Add, Add>(first, squares);
  m.find(first, squares, count.of, centered);
  return m;
}

}  // namespace fastnn::cuda
