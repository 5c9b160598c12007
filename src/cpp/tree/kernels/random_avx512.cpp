// The loops of random splits, avx512.
#define FASTNN_TARGET avx512
#define FASTNN_TARGET_ID 2
#include "tree/random_kernels.inl"

namespace fastnn {
const RandomKernels& avx512_random() { return avx512::random_table; }
}  // namespace fastnn
