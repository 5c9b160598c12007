// The pooling kernels, avx2.
#define FASTNN_TARGET avx2
#define FASTNN_TARGET_ID 1
#include "pool/kernels.inl"

namespace fastnn {
const PoolKernels& avx2_pool() { return avx2::table; }
}  // namespace fastnn
