// What forward and backward have in common: one head's operands, and who has what of a tile.
#pragma once
#include <stdexcept>
#include <string>

#include "cuda/attention/attention.hpp"
#include "cuda/gemm/modes.cuh"

namespace fastnn::cuda {

constexpr int kThreads = 128;
constexpr int kRows = 64;  // of queries, or of keys, that a block keeps: 16 a warp
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Head {
  int64_t batch, head, kv_head;
};

// Whose rows can be copied 16 bytes at a time.
struct Pieces {
  bool q, k, v, grad;
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

// Begins to copy all 64 bytes wide tiles of these rows.
template <class Tile, int chunks>
__device__ __forceinline__ void load_rows(char* to, const Source& from, int64_t row) {
  if (from.pieces) {
#pragma unroll
    for (int c = 0; c < chunks; c++)
      Tile::load_pieces(to + c * Tile::kBytes, from, row, c * Tile::kDepth);
  } else {
#pragma unroll 1
    for (int c = 0; c < chunks; c++)
      Tile::load_elements(to + c * Tile::kBytes, from, row, c * Tile::kDepth);
  }
}

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
