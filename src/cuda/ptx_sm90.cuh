// The instructions of sm_90 and sm_90a that CUDA C++ has no name for, beside those of ptx.cuh: the
// copy engine with its barriers, and products of warpgroups. host_emulation/ptx_sm90.hpp has their
// twins.
#pragma once
#include "cuda/ptx.cuh"
#include "cuda/tensor_map.cuh"

#ifndef __CUDACC__
#include "cuda/host_emulation/ptx_sm90.hpp"
#else

namespace fastnn::ptx {

// ---- mbarriers: 8 bytes of shared memory, of which a phase ends when so many threads have arrived
// and as many bytes as they announced -------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// This thread's mbarriers become visible to the copy engine.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Arrives, and announces bytes that the copy engine will bring.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Until the phase of this parity has ended. At first phase 0 is under way: that before it, of
// parity 1, has ended.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n"
        "}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!ended);
}

// What this thread stored in shared memory becomes visible to the copy engine and to wgmma.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- the copy engine ----------------------------------------------------------------------------

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Begins to copy the tile at these coordinates, innermost first, with zeros where the tensor ends.
// One thread does so; the whole tile's bytes arrive at the barrier.
template <int dims>
__device__ __forceinline__ void copy_tile(void* to, const TensorMap& map, uint64_t* barrier,
                                          const int (&at)[dims]) {
  static_assert(dims >= 2 && dims <= kMostMapDims);
#define FASTNN_COPY_TILE(shape, coordinates, ...)                                          \
  asm volatile(                                                                            \
      "cp.async.bulk.tensor." shape                                                        \
      ".shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {" coordinates \
      "}], [%2];" ::"r"(shared_address(to)),                                               \
      "l"(&map), "r"(shared_address(barrier)), __VA_ARGS__                                 \
      : "memory")
  if constexpr (dims == 2)
    FASTNN_COPY_TILE("2d", "%3, %4", "r"(at[0]), "r"(at[1]));
  else if constexpr (dims == 3)
    FASTNN_COPY_TILE("3d", "%3, %4, %5", "r"(at[0]), "r"(at[1]), "r"(at[2]));
  else if constexpr (dims == 4)
    FASTNN_COPY_TILE("4d", "%3, %4, %5, %6", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]));
  else
    FASTNN_COPY_TILE("5d", "%3, %4, %5, %6, %7", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]),
                     "r"(at[4]));
#undef FASTNN_COPY_TILE
}

// ---- warpgroups: four warps, the first one's number a multiple of four --------------------------

// Each thread of the warpgroup has `count` registers from now on.
template <int count>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

// Waits at the block's barrier of this number (1 to 15), until so many threads are there; or is
// counted as one of them and goes on.
__device__ __forceinline__ void barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Between the last use of registers and a product that takes or changes them.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// What was begun since the last commit is a group.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most so many groups are under way. Before that neither the accumulators may be used nor
// the operands written.
template <int groups>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups) : "memory");
}

// Registers have their values before this, and are used after it: the compiler, which knows wgmma
// as something that ends where it begins, would move what computes operands behind the fence, and
// what uses accumulators before the wait.
template <int count>
__device__ __forceinline__ void settle(float (&x)[count]) {
#pragma unroll
  for (int i = 0; i < count; i++) asm volatile("" : "+f"(x[i])::"memory");
}
template <int count>
__device__ __forceinline__ void settle(uint32_t (&x)[count][4]) {
#pragma unroll
  for (int i = 0; i < count; i++)
    asm volatile("" : "+r"(x[i][0]), "+r"(x[i][1]), "+r"(x[i][2]), "+r"(x[i][3])::"memory");
}

// d = a b, or d += a b where `accumulate`: 64 rows of A, 32 bytes of K, and 128 or 256 columns of
// B, matrices in shared memory given by descriptors, along whose rows K runs or, `across`, M or N.
// A warp has 16 rows; of these a thread has lane / 4 and the eighth after it, and columns 2 (lane %
// 4) and the next of each eight: d[4 j + 2 h + e] is row 8 h, column 8 j + e from there.
//
// Or, of 16-bit elements and 64 or 128 columns, A comes from registers: of each two blocks of eight
// columns of K, a thread has what it has of d, two neighbours a register. They are not to be
// written before the wait either.
#define FASTNN_R10(t)                                                                              \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t \
  "9, "
#define FASTNN_R60 \
  FASTNN_R10() FASTNN_R10(1) FASTNN_R10(2) FASTNN_R10(3) FASTNN_R10(4) FASTNN_R10(5)
#define FASTNN_R32 FASTNN_R10() FASTNN_R10(1) FASTNN_R10(2) "%30, %31"
#define FASTNN_R64 FASTNN_R60 "%60, %61, %62, %63"
#define FASTNN_R128                                                                 \
  FASTNN_R60 FASTNN_R10(6) FASTNN_R10(7) FASTNN_R10(8) FASTNN_R10(9) FASTNN_R10(10) \
      FASTNN_R10(11) "%120, %121, %122, %123, %124, %125, %126, %127"
#define FASTNN_D8(c, i)                                                            \
  "+" c(d[i]), "+" c(d[i + 1]), "+" c(d[i + 2]), "+" c(d[i + 3]), "+" c(d[i + 4]), \
      "+" c(d[i + 5]), "+" c(d[i + 6]), "+" c(d[i + 7])
#define FASTNN_D32(c, i) \
  FASTNN_D8(c, i), FASTNN_D8(c, i + 8), FASTNN_D8(c, i + 16), FASTNN_D8(c, i + 24)
#define FASTNN_D64(c) FASTNN_D32(c, 0), FASTNN_D32(c, 32)
#define FASTNN_D128(c) FASTNN_D64(c), FASTNN_D32(c, 64), FASTNN_D32(c, 96)

