// The batch norm kernels, avx512.
#define FASTNN_TARGET avx512
#define FASTNN_TARGET_ID 2
#include "norm/batch_norm.inl"

namespace fastnn {
const BatchNormKernels& avx512_batch_norm() { return avx512::batch_norm_table; }
}  // namespace fastnn
