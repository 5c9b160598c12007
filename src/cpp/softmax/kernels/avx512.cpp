// The softmax and cross entropy kernels, avx512.
#define FASTNN_TARGET avx512
#define FASTNN_TARGET_ID 2
#include "softmax/softmax.inl"
// After it.
#include "softmax/cross_entropy.inl"

namespace fastnn {
const SoftmaxKernels& avx512_softmax() { return avx512::softmax_table; }
const CrossEntropyKernels& avx512_cross_entropy() { return avx512::cross_entropy_table; }
}  // namespace fastnn
