// The quantization kernels, avx512.
#define FASTNN_TARGET avx512
#define FASTNN_TARGET_ID 2
#include "quant/quantize.inl"

namespace fastnn {
const QuantizeKernels& avx512_quantize() { return avx512::quantize_table; }
}  // namespace fastnn
