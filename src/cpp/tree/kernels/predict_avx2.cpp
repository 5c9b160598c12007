// The prediction kernels, avx2.
#define FASTNN_TARGET avx2
#define FASTNN_TARGET_ID 1
#include "tree/predict.inl"

namespace fastnn {
const PredictKernels& avx2_predict() { return avx2::predict_table; }
}  // namespace fastnn
