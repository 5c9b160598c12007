// Attention on a GPU; the arguments, and their meaning, are those of the CPU's
// (src/cpp/attention/attention.hpp), of float32, bfloat16 or float16 and rows of up to kMaxSize
// elements.
//
// Forward: Dao, arXiv:2307.08691. Its backward adds to the queries' gradients with atomics, in
// whatever order blocks come; here the scores are computed a second time instead, for the queries'
// gradient alone, so that every sum has one order.
#pragma once
#include "attention/attention.hpp"

namespace fastnn::cuda {

constexpr int64_t kMaxSize = 128;

// Throw std::invalid_argument for types and sizes that have no kernel.
void attention(const AttentionForward& a, void* stream);
// `workspace`: batch x heads x q_length floats.
void attention_backward(const AttentionBackward& a, float* workspace, void* stream);

}  // namespace fastnn::cuda
