// The convolution of 8-bit images, avx512.
#define FASTNN_TARGET avx512
#define FASTNN_TARGET_ID 2
#include "conv/int8_depthwise.inl"

namespace fastnn {
Int8DepthwiseFn avx512_int8_depthwise() { return avx512::int8_depthwise; }
}  // namespace fastnn
