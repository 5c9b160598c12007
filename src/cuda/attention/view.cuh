// What forward and backward have in common: one head's operands, and who has what of a tile.
#pragma once
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/attention/attention.hpp"
#include "cuda/gemm/modes.cuh"
#include "cuda/types.cuh"

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

// Begins to copy tiles of 64 bytes each, one after the other along their depth.
template <class Tile, int tiles>
__device__ __forceinline__ void load_tiles(char* to, const Source& from, int64_t first,
                                           int64_t k = 0) {
  if (from.pieces) {
#pragma unroll
    for (int i = 0; i < tiles; i++)
      Tile::load_pieces(to + i * Tile::kBytes, from, first, k + i * Tile::kDepth);
  } else {
#pragma unroll 1
    for (int i = 0; i < tiles; i++)
      Tile::load_elements(to + i * Tile::kBytes, from, first, k + i * Tile::kDepth);
  }
}

// f(elements, their first column) for 8 columns after 8.
template <int blocks, class F>
__device__ __forceinline__ void each_block(float (&x)[1][blocks][4], F f) {
#pragma unroll 1
  for (int column = 0; column < 8 * blocks; column += 8) {
    float four[4];
#pragma unroll
    for (int e = 0; e < 4; e++) four[e] = x[0][0][e];
    f(four, column);
#pragma unroll
    for (int e = 0; e < 4; e++) {
#pragma unroll
      for (int j = 0; j + 1 < blocks; j++) x[0][j][e] = x[0][j + 1][e];
      x[0][blocks - 1][e] = four[e];
    }
  }
}

// Two neighbours of a tensor.
template <class Element>
struct alignas(2 * sizeof(Element)) Pair {
  Element first, second;
};

// A warp's sums, of rows from `first` and columns from `from` on, times `scale`: by pairs, where
// they lie so.
template <class Element, int blocks>
__device__ __forceinline__ void store(const AttentionOperand& to, int64_t batch, int64_t head,
                                      int64_t first, int64_t length, int64_t from, int64_t size,
                                      float (&sums)[1][blocks][4], const float (&scale)[2]) {
  auto* data = reinterpret_cast<Element*>(to.data) + offset(to, batch, head);
  const int64_t rows[2] = {first + row_of(0), first + row_of(2)};
  const bool pairs = to.strides[3] == 1 && size % 2 == 0 &&
                     (to.strides[0] | to.strides[1] | to.strides[2]) % 2 == 0 &&
                     reinterpret_cast<uintptr_t>(to.data) % sizeof(Pair<Element>) == 0;
  if (pairs) {
    const int left = int(at_most(size - from, 8 * blocks)) - column_of(0);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (rows[half] >= length) continue;
      Element* at = data + rows[half] * to.strides[2] + from + column_of(0);
#pragma unroll
      for (int d = 0; d < blocks; d++)
        if (8 * d < left)
          *reinterpret_cast<Pair<Element>*>(at + 8 * d) = {
              from_float<Element>(sums[0][d][2 * half] * scale[half]),
              from_float<Element>(sums[0][d][2 * half + 1] * scale[half])};
    }
    return;
  }
  each_block(sums, [&](float (&four)[4], int at) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int64_t column = from + at + column_of(e);
      if (rows[e / 2] < length && column < size)
        data[rows[e / 2] * to.strides[2] + column * to.strides[3]] =
            from_float<Element>(four[e] * scale[e / 2]);
    }
  });
}

template <class Call>
Pieces pieces_of(const Call& a) {
  const int size = a.type == DType::f32 ? 4 : 2;
  Pieces pieces{in_pieces(a.q, size), in_pieces(a.k, size), in_pieces(a.v, size), false};
  if constexpr (std::is_same_v<Call, AttentionBackward>) pieces.grad = in_pieces(a.grad, size);
  return pieces;
}

// Calls f(Mode{}) for the type.
template <class F>
void with_mode(DType type, F f) {
  switch (type) {
    case DType::f32:
      return f(SplitF32<3>{});
    case DType::bf16:
      return f(Bf16{});
    case DType::f16:
      return f(F16{});
    default:
      throw std::invalid_argument(std::string("attention: no CUDA kernel for ") + dtype_name(type));
  }
}

// Calls f(Mode{}, integer_constant<padded size>) for the type and the longer of the two sizes, or
// long_rows() where a block has no room for such rows: three parts of float32 take more of it.
template <class F, class Long>
void with_kernel(const Attention& a, F f, Long long_rows) {
  const int64_t size = a.head_size > a.value_size ? a.head_size : a.value_size;
  with_mode(a.type, [&](auto mode) {
    if (size <= 32) return f(mode, std::integral_constant<int, 32>{});
    if (size <= 64) return f(mode, std::integral_constant<int, 64>{});
    if constexpr (sizeof(typename decltype(mode)::Element) == 2)
      if (size <= 128) return f(mode, std::integral_constant<int, 128>{});
    long_rows();
  });
}

}  // namespace fastnn::cuda
