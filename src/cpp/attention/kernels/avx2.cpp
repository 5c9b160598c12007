// The attention kernels, avx2.
#define FASTNN_TARGET avx2
#define FASTNN_TARGET_ID 1
#include "attention/decode.inl"

namespace fastnn {
const AttentionKernels& avx2_attention() { return avx2::attention_table; }
}  // namespace fastnn
