// The layer norm kernels, portable.
#define FASTNN_TARGET portable
#define FASTNN_TARGET_ID 0
#include "norm/layer_norm.inl"

namespace fastnn {
const RowNormKernels& portable_row_norm() { return portable::row_norm_table; }
}  // namespace fastnn
