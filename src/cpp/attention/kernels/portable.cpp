// The attention kernels, portable.
#define FASTNN_TARGET portable
#define FASTNN_TARGET_ID 0
#include "attention/decode.inl"

namespace fastnn {
const AttentionKernels& portable_attention() { return portable::attention_table; }
}  // namespace fastnn
