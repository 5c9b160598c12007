// The layer norm kernels, avx512.
#define FASTNN_TARGET avx512
#define FASTNN_TARGET_ID 2
#include "norm/layer_norm.inl"

namespace fastnn {
const RowNormKernels& avx512_row_norm() { return avx512::row_norm_table; }
}  // namespace fastnn
