// softmax and log_softmax along one dimension, and their gradients, of tensors of any strides.
#pragma once
#include "cuda/reduce/rows.hpp"

namespace fastnn::cuda {

// float32, bfloat16 or float16; sums are in float32. rows: x and out; out may be x.
void softmax(const Rows& rows, DType type, bool log, void* stream);
// rows: grad, the saved result, and the gradient by the input.
void softmax_backward(const Rows& rows, DType type, bool log, void* stream);

}  // namespace fastnn::cuda
