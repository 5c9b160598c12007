// The softmax and cross entropy kernels, avx2.
#define FASTNN_TARGET avx2
#define FASTNN_TARGET_ID 1
#include "softmax/softmax.inl"
// After it.
#include "softmax/cross_entropy.inl"

namespace fastnn {
const SoftmaxKernels& avx2_softmax() { return avx2::softmax_table; }
const CrossEntropyKernels& avx2_cross_entropy() { return avx2::cross_entropy_table; }
}  // namespace fastnn
