// Linear layers whose weight alone is quantized, avx512.
#define FASTNN_TARGET avx512
#define FASTNN_TARGET_ID 2
#include "quant/weight_only.inl"

namespace fastnn {
namespace avx512 {
static constexpr WeightOnlyKernels table = make_table<DecoderOf>();
}
const WeightOnlyKernels& avx512_weight_only() { return avx512::table; }
}  // namespace fastnn