// a, b, p, across_a, across_b: the numbers of the operands after the accumulators; `how`: what
// follows the predicate.
#define FASTNN_WGMMA(name, shape, types, registers, accumulators, Accumulator, count, a_at, b_at,  \
                     p_at, how)                                                                    \
  template <bool a_across, bool b_across>                                                          \
  __device__ __forceinline__ void name(Accumulator(&d)[count], uint64_t a, uint64_t b,             \
                                       bool accumulate) {                                          \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p_at                                        \
                 ", 0;\nwgmma.mma_async.sync.aligned." shape "." types " {" registers "}, %" #a_at \
                 ", %" #b_at ", p" how ";\n}"                                                      \
                 : accumulators                                                                    \
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(a_across)), "n"(int(b_across))    \
                 : "memory");                                                                      \
  }
// The same, the first of four registers of A being operand a0.
#define FASTNN_WGMMA_REGISTERS(name, shape, types, registers, accumulators, count, a0, a1, a2, a3, \
                               b_at, p_at, across_at)                                              \
  template <bool b_across>                                                                         \
  __device__ __forceinline__ void name(float (&d)[count], const uint32_t (&a)[4], uint64_t b,      \
                                       bool accumulate) {                                          \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p_at                                        \
                 ", 0;\nwgmma.mma_async.sync.aligned." shape "." types " {" registers "}, {%" #a0  \
                 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b_at ", p, 1, 1, %" #across_at ";\n}"       \
                 : accumulators                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)),       \
                   "n"(int(b_across))                                                              \
                 : "memory");                                                                      \
  }
#define FASTNN_WGMMA_FLOAT(name, types)                                                            \
  FASTNN_WGMMA(name, "m64n128k16", types, FASTNN_R64, FASTNN_D64("f"), float, 64, 64, 65, 66,      \
               ", 1, 1, %67, %68")                                                                 \
  FASTNN_WGMMA(name, "m64n256k16", types, FASTNN_R128, FASTNN_D128("f"), float, 128, 128, 129,     \
               130, ", 1, 1, %131, %132")                                                          \
  FASTNN_WGMMA_REGISTERS(name, "m64n64k16", types, FASTNN_R32, FASTNN_D32("f", 0), 32, 32, 33, 34, \
                         35, 36, 37, 38)                                                           \
  FASTNN_WGMMA_REGISTERS(name, "m64n128k16", types, FASTNN_R64, FASTNN_D64("f"), 64, 64, 65, 66,   \
                         67, 68, 69, 70)
// 8-bit elements lie along K, always.
#define FASTNN_WGMMA_FLOAT8(name, types)                                                       \
  FASTNN_WGMMA(name, "m64n128k32", types, FASTNN_R64, FASTNN_D64("f"), float, 64, 64, 65, 66,  \
               ", 1, 1")                                                                       \
  FASTNN_WGMMA(name, "m64n256k32", types, FASTNN_R128, FASTNN_D128("f"), float, 128, 128, 129, \
               130, ", 1, 1")
#define FASTNN_WGMMA_INTEGER(name, types)                                                         \
  FASTNN_WGMMA(name, "m64n128k32", types, FASTNN_R64, FASTNN_D64("r"), int, 64, 64, 65, 66, "")   \
  FASTNN_WGMMA(name, "m64n256k32", types, FASTNN_R128, FASTNN_D128("r"), int, 128, 128, 129, 130, \
               "")
FASTNN_WGMMA_FLOAT(wgmma_bf16, "f32.bf16.bf16")
FASTNN_WGMMA_FLOAT(wgmma_f16, "f32.f16.f16")
FASTNN_WGMMA_INTEGER(wgmma_s8, "s32.s8.s8")
FASTNN_WGMMA_INTEGER(wgmma_u8_s8, "s32.u8.s8")
FASTNN_WGMMA_FLOAT8(wgmma_e4m3, "f32.e4m3.e4m3")
FASTNN_WGMMA_FLOAT8(wgmma_e4m3_e5m2, "f32.e4m3.e5m2")
FASTNN_WGMMA_FLOAT8(wgmma_e5m2_e4m3, "f32.e5m2.e4m3")
FASTNN_WGMMA_FLOAT8(wgmma_e5m2, "f32.e5m2.e5m2")
#undef FASTNN_WGMMA_FLOAT8
#undef FASTNN_WGMMA_INTEGER
#undef FASTNN_WGMMA_FLOAT
#undef FASTNN_WGMMA_REGISTERS
#undef FASTNN_WGMMA
#undef FASTNN_D128
#undef FASTNN_D64
#undef FASTNN_D32
#undef FASTNN_D8
#undef FASTNN_R128
#undef FASTNN_R64
#undef FASTNN_R32
#undef FASTNN_R60
#undef FASTNN_R10

}  // namespace fastnn::ptx
#endif

namespace fastnn::ptx {

// What wgmma is told of a matrix in shared memory, whose rows of `swizzle` bytes lie in groups of
// eight
// ("PTX ISA, Asynchronous Warpgroup Level Matrix Shared Memory Layout"). `stride`: bytes from one
// group to the next. `leading`: where M or N runs along rows, bytes from one row's worth of it to
// the next (where K does, all of an instruction's 32 bytes are in one row, and it is not used).
// Further rows or columns of the same matrix begin that many bytes / 16 later.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* start, int leading, int stride,
                                                      Swizzle swizzle) {
  return uint64_t((shared_address(start) & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 |
         uint64_t(stride >> 4) << 32 | uint64_t(swizzle) << 62;
}

}  // namespace fastnn::ptx
