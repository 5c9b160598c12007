// The elementwise kernels, portable.
#define FASTNN_TARGET portable
#define FASTNN_TARGET_ID 0
#include "elementwise/kernels.inl"

namespace fastnn {
const ElementwiseKernels& portable_elementwise() { return portable::table; }
}  // namespace fastnn
