// Linear layers whose weight alone is quantized, portable.
#define FASTNN_TARGET portable
#define FASTNN_TARGET_ID 0
#include "quant/weight_only.inl"

namespace fastnn {
namespace portable {
static constexpr WeightOnlyKernels table = make_table<DecoderOf>();
}
const WeightOnlyKernels& portable_weight_only() { return portable::table; }
}  // namespace fastnn
