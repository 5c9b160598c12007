// The elementwise kernels, avx512.
#define FASTNN_TARGET avx512
#define FASTNN_TARGET_ID 2
#include "elementwise/kernels.inl"

namespace fastnn {
const ElementwiseKernels& avx512_elementwise() { return avx512::table; }
}  // namespace fastnn
