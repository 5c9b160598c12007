// The pooling kernels, avx512.
#define FASTNN_TARGET avx512
#define FASTNN_TARGET_ID 2
#include "pool/kernels.inl"

namespace fastnn {
const PoolKernels& avx512_pool() { return avx512::table; }
}  // namespace fastnn
