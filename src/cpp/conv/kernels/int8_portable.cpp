// The convolution of 8-bit images, portable.
#define FASTNN_TARGET portable
#define FASTNN_TARGET_ID 0
#include "conv/int8_depthwise.inl"

namespace fastnn {
Int8DepthwiseFn portable_int8_depthwise() { return portable::int8_depthwise; }
}  // namespace fastnn
