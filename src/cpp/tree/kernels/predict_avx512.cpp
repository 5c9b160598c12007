// The prediction kernels, avx512.
#define FASTNN_TARGET avx512
#define FASTNN_TARGET_ID 2
#include "tree/predict.inl"

namespace fastnn {
const PredictKernels& avx512_predict() { return avx512::predict_table; }
}  // namespace fastnn
