// The convolution kernels, avx512.
#define FASTNN_TARGET avx512
#define FASTNN_TARGET_ID 2
#include "conv/kernels.inl"

namespace fastnn {
const ConvKernels& avx512_conv() { return avx512::table; }
}  // namespace fastnn
