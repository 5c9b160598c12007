// The kernels of the search among bins, avx512.
#define FASTNN_TARGET avx512
#define FASTNN_TARGET_ID 2
#include "tree/binned.inl"

namespace fastnn {
const BinnedKernels& avx512_binned() { return avx512::binned_table; }
}  // namespace fastnn
