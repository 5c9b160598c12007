// The convolution kernels, portable.
#define FASTNN_TARGET portable
#define FASTNN_TARGET_ID 0
#include "conv/kernels.inl"

namespace fastnn {
const ConvKernels& portable_conv() { return portable::table; }
}  // namespace fastnn
