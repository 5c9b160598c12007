// The softmax kernels, avx2.
#define FASTNN_TARGET avx2
#define FASTNN_TARGET_ID 1
#include "softmax/softmax.inl"

namespace fastnn {
const SoftmaxKernels& avx2_softmax() { return avx2::softmax_table; }
}  // namespace fastnn
