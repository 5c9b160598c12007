// What kernels of sm_90a have in common whose warpgroups multiply what another one has the copy
// engine bring.
#pragma once
#include "cuda/device.cuh"

namespace fastnn::cuda {

constexpr int kPattern = 1024;  // bytes that are swizzled alike: eight rows of 128

// Stages are filled and emptied in turn; every time round, the parity of their barriers changes.
template <int stages>
struct Turn {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// Among four neighbouring threads, pairs of columns of four blocks of eight columns become one
// block of eight columns each.
template <class Sum>
__device__ __forceinline__ void gather_columns(Sum (&x)[8]) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (i / 2 & distance) continue;
      Sum& kept = x[i];
      Sum& other = x[i + 2 * distance];
      const Sum received = __shfl_xor_sync(~0u, upper ? kept : other, distance);
      if (upper)
        kept = received;
      else
        other = received;
    }
  }
}

}  // namespace fastnn::cuda
