// The loops of random splits, portable.
#define FASTNN_TARGET portable
#define FASTNN_TARGET_ID 0
#include "tree/random_kernels.inl"

namespace fastnn {
const RandomKernels& portable_random() { return portable::random_table; }
}  // namespace fastnn
