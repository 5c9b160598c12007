// What every kernel file begins with: CUDA's language, from the CUDA compiler or, where there is
// none, from host_emulation/; shared memory and launches, which plain C++ has no syntax for.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#undef NDEBUG  // FASTNN_CHECK is part of what the kernels do
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cassert>
#else
#include "cuda/host_emulation/cuda.hpp"
#endif

namespace fastnn {

#ifdef __CUDACC__

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// The dynamic shared memory of the block.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char fastnn_dynamic_shared[];
  return reinterpret_cast<T*>(fastnn_dynamic_shared);
}

// What torch, too, asserts on the device: nobody waits to ask about numbers that are there alone.
// Where it does not hold, the next call that waits for the device raises.
#define FASTNN_CHECK(condition, message) assert((condition) && message)

// Declares shared memory of the block: FASTNN_SHARED(float, sums, [32]).
#define FASTNN_SHARED(type, name, ...) __shared__ type name __VA_ARGS__

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            Arguments... arguments) {
  if (shared_bytes > 48 << 10)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
          "shared memory");
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), "launch");
}

inline void set_zero(void* to, size_t bytes, void* stream) {
  check(cudaMemsetAsync(to, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

#else

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulation::dynamic_shared());
}

#define FASTNN_CHECK(condition, message)                                                          \
  do {                                                                                            \
    if (!(condition)) ::fastnn::emulation::fault(::fastnn::emulation::Where::current(), message); \
  } while (false)

#define FASTNN_SHARED(type, name, ...)          \
  using name##_type = type __VA_ARGS__;         \
  static const char name##_key = 0;             \
  auto& name = *reinterpret_cast<name##_type*>( \
      ::fastnn::emulation::static_shared(&name##_key, sizeof(name##_type), alignof(name##_type)))

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*,
            Arguments... arguments) {
  emulation::run(grid, block, shared_bytes, [&] { kernel(arguments...); });
}

inline void set_zero(void* to, size_t bytes, void*) { std::memset(to, 0, bytes); }

#endif

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(int x) { return float(x); }
__device__ inline float to_float(double x) { return float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

}  // namespace fastnn
