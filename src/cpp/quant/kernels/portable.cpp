// The quantization kernels, portable.
#define FASTNN_TARGET portable
#define FASTNN_TARGET_ID 0
#include "quant/quantize.inl"

namespace fastnn {
const QuantizeKernels& portable_quantize() { return portable::quantize_table; }
}  // namespace fastnn
