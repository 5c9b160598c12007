// The embedding kernels, portable.
#define FASTNN_TARGET portable
#define FASTNN_TARGET_ID 0
#include "embedding/embedding.inl"

namespace fastnn {
const EmbeddingKernels& portable_embedding() { return portable::table; }
}  // namespace fastnn
