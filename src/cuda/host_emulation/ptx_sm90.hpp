// The twins of the wrappers in ptx_sm90.cuh.
#pragma once
#include "cuda/host_emulation/async.hpp"
#include "cuda/host_emulation/ptx.hpp"
#include "cuda/host_emulation/wgmma.hpp"

#define FASTNN_HERE emulation::Where where = emulation::Where::current()

namespace fastnn::ptx {

inline uint32_t shared_address(const void* p, FASTNN_HERE) {
  return emulation::shared_address(p, where);
}

inline void mbarrier_init(uint64_t* barrier, int arrivals, FASTNN_HERE) {
  emulation::mbarrier_init(barrier, arrivals, where);
}
inline void fence_mbarrier_init() { emulation::fence_mbarrier_init(); }
inline void mbarrier_arrive(uint64_t* barrier, FASTNN_HERE) {
  emulation::mbarrier_arrive(barrier, 0, where);
}
inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes, FASTNN_HERE) {
  emulation::mbarrier_arrive(barrier, bytes, where);
}
inline void mbarrier_wait(uint64_t* barrier, int parity, FASTNN_HERE) {
  emulation::mbarrier_wait(barrier, parity, where);
}
inline void fence_proxy_async() { emulation::fence_proxy_async(); }

inline void prefetch_map(const TensorMap&) {}
template <int dims>
void copy_tile(void* to, const TensorMap& map, uint64_t* barrier, const int (&at)[dims],
               FASTNN_HERE) {
  static_assert(dims >= 2 && dims <= kMostMapDims);
  emulation::copy_tile(to, map, barrier, at, dims, where);
}

template <int count>
void more_registers(FASTNN_HERE) {
  emulation::set_registers(count, true, where);
}
template <int count>
void fewer_registers(FASTNN_HERE) {
  emulation::set_registers(count, false, where);
}

inline void barrier_sync(int barrier, int threads, FASTNN_HERE) {
  emulation::barrier(barrier, threads, false, "bar.sync", where);
}
inline void barrier_arrive(int barrier, int threads, FASTNN_HERE) {
  emulation::barrier_arrive(barrier, threads, "bar.arrive", where);
}

inline void wgmma_fence(FASTNN_HERE) { emulation::warpgroup_fence(where); }
inline void wgmma_commit(FASTNN_HERE) { emulation::warpgroup_commit(where); }
template <int groups>
void wgmma_wait(FASTNN_HERE) {
  emulation::warpgroup_wait(groups, where);
}
template <class T>
void settle(T&) {}

#define FASTNN_WGMMA(name, columns, a_type, b_type, Accumulator)                                  \
  template <bool a_across, bool b_across>                                                         \
  void name(Accumulator(&d)[columns / 2], uint64_t a, uint64_t b, bool accumulate, FASTNN_HERE) { \
    emulation::warpgroup_product({emulation::MatrixType::a_type, emulation::MatrixType::b_type,   \
                                  columns, nullptr, a, b, a_across, b_across, accumulate, d},     \
                                 where);                                                          \
  }
FASTNN_WGMMA(wgmma_bf16, 128, bf16, bf16, float)
FASTNN_WGMMA(wgmma_bf16, 256, bf16, bf16, float)
FASTNN_WGMMA(wgmma_f16, 128, f16, f16, float)
FASTNN_WGMMA(wgmma_f16, 256, f16, f16, float)
FASTNN_WGMMA(wgmma_s8, 128, s8, s8, int)
FASTNN_WGMMA(wgmma_s8, 256, s8, s8, int)
FASTNN_WGMMA(wgmma_u8_s8, 128, u8, s8, int)
FASTNN_WGMMA(wgmma_u8_s8, 256, u8, s8, int)
FASTNN_WGMMA(wgmma_e4m3, 128, e4m3, e4m3, float)
FASTNN_WGMMA(wgmma_e4m3, 256, e4m3, e4m3, float)
FASTNN_WGMMA(wgmma_e4m3_e5m2, 128, e4m3, e5m2, float)
FASTNN_WGMMA(wgmma_e4m3_e5m2, 256, e4m3, e5m2, float)
FASTNN_WGMMA(wgmma_e5m2_e4m3, 128, e5m2, e4m3, float)
FASTNN_WGMMA(wgmma_e5m2_e4m3, 256, e5m2, e4m3, float)
FASTNN_WGMMA(wgmma_e5m2, 128, e5m2, e5m2, float)
FASTNN_WGMMA(wgmma_e5m2, 256, e5m2, e5m2, float)
#undef FASTNN_WGMMA

#define FASTNN_WGMMA_REGISTERS(name, columns, type)                                         \
  template <bool b_across>                                                                  \
  void name(float (&d)[columns / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate,   \
            FASTNN_HERE) {                                                                  \
    emulation::warpgroup_product({emulation::MatrixType::type, emulation::MatrixType::type, \
                                  columns, a, 0, b, false, b_across, accumulate, d},        \
                                 where);                                                    \
  }
FASTNN_WGMMA_REGISTERS(wgmma_bf16, 64, bf16)
FASTNN_WGMMA_REGISTERS(wgmma_bf16, 128, bf16)
FASTNN_WGMMA_REGISTERS(wgmma_f16, 64, f16)
FASTNN_WGMMA_REGISTERS(wgmma_f16, 128, f16)
#undef FASTNN_WGMMA_REGISTERS

}  // namespace fastnn::ptx
#undef FASTNN_HERE
