// The loops of random splits, avx2.
#define FASTNN_TARGET avx2
#define FASTNN_TARGET_ID 1
#include "tree/random_kernels.inl"

namespace fastnn {
const RandomKernels& avx2_random() { return avx2::random_table; }
}  // namespace fastnn
