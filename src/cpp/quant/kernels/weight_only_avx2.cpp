// Linear layers whose weight alone is quantized, avx2.
#define FASTNN_TARGET avx2
#define FASTNN_TARGET_ID 1
#include "quant/weight_only.inl"

namespace fastnn {
namespace avx2 {
static constexpr WeightOnlyKernels table = make_table<DecoderOf>();
}
const WeightOnlyKernels& avx2_weight_only() { return avx2::table; }
}  // namespace fastnn
