// The embedding kernels, avx2.
#define FASTNN_TARGET avx2
#define FASTNN_TARGET_ID 1
#include "embedding/embedding.inl"

namespace fastnn {
const EmbeddingKernels& avx2_embedding() { return avx2::table; }
}  // namespace fastnn
