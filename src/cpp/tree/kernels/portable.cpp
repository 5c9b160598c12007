// The loops of the exact search, portable.
#define FASTNN_TARGET portable
#define FASTNN_TARGET_ID 0
#include "tree/kernels.inl"

namespace fastnn {
const TreeKernels& portable_tree() { return portable::tree_table; }
}  // namespace fastnn
