// Division by a number that the host knows.
#pragma once
#include "cuda/device.cuh"

namespace fastnn::cuda {

// n / divisor without a division, for n below 2^31 (Granlund and Montgomery 1994, "Division by
// invariant integers using multiplication").
struct Divisor {
  unsigned divisor = 1, factor = 1, shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t by) : divisor(unsigned(by)) {
    while ((uint64_t(1) << shift) < divisor) shift++;
    factor = unsigned(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - divisor)) / divisor + 1);
  }
  // Makes the remainder of n.
  __device__ __forceinline__ unsigned take(unsigned& n) const {
    const unsigned quotient = (__umulhi(n, factor) + n) >> shift;
    n -= quotient * divisor;
    return quotient;
  }
};

}  // namespace fastnn::cuda
