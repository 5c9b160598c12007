// The softmax kernels, portable.
#define FASTNN_TARGET portable
#define FASTNN_TARGET_ID 0
#include "softmax/softmax.inl"

namespace fastnn {
const SoftmaxKernels& portable_softmax() { return portable::softmax_table; }
}  // namespace fastnn
