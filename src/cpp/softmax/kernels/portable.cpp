// The softmax and cross entropy kernels, portable.
#define FASTNN_TARGET portable
#define FASTNN_TARGET_ID 0
#include "softmax/softmax.inl"
// After it.
#include "softmax/cross_entropy.inl"

namespace fastnn {
const SoftmaxKernels& portable_softmax() { return portable::softmax_table; }
const CrossEntropyKernels& portable_cross_entropy() { return portable::cross_entropy_table; }
}  // namespace fastnn
