// The attention kernels, avx512.
#define FASTNN_TARGET avx512
#define FASTNN_TARGET_ID 2
#include "attention/decode.inl"

namespace fastnn {
const AttentionKernels& avx512_attention() { return avx512::attention_table; }
}  // namespace fastnn
