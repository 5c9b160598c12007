// Every instruction that CUDA C++ has no name for (those of sm_90 in ptx_sm90.cuh). Elsewhere in
// this folder there is no inline PTX, so that host_emulation/ptx.hpp, which has a twin of each
// function here, is all that a machine without a GPU needs to run the kernels.
#pragma once
#include "cuda/device.cuh"

#ifndef __CUDACC__
#include "cuda/host_emulation/ptx.hpp"
#else

namespace fastnn::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// Copies `bytes` from global to shared memory behind this thread's back, of which those after the
// first `valid` become zeros. 16 bytes go past L1.
template <int bytes>
__device__ __forceinline__ void cp_async(void* to, const void* from, int valid = bytes) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)),
                 "l"(from), "n"(bytes), "r"(valid)
                 : "memory");
}
// What was begun since the last commit is a group.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until at most so many of this thread's groups are under way. Others see them after a barrier.
template <int groups>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

// Four matrices of 8 x 8 16-bit elements; lanes 8 i to 8 i + 7 point at the rows of matrix i. Lane
// l gets elements 2 (l % 4) and the next of row l / 4 (transposed: of column l / 4).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Two floats as bfloat16, rounded to nearest: the first in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t two;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
}

__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  uint32_t two;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
}

// x, but the compiler does not know: what follows from it is computed anew each time instead of
// being kept in registers throughout a loop.
__device__ __forceinline__ int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 2 to the power of x, of about 22 bits; denormal results are zero.
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers at a time: a b + c, rounded once.
__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t two;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(two) : "r"(a), "r"(b), "r"(c));
  return two;
}
__device__ __forceinline__ uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t two;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(two) : "r"(a), "r"(b), "r"(c));
  return two;
}

// d += a b, of A's 16 rows and B's 8 columns.
#define FASTNN_MMA(name, shape, types, constraint, Accumulator)                       \
  __device__ __forceinline__ void name(Accumulator(&d)[4], const uint32_t (&a)[4],    \
                                       const uint32_t (&b)[2]) {                      \
    asm volatile("mma.sync.aligned." shape ".row.col." types                          \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"   \
                 : "+" constraint(d[0]), "+" constraint(d[1]), "+" constraint(d[2]),  \
                   "+" constraint(d[3])                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])); \
  }
FASTNN_MMA(mma_m16n8k16_bf16, "m16n8k16", "f32.bf16.bf16.f32", "f", float)
FASTNN_MMA(mma_m16n8k16_f16, "m16n8k16", "f32.f16.f16.f32", "f", float)
FASTNN_MMA(mma_m16n8k8_tf32, "m16n8k8", "f32.tf32.tf32.f32", "f", float)
FASTNN_MMA(mma_m16n8k32_s8, "m16n8k32", "s32.s8.s8.s32", "r", int)
FASTNN_MMA(mma_m16n8k32_u8_s8, "m16n8k32", "s32.u8.s8.s32", "r", int)
#undef FASTNN_MMA

}  // namespace fastnn::ptx
#endif
