// Division of 32-bit numbers by what is known before the launch: by a product (Granlund and
// Montgomery, "Division by invariant integers using multiplication", PLDI 1994) in three
// instructions, where a GPU, which has none for it, takes twenty.
#pragma once
#include "cuda/device.cuh"

namespace fastnn::cuda {

// Of numbers below 2^31, by 1 to 2^31 - 1.
struct Divisor {
  uint32_t divisor = 1, factor = 1, shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t by) : divisor(uint32_t(by)) {
    while (int64_t{1} << shift < by) shift++;
    factor = uint32_t((((uint64_t{1} << shift) - divisor) << 32) / divisor + 1);
  }
  __device__ __forceinline__ uint32_t divide(uint32_t n) const {
    return (__umulhi(n, factor) + n) >> shift;
  }
  // The innermost of a place's indices, and n becomes the others': the quotient.
  __device__ __forceinline__ uint32_t split(uint32_t& n) const {
    const uint32_t whole = divide(n), rest = n - whole * divisor;
    n = whole;
    return rest;
  }
  // The outermost one, and n becomes the others': the remainder.
  __device__ __forceinline__ uint32_t take(uint32_t& n) const {
    const uint32_t whole = divide(n);
    n -= whole * divisor;
    return whole;
  }
};

}  // namespace fastnn::cuda
