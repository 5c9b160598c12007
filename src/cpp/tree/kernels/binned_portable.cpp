// The kernels of the search among bins, portable.
#define FASTNN_TARGET portable
#define FASTNN_TARGET_ID 0
#include "tree/binned.inl"

namespace fastnn {
const BinnedKernels& portable_binned() { return portable::binned_table; }
}  // namespace fastnn
