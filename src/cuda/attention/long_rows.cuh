// Rows of more than 128 elements (64 of float32). A block of eight warps keeps the sums of 64 rows
// and of a slice of the result's columns in registers, which is all that it has room for;
// everything else passes by in steps of 64 bytes, like the operands of a matrix product. For each
// block of columns these are first the two that the scores are a product of, of which each half of
// the warps computes half the columns, and then what the weights multiply, of which each half has
// half the slice. In between the halves exchange their weights through shared memory.
#pragma once
#include "cuda/attention/plain.cuh"

namespace fastnn::cuda {

// A place in what passes by: blocks of columns of one head after the other. 31 bits count more long
// rows than there is memory for, and of registers there are few.
struct Passing {
  int low, blocks, heads;  // the first column, how many blocks of a head, and how many heads
  int block = 0, column = low, head = 0;

  __device__ __forceinline__ bool ended() const { return blocks == 0 || head == heads; }
  __device__ __forceinline__ void next(int columns) {
    column += columns;
    if (++block == blocks) block = 0, column = low, head++;
  }
};

template <class Mode>
struct LongRows {
  using Element = typename Mode::Element;
  static constexpr int kColumns = sizeof(Element) == 4 ? 64 : 128;  // that pass by at a time
  static constexpr int kSlice = sizeof(Element) == 4 ? 128 : 256;
  static constexpr int kThreads = 256, kHalf = kThreads / 2, kStages = 4;
  using X = TileOf<Element, kRows, true, kThreads>;
  using Y = TileOf<Element, kColumns, true, kThreads>;
  using Z = TileOf<Element, kSlice, false, kThreads>;
  static constexpr int kDepth = X::kDepth, kWeightTiles = kColumns / kDepth;
  // What is begun of the next block comes after this one's weights.
  static_assert(kWeightTiles >= kStages - 1);
  static constexpr int kBothBytes = X::kBytes + Y::kBytes;
  static constexpr int kStageBytes = kBothBytes > Z::kBytes ? kBothBytes : Z::kBytes;
  static constexpr int kWeightBytes = kWeightTiles * X::kBytes;
  // Behind these, two floats of each row, or of each column that passes by.
  static constexpr size_t kShared =
      kStages * kStageBytes + kWeightBytes + 2 * (kColumns > kRows ? kColumns : kRows) * 4;
  using Products = float[1][kColumns / 16][4];
  using Sums = float[1][kSlice / 16][4];

  __device__ static __forceinline__ char* weights() {
    return dynamic_shared<char>() + kStages * kStageBytes;
  }
  __device__ static __forceinline__ float* floats() {
    return reinterpret_cast<float*>(weights() + kWeightBytes);
  }
  // Of this warp: the first of its rows, of its columns in a block, and of its columns in the
  // slice.
  __device__ static __forceinline__ int warp_row() { return int(threadIdx.x) % kHalf / 32 * 16; }
  __device__ static __forceinline__ int warp_column() {
    return int(threadIdx.x) / kHalf * (kColumns / 2);
  }
  __device__ static __forceinline__ int warp_place() {
    return int(threadIdx.x) / kHalf * (kSlice / 2);
  }
  __device__ static __forceinline__ int chunks(int64_t size) {
    return int((size + kDepth - 1) / kDepth);
  }

  // Where the copies are, and where the products: the copies are ahead by all stages but one.
  Passing copied;
  int step = 0, to = 0, from = 0;

  // Begins to copy a step. load(stage, step, place) knows what it is of.
  template <class Load>
  __device__ __forceinline__ void begin(int steps, const Load& load) {
    if (!copied.ended()) {
      load(dynamic_shared<char>() + to * kStageBytes, step, copied);
      if (++step == steps) step = 0, copied.next(kColumns);
      to = (to + 1) % kStages;
    }
    ptx::cp_async_commit();  // an empty group at the end, so that the count below holds
  }
  // The step that is now there. `plain`: whether it, or what the caller has, needs that.
  template <bool of_z, class Load>
  __device__ __forceinline__ const char* next(int steps, const Load& load, bool& plain) {
    ptx::cp_async_wait<kStages - 2>();
    const char* stage = dynamic_shared<char>() + from * kStageBytes;
    bool large = plain;
    if constexpr (of_z)
      large |= any_large<Z>(stage);
    else
      large |= any_large<X>(stage) || any_large<Y>(stage + X::kBytes);
    // Everyone's copies of this step are there, and nobody reads the stage that is filled next.
    plain = sync_or<Element>(large);
    begin(steps, load);
    from = (from + 1) % kStages;
    return stage;
  }

  // products = x yᵀ of this warp's rows and columns.
  template <class Load>
  __device__ __forceinline__ void multiply(Products& products, int count, int steps,
                                           const Load& load) {
    for (int c = 0; c < count; c++) {
      bool plain = false;
      const char* stage = next<false>(steps, load, plain);
      cuda::step<Mode, X, Y>(plain, products, stage, stage + X::kBytes, warp_row(), warp_column());
    }
  }
  // sums += all warps' weights times z.
  template <class Load>
  __device__ __forceinline__ void add(Sums& sums, const Products& p, int steps, const Load& load) {
    const bool large = put(p);
#pragma unroll 1
    for (int c = 0; c < kWeightTiles; c++) {
      bool plain = large;
      const char* stage = next<true>(steps, load, plain);
      cuda::step<Mode, X, Z>(plain, sums, weights() + c * X::kBytes, stage, warp_row(),
                             warp_place());
    }
  }

  // Puts this warp's weights where everyone reads them; whether one is large.
  __device__ static __forceinline__ bool put(const Products& p) {
    bool large = false;
#pragma unroll
    for (int j = 0; j < kColumns / 16; j++)
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const int row = warp_row() + row_of(e), column = warp_column() + 8 * j + column_of(0);
        char* at = weights() + column / kDepth * X::kBytes +
                   X::offset(row, column % kDepth / X::kEach) +
                   column % X::kEach * int(sizeof(Element));
        *reinterpret_cast<Pair<Element>*>(at) = {from_float<Element>(p[0][j][e]),
                                                 from_float<Element>(p[0][j][e + 1])};
        large |= !(fabsf(p[0][j][e]) <= kMostInParts && fabsf(p[0][j][e + 1]) <= kMostInParts);
      }
    return large;
  }
};

// An operand's rows as a product's right operand that lies across.
__device__ inline Source across(Source rows) {
  return {rows.data, rows.k, rows.extent, rows.k_stride, rows.extent_stride, rows.pieces};
}

}  // namespace fastnn::cuda
