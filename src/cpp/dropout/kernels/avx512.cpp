// The dropout kernels, avx512.
#define FASTNN_TARGET avx512
#define FASTNN_TARGET_ID 2
#include "dropout/dropout.inl"

namespace fastnn {
const DropoutKernels& avx512_dropout() { return avx512::table; }
}  // namespace fastnn
