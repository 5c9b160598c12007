// The loops of the exact search, avx512.
#define FASTNN_TARGET avx512
#define FASTNN_TARGET_ID 2
#include "tree/kernels.inl"

namespace fastnn {
const TreeKernels& avx512_tree() { return avx512::tree_table; }
}  // namespace fastnn
