// Which of a family's tables of kernels is used. Each instruction set that the build has comes with
// a function that returns one, avx2_dropout() for example.
#pragma once
#include "common/cpu_features.hpp"

namespace fastnn {

// Kernels: a reference to a table, or the address of the one kernel that there is.
template <class Kernels>
Kernels kernels_of(Kernels (*portable)(), Kernels (*avx2)(), Kernels (*avx512)()) {
  const Isa isa = active_isa();
  return isa >= Isa::avx512 ? avx512() : isa == Isa::avx2 ? avx2() : portable();
}

}  // namespace fastnn

// What the build does not have is never active.
#ifdef FASTNN_HAS_AVX2
#define FASTNN_AVX2_KERNELS(family) avx2_##family
#else
#define FASTNN_AVX2_KERNELS(family) portable_##family
#endif
#ifdef FASTNN_HAS_AVX512
#define FASTNN_AVX512_KERNELS(family) avx512_##family
#else
#define FASTNN_AVX512_KERNELS(family) portable_##family
#endif

// The table of `family` for the active instruction set.
#define FASTNN_KERNELS_OF(family)                                      \
  ::fastnn::kernels_of(portable_##family, FASTNN_AVX2_KERNELS(family), \
                       FASTNN_AVX512_KERNELS(family))
