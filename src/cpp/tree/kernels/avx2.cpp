// The loops of the exact search, avx2.
#define FASTNN_TARGET avx2
#define FASTNN_TARGET_ID 1
#include "tree/kernels.inl"

namespace fastnn {
const TreeKernels& avx2_tree() { return avx2::tree_table; }
}  // namespace fastnn
