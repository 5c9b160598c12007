// The kernels of the search among bins, avx2.
#define FASTNN_TARGET avx2
#define FASTNN_TARGET_ID 1
#include "tree/binned.inl"

namespace fastnn {
const BinnedKernels& avx2_binned() { return avx2::binned_table; }
}  // namespace fastnn
