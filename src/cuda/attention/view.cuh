// What forward and backward have in common: one head's operands, and what becomes of a product of a
// query and a key.
#pragma once
#include <stdexcept>
#include <string>

#include "common/philox.hpp"
#include "cuda/attention/attention.hpp"
#include "cuda/gemm/modes.cuh"

namespace fastnn::cuda {

constexpr int kThreads = 128;
constexpr int kRows = 64;  // of queries, or of keys, that a block keeps: 16 a warp
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Head {
  int64_t batch, head, kv_head;
};

__device__ inline int64_t offset(const AttentionOperand& x, int64_t batch, int64_t head) {
  return batch * x.strides[0] + head * x.strides[1];
}

// Rows of one head: (length, size).
template <class Element>
__device__ inline Source rows_of(const AttentionOperand& x, int64_t batch, int64_t head,
                                 int64_t length, int64_t size, bool pieces) {
  return {x.data + offset(x, batch, head) * int64_t(sizeof(Element)),
          length,
          size,
          x.strides[2],
          x.strides[3],
          pieces};
}

// Whether rows can be copied 16 bytes at a time.
inline bool in_pieces(const AttentionOperand& x, int size) {
  bool fits = x.strides[3] == 1 && reinterpret_cast<uintptr_t>(x.data) % kPieceBytes == 0;
  for (int d = 0; d < 3; d++) fits = fits && x.strides[d] * size % kPieceBytes == 0;
  return fits;
}

// The score of query i and key j of one head, from their product; -infinity where the query does
// not see the key.
struct Scores {
  const Attention& a;
  const char* mask;
  float slope, scale;
  uint64_t threshold, dropout_row;
  float kept;  // what a probability is multiplied with that was not dropped

  __device__ Scores(const Attention& a, const Head& h)
      : a(a),
        mask(nullptr),
        slope(0),
        scale(float(a.scale)),
        threshold(0),
        dropout_row(0),
        kept(1) {
    if (a.mask.data)
      mask = a.mask.data + offset(a.mask, h.batch, h.head) * int64_t(mask_size(a.mask_type));
    if (a.slopes) slope = a.slopes[h.batch * a.slopes_batch + h.head * a.slopes_head];
    if (a.dropout > 0) {
      threshold = dropout_threshold(a.dropout);
      dropout_row = uint64_t(h.batch * a.heads + h.head) * uint64_t(a.q_length);
      kept = a.dropout < 1 ? float(1 / (1 - a.dropout)) : 0.0f;
    }
  }

  __device__ static int mask_size(DType type) {
    return type == DType::u8 ? 1 : type == DType::f32 ? 4 : 2;
  }

  __device__ bool sees(int64_t i, int64_t j) const {
    return i < a.q_length && j < a.k_length && j - i >= a.low && j - i <= a.high;
  }

  __device__ float of(float product, int64_t i, int64_t j) const {
    if (!sees(i, j)) return -kInfinity;
    float score = product * scale;
    if (mask) {
      const int64_t at = i * a.mask.strides[2] + j * a.mask.strides[3];
      switch (a.mask_type) {
        case DType::u8:
          if (!mask[at]) return -kInfinity;
          break;
        case DType::bf16:
          score += to_float(reinterpret_cast<const __nv_bfloat16*>(mask)[at]);
          break;
        case DType::f16:
          score += to_float(reinterpret_cast<const __half*>(mask)[at]);
          break;
        default:
          score += reinterpret_cast<const float*>(mask)[at];
      }
    }
    if (a.slopes) score -= slope * fabsf(float(i + a.shift - j));
    return score;
  }

  // 0 for a probability that is dropped.
  __device__ float keeps(int64_t i, int64_t j) const {
    if (!threshold) return 1;
    const uint64_t keys = (uint64_t(a.k_length) + 3) / 4 * 4;
    const uint64_t element = (dropout_row + uint64_t(i)) * keys + uint64_t(j);
    // The seed is read again each time: kept in registers, there are too few for the sums.
    const PhiloxWords words = philox(*a.seed, element / 4);
    // Chosen, not indexed, which would put them into memory.
    const uint32_t low = element & 1 ? words.word[1] : words.word[0];
    const uint32_t high = element & 1 ? words.word[3] : words.word[2];
    return (element & 2 ? high : low) >= threshold ? kept : 0;
  }
};

// The place of an element that mma.sync leaves a thread, in its warp's rows and a tile's 8 columns.
__device__ __forceinline__ int row_of(int e) { return int(threadIdx.x) % 32 / 4 + e / 2 * 8; }
__device__ __forceinline__ int column_of(int e) { return int(threadIdx.x) % 4 * 2 + e % 2; }

// Of the four threads that share a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ inline int64_t at_least(int64_t x, int64_t y) { return x < y ? y : x; }
__device__ inline int64_t at_most(int64_t x, int64_t y) { return x < y ? x : y; }

// Calls f(Mode{}, integer_constant<padded size>) for the type and the longer of the two sizes.
template <class F>
void with_kernel(const Attention& a, F f) {
  const int64_t size = a.head_size > a.value_size ? a.head_size : a.value_size;
  if (size > kMaxSize)
    throw std::invalid_argument("attention: no CUDA kernel for rows of " + std::to_string(size));
  auto sized = [&](auto mode) {
    if (size <= 32)
      f(mode, std::integral_constant<int, 32>{});
    else if (size <= 64)
      f(mode, std::integral_constant<int, 64>{});
    else
      f(mode, std::integral_constant<int, 128>{});
  };
  switch (a.type) {
    case DType::f32:
      return sized(SplitF32<3>{});
    case DType::bf16:
      return sized(Bf16{});
    case DType::f16:
      return sized(F16{});
    default:
      throw std::invalid_argument(std::string("attention: no CUDA kernel for ") +
                                  dtype_name(a.type));
  }
}

}  // namespace fastnn::cuda
