// Attention on a GPU; the arguments, and their meaning, are those of the CPU's
// (src/cpp/attention/attention.hpp), of float32, bfloat16 or float16 and rows of any size.
//
// Forward: Dao, arXiv:2307.08691. Its backward adds to the queries' gradients with atomics, in
// whatever order blocks come; here the scores are computed a second time instead, for the queries'
// gradient alone, so that every sum has one order.
#pragma once
#include "attention/attention.hpp"

namespace fastnn::cuda {

// Throw std::invalid_argument for types that have no kernel. `workspace`: as many floats as
// decode_workspace() says.
void attention(const AttentionForward& a, float* workspace, bool batch_invariant, void* stream);
// `workspace`: batch x heads x q_length floats.
void attention_backward(const AttentionBackward& a, float* workspace, void* stream);

// Those for rows that are too long for a block to keep, with the deltas that backward.cu computes.
void attention_long(const AttentionForward& a, void* stream);
void attention_backward_long(const AttentionBackward& a, const float* deltas, void* stream);

}  // namespace fastnn::cuda
