// The pooling kernels, portable.
#define FASTNN_TARGET portable
#define FASTNN_TARGET_ID 0
#include "pool/kernels.inl"

namespace fastnn {
const PoolKernels& portable_pool() { return portable::table; }
}  // namespace fastnn
