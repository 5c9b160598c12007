// The convolution kernels, avx2.
#define FASTNN_TARGET avx2
#define FASTNN_TARGET_ID 1
#include "conv/kernels.inl"

namespace fastnn {
const ConvKernels& avx2_conv() { return avx2::table; }
}  // namespace fastnn
