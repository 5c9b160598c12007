// The dropout kernels, portable.
#define FASTNN_TARGET portable
#define FASTNN_TARGET_ID 0
#include "dropout/dropout.inl"

namespace fastnn {
const DropoutKernels& portable_dropout() { return portable::table; }
}  // namespace fastnn
