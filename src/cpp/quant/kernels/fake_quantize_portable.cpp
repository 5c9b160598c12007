// The kernels of fake quantization, portable.
#define FASTNN_TARGET portable
#define FASTNN_TARGET_ID 0
#include "quant/fake_quantize.inl"

namespace fastnn {
const FakeQuantizeKernels& portable_fake_quantize() { return portable::table; }
}  // namespace fastnn
