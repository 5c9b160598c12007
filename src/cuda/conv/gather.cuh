// Which pixels of an image meet which taps of a filter, along each axis, and in what order.
#pragma once
#include "cuda/conv/pixels.hpp"
#include "cuda/device.cuh"

namespace fastnn::cuda {

// Position j of an axis meets, with tap i, pixel first + j * stride + i * step of the image; tap i
// is filter tap tap_first + i * tap_step, and position j is pixel out_first + j * out_step of the
// result.
struct Axis {
  int positions, stride, first, step, taps, tap_first, tap_step, out_first, out_step;
};

// The sizes of one axis of a convolution from x to y.
struct AxisSizes {
  int x, y, kernel, stride, padding, dilation;
};

// y from x.
__host__ __device__ inline Axis forward_axis(const AxisSizes& s) {
  return {s.y, s.stride, -s.padding, s.dilation, s.kernel, 0, 1, 0, 1};
}

// x from y, the gradient by the input: pixels of x whose index plus the padding leaves the same
// remainder to the stride meet the same taps, a distance of stride / gcd(stride, dilation) apart,
// and neighbours among them meet neighbouring pixels of y. `remainder`: of which this is.
// i + padding = o * stride + t * dilation.
__host__ __device__ inline Axis input_axis(const AxisSizes& s, int remainder) {
  int divisor = s.stride, other = s.dilation;  // the greatest common one
  while (other) {
    const int rest = divisor % other;
    divisor = other, other = rest;
  }
  const int period = s.stride / divisor;
  int tap = 0;  // the first
  while (tap < period && int64_t(tap) * s.dilation % s.stride != remainder) tap++;
  const int out = (remainder - s.padding % s.stride + s.stride) % s.stride;
  Axis a;
  a.out_first = out, a.out_step = s.stride;
  a.positions = out < s.x ? (s.x - 1 - out) / s.stride + 1 : 0;
  a.taps = tap < period && tap < s.kernel ? (s.kernel - 1 - tap) / period + 1 : 0;
  a.tap_first = tap, a.tap_step = period;
  a.first = a.taps ? int((int64_t(out) + s.padding - int64_t(tap) * s.dilation) / s.stride) : 0;
  a.step = -(s.dilation / divisor), a.stride = 1;
  return a;
}

// The axes of one of a gradient's phases, of which there are the product of the strides.
__host__ __device__ inline Axis phase_axis(const AxisSizes (&sizes)[kSpatial], int axis,
                                           int phase) {
  for (int d = kSpatial - 1; d > axis; d--) phase /= sizes[d].stride;
  return input_axis(sizes[axis], phase % sizes[axis].stride);
}

// A pixel's place in three axes, counted from the first.
struct Place {
  int image, at[kSpatial];
};

__host__ __device__ inline Place place_of(int index, int size0, int size1, int size2) {
  Place p;
  p.at[2] = index % size2, index /= size2;
  p.at[1] = index % size1, index /= size1;
  p.at[0] = index % size0, p.image = index / size0;
  return p;
}

// Where a thread is along K: a tap and a channel of it.
struct TapWalk {
  int channel, tap[kSpatial];

  __device__ __forceinline__ void begin(int k, const Axis* axes, int channels) {
    channel = k, tap[0] = tap[1] = tap[2] = 0;
    settle(axes, channels);
  }
  __device__ __forceinline__ void advance(int by, const Axis* axes, int channels) {
    channel += by;
    settle(axes, channels);
  }
  __device__ __forceinline__ bool exists(const Axis* axes) const { return tap[0] < axes[0].taps; }
  // From its first pixel or tap, along each axis so many elements a tap, to this one.
  __device__ __forceinline__ int64_t offset(const int64_t (&steps)[kSpatial]) const {
    return tap[0] * steps[0] + tap[1] * steps[1] + tap[2] * steps[2];
  }

 private:
  __device__ __forceinline__ void settle(const Axis* axes, int channels) {
    while (channel >= channels) {
      channel -= channels;
      if (++tap[2] == axes[2].taps) {
        tap[2] = 0;
        if (++tap[1] == axes[1].taps) tap[1] = 0, ++tap[0];
      }
    }
  }
};

}  // namespace fastnn::cuda
