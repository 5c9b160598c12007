// The softmax kernels, avx512.
#define FASTNN_TARGET avx512
#define FASTNN_TARGET_ID 2
#include "softmax/softmax.inl"

namespace fastnn {
const SoftmaxKernels& avx512_softmax() { return avx512::softmax_table; }
}  // namespace fastnn
