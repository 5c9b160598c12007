// The embedding kernels, avx512.
#define FASTNN_TARGET avx512
#define FASTNN_TARGET_ID 2
#include "embedding/embedding.inl"

namespace fastnn {
const EmbeddingKernels& avx512_embedding() { return avx512::table; }
}  // namespace fastnn
