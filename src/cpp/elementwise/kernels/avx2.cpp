// The elementwise kernels, avx2.
#define FASTNN_TARGET avx2
#define FASTNN_TARGET_ID 1
#include "elementwise/kernels.inl"

namespace fastnn {
const ElementwiseKernels& avx2_elementwise() { return avx2::table; }
}  // namespace fastnn
