// The quantization kernels, avx2.
#define FASTNN_TARGET avx2
#define FASTNN_TARGET_ID 1
#include "quant/quantize.inl"

namespace fastnn {
const QuantizeKernels& avx2_quantize() { return avx2::quantize_table; }
}  // namespace fastnn
