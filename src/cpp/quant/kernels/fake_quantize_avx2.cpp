// The kernels of fake quantization, avx2.
#define FASTNN_TARGET avx2
#define FASTNN_TARGET_ID 1
#include "quant/fake_quantize.inl"

namespace fastnn {
const FakeQuantizeKernels& avx2_fake_quantize() { return avx2::table; }
}  // namespace fastnn
