// The dropout kernels, avx2.
#define FASTNN_TARGET avx2
#define FASTNN_TARGET_ID 1
#include "dropout/dropout.inl"

namespace fastnn {
const DropoutKernels& avx2_dropout() { return avx2::table; }
}  // namespace fastnn
