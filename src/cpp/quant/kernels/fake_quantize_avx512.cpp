// The kernels of fake quantization, avx512.
#define FASTNN_TARGET avx512
#define FASTNN_TARGET_ID 2
#include "quant/fake_quantize.inl"

namespace fastnn {
const FakeQuantizeKernels& avx512_fake_quantize() { return avx512::table; }
}  // namespace fastnn
