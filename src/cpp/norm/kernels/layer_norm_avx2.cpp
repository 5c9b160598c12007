// The layer norm kernels, avx2.
#define FASTNN_TARGET avx2
#define FASTNN_TARGET_ID 1
#include "norm/layer_norm.inl"

namespace fastnn {
const RowNormKernels& avx2_row_norm() { return avx2::row_norm_table; }
}  // namespace fastnn
