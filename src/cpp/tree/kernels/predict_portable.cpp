// The prediction kernels, portable.
#define FASTNN_TARGET portable
#define FASTNN_TARGET_ID 0
#include "tree/predict.inl"

namespace fastnn {
const PredictKernels& portable_predict() { return portable::predict_table; }
}  // namespace fastnn
