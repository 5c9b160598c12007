// The matrix product for sm_90a of floats of eight bits. Both types may meet; which do is known
// when it runs, so that one kernel has a loop for each pair and the rest of the code once.
//
// The tensor cores sum such products with about 14 bits (DeepSeek-AI, "DeepSeek-V3 Technical
// Report", 2024, section 3.3.2), which a long sum outgrows: 128 of K are summed at a time, and
// these sums in float32. Where fast sums are asked for, which are left to the tensor cores,
// registers remain for tiles of 256 columns, which read a quarter less: for pairs of e4m3, of which
// layers are made. Another pair's gradients want the precision.
#include "cuda/gemm/hopper.hpp"
#include "cuda/gemm/hopper_kernel.cuh"
#include "cuda/ptx_sm90.cuh"

namespace fastnn::cuda {
namespace {

FASTNN_HOPPER_MODE(BothE4M3, wgmma_e4m3, uint8_t, float)
FASTNN_HOPPER_MODE(E4M3ByE5M2, wgmma_e4m3_e5m2, uint8_t, float)
FASTNN_HOPPER_MODE(E5M2ByE4M3, wgmma_e5m2_e4m3, uint8_t, float)
FASTNN_HOPPER_MODE(BothE5M2, wgmma_e5m2, uint8_t, float)

struct HopperFloat8 {
  static constexpr int kParts = 1, kSize = 1;
  static constexpr bool kSplit = false, kFloat8 = true;
  using Sum = float;

  template <class K>
  __device__ static __forceinline__ void sum_up(const Gemm& g, Sum (&sums)[K::kSums],
                                                typename K::Stages& turn, uint32_t steps,
                                                int first_row) {
    if constexpr (K::kSums == 128) {
      K::template sum_up<BothE4M3>(sums, turn, steps, first_row);
    } else {
      const bool b_e4m3 = g.b_type == kE4M3;
      if (g.a_type == kE4M3)
        b_e4m3 ? K::template sum_up_steps<BothE4M3>(sums, turn, steps, first_row)
               : K::template sum_up_steps<E4M3ByE5M2>(sums, turn, steps, first_row);
      else
        b_e4m3 ? K::template sum_up_steps<E5M2ByE4M3>(sums, turn, steps, first_row)
               : K::template sum_up_steps<BothE5M2>(sums, turn, steps, first_row);
    }
  }
};

}  // namespace

bool float8_on_hopper(const Gemm& g, void* stream) {
  return multiply_on_hopper<HopperFloat8>(g, stream);
}

}  // namespace fastnn::cuda
