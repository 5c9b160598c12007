// The convolution of 8-bit images, avx2.
#define FASTNN_TARGET avx2
#define FASTNN_TARGET_ID 1
#include "conv/int8_depthwise.inl"

namespace fastnn {
Int8DepthwiseFn avx2_int8_depthwise() { return avx2::int8_depthwise; }
}  // namespace fastnn
