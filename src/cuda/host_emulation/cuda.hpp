// What a kernel file finds in CUDA's headers, for a compiler that knows nothing of CUDA:
// qualifiers, built-in variables, vector types, intrinsics. Each intrinsic that waits for others
// takes the place of its call, for the message of a Fault.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cuda/host_emulation/block.hpp"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict

#define threadIdx (::fastnn::emulation::self().thread)
#define blockIdx (::fastnn::emulation::place().block)
#define blockDim (::fastnn::emulation::place().block_size)
#define gridDim (::fastnn::emulation::place().grid_size)
constexpr int warpSize = 32;

// ---- vector types ------------------------------------------------------------------------------

#define FASTNN_VECTOR_TYPES(name, type)                            \
  struct name##1 { type x; };                                      \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };         \
  struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; };   \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
FASTNN_VECTOR_TYPES(float, float)
FASTNN_VECTOR_TYPES(int, int)
FASTNN_VECTOR_TYPES(uint, unsigned)
FASTNN_VECTOR_TYPES(char, signed char)
FASTNN_VECTOR_TYPES(uchar, unsigned char)
FASTNN_VECTOR_TYPES(short, short)
FASTNN_VECTOR_TYPES(ushort, unsigned short)
#undef FASTNN_VECTOR_TYPES
struct alignas(16) double2 {
  double x, y;
};

// ---- 16-bit floats -----------------------------------------------------------------------------

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  return std::bit_cast<float>(uint32_t(x.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {0x7FFF};  // as the conversion instruction gives it
  return {uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) { return float(std::bit_cast<_Float16>(x.bits)); }
inline __half __float2half_rn(float x) {
  if (x != x) return {0x7FFF};
  return {std::bit_cast<uint16_t>(_Float16(x))};
}

// ---- numbers -----------------------------------------------------------------------------------

inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float2int_rn(float x) {
  // Saturates, and makes 0 of NaN, which a conversion in C++ leaves undefined.
  if (x != x) return 0;
  const float r = std::nearbyintf(x);
  return r >= 0x1p31f ? INT32_MAX : r < -0x1p31f ? INT32_MIN : int(r);
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float rsqrtf(float a) { return float(1.0 / std::sqrt(double(a))); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(unsigned(x)) + 1 : 0; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}

// ---- barriers and votes of a block -------------------------------------------------------------

inline void __syncthreads(fastnn::emulation::Where where = fastnn::emulation::Where::current()) {
  fastnn::emulation::barrier(0, 0, false, "__syncthreads", where);
}
inline int __syncthreads_count(
    int vote, fastnn::emulation::Where where = fastnn::emulation::Where::current()) {
  return fastnn::emulation::barrier(0, 0, vote, "__syncthreads_count", where).count;
}
inline int __syncthreads_and(int vote,
                             fastnn::emulation::Where where = fastnn::emulation::Where::current()) {
  return fastnn::emulation::barrier(0, 0, vote, "__syncthreads_and", where).all;
}
inline int __syncthreads_or(int vote,
                            fastnn::emulation::Where where = fastnn::emulation::Where::current()) {
  return fastnn::emulation::barrier(0, 0, vote, "__syncthreads_or", where).any;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

#include "cuda/host_emulation/warp.hpp"
