// The batch norm kernels, avx2.
#define FASTNN_TARGET avx2
#define FASTNN_TARGET_ID 1
#include "norm/batch_norm.inl"

namespace fastnn {
const BatchNormKernels& avx2_batch_norm() { return avx2::batch_norm_table; }
}  // namespace fastnn
