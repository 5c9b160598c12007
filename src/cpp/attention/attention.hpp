// softmax(scale Q K^T + bias) V, blocked and online: no matrix of Lq x Lk is ever held.
//
// Forward: Milakov and Gimelshein, arXiv:1805.02867 (the online sum), Dao et al., arXiv:2205.14135
// and 2307.08691 (blocks; a backward that computes the probabilities again from the log-sum-exp).
#pragma once
#include <cstdint>
#include <limits>

#include "common/dtype.hpp"

namespace fastnn {

// A tensor of (batch, heads, length, size), its strides in elements; 0 repeats.
struct AttentionOperand {
  char* data = nullptr;
  int64_t strides[4] = {};
};

constexpr int64_t kNoBound = std::numeric_limits<int64_t>::max() / 4;

// What forward and backward are given alike. Query head h reads key and value head
// h / (heads / kv_heads).
struct Attention {
  DType type = DType::f32;  // of q, k, v, out and the gradients
  int64_t batch = 0, heads = 0, kv_heads = 0, q_length = 0, k_length = 0, head_size = 0,
          value_size = 0;
  AttentionOperand q, k, v;
  double scale = 1;
  // (batch, heads, q_length, k_length) in mask_type: u8 holds a boolean, whose 0 excludes a key;
  // else it is added to the scaled scores, in the type above or float32.
  AttentionOperand mask;
  DType mask_type = DType::u8;
  // Query i sees key j where low <= j - i <= high: (-kNoBound, 0) is causal, from the upper left.
  int64_t low = -kNoBound, high = kNoBound;
  // ALiBi (Press et al., arXiv:2108.12409): -slope |i + shift - j| is added; float32, (batch,
  // heads).
  const float* slopes = nullptr;
  int64_t slopes_batch = 0, slopes_head = 0, shift = 0;
  // Probabilities are zero where they are dropped, else divided by 1 - dropout. That of (batch,
  // head, i, j) is element ((batch heads + head) q_length + i) k + j of common/philox.hpp's, where
  // k is k_length rounded up to 4. The seed is read where the kernel runs: nobody waits for a
  // GPU's.
  double dropout = 0;
  const uint64_t* seed = nullptr;

  bool sees_all() const { return low <= 1 - q_length && high >= k_length - 1; }
};

struct AttentionForward : Attention {
  AttentionOperand out;  // (batch, heads, q_length, value_size)
  // (batch, heads, q_length), contiguous, of float32 (float64 for that): log sum exp of the scores,
  // natural; +infinity for a query that sees nothing, whose result is 0. May be null.
  void* log_sum = nullptr;
};

struct AttentionBackward : Attention {
  AttentionOperand out, grad;  // the forward's result and the gradient by it
  const void* log_sum = nullptr;
  AttentionOperand grad_q, grad_k, grad_v;
  // The gradient by every score (before the scale, after the mask), of float32 (float64 for that),
  // or null. Where no query sees a key nothing may be written.
  AttentionOperand grad_scores;
  bool batch_invariant = false;  // the order of sums does not depend on the batch either
};

void attention(const AttentionForward&);
void attention_backward(const AttentionBackward&);

// Which kernels multiply, for `info`.
const char* attention_path(DType type);

}  // namespace fastnn
