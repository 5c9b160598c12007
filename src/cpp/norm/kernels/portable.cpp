// The batch norm kernels, portable.
#define FASTNN_TARGET portable
#define FASTNN_TARGET_ID 0
#include "norm/batch_norm.inl"

namespace fastnn {
const BatchNormKernels& portable_batch_norm() { return portable::batch_norm_table; }
}  // namespace fastnn
