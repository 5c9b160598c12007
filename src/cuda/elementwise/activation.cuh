// The activations and their derivatives, in float32.
#pragma once
#include "common/activation.hpp"
#include "cuda/device.cuh"

namespace fastnn::cuda {

constexpr float kSqrtHalf = 0.70710678118654752f, kSqrtTwoOverPi = 0.79788456080286536f;
constexpr float kOneOverSqrtTwoPi = 0.39894228040143268f, kGeluCubic = 0.044715f;

__device__ inline float activate(int kind, float x) {
  switch (kind) {
    case kRelu:
      return x > 0 || x != x ? x : 0;
    case kRelu6:
      return x != x ? x : fminf(fmaxf(x, 0), 6);
    case kGelu:
      return 0.5f * x * (1 + erff(x * kSqrtHalf));
    case kGeluTanh:
      return 0.5f * x * (1 + tanhf(kSqrtTwoOverPi * (x + kGeluCubic * x * x * x)));
    case kSilu:
      return x / (1 + expf(-x));
    case kSigmoid:
      return 1 / (1 + expf(-x));
    case kTanh:
      return tanhf(x);
    default:
      return x;
  }
}

template <int kind, int n>
__device__ __forceinline__ void activate_all_as(float (&x)[n]) {
#pragma unroll
  for (int e = 0; e < n; e++) x[e] = activate(kind, x[e]);
}
// The kind is looked at once for all of them.
template <int n>
__device__ __forceinline__ void activate_all(int kind, float (&x)[n]) {
  switch (kind) {
    case kRelu:
      return activate_all_as<kRelu>(x);
    case kRelu6:
      return activate_all_as<kRelu6>(x);
    case kGelu:
      return activate_all_as<kGelu>(x);
    case kGeluTanh:
      return activate_all_as<kGeluTanh>(x);
    case kSilu:
      return activate_all_as<kSilu>(x);
    case kSigmoid:
      return activate_all_as<kSigmoid>(x);
    case kTanh:
      return activate_all_as<kTanh>(x);
    default:
      return;
  }
}

// gradient times the derivative, from the output for the kinds of saves_output(), else from the
// input.
__device__ inline float activate_backward(int kind, float gradient, float saved) {
  switch (kind) {
    case kRelu:
      return saved > 0 || saved != saved ? gradient : 0;
    case kRelu6:
      return (saved > 0 && saved < 6) || saved != saved ? gradient : 0;
    case kSigmoid:
      return gradient * (saved * (1 - saved));
    case kTanh:
      return gradient * (1 - saved * saved);
    case kGelu:
      return gradient * (0.5f * (1 + erff(saved * kSqrtHalf)) +
                         saved * kOneOverSqrtTwoPi * expf(-0.5f * saved * saved));
    case kGeluTanh: {
      const float inner = kSqrtTwoOverPi * (saved + kGeluCubic * saved * saved * saved),
                  t = tanhf(inner);
      const float slope = kSqrtTwoOverPi * (1 + 3 * kGeluCubic * saved * saved);
      return gradient * (0.5f * (1 + t) + 0.5f * saved * (1 - t * t) * slope);
    }
    case kSilu: {
      const float s = 1 / (1 + expf(-saved));
      return gradient * (s * (1 + saved * (1 - s)));
    }
    default:
      return gradient;
  }
}

}  // namespace fastnn::cuda
