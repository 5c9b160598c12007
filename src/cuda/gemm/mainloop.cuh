// The main loop of a product: what a block of threads computes of C, from the first copy to its
// sums in shared memory. Who calls it says how tiles of A and B are copied: matrices in gemm.cu,
// images in conv/.
#pragma once
#include <type_traits>

#include "cuda/gemm/modes.cuh"

namespace fastnn::cuda {

template <int m, int n, int warps_m, int warps_n>
struct Shape {
  static constexpr int kM = m, kN = n, kWarpsN = warps_n, kThreads = 32 * warps_m * warps_n;
  static constexpr int kRows = m / warps_m / 16, kColumns = n / warps_n / 8;  // fragments of a warp
};
using Large = Shape<128, 128, 2, 4>;
using LargeGroups = Shape<128, 64, 4, 2>;  // half as many sums a thread, which has them twice
using Small = Shape<64, 64, 2, 2>;
constexpr int kStages = 4;
// Blocks of large tiles from which on there are enough for every multiprocessor.
constexpr int64_t kEnoughBlocks = 96;

// Tiles are taken in strips of so many rows of tiles, so that those computed at a time share their
// operands in L2.
constexpr int kStrip = 8;

struct TilePlace {
  int64_t row, column;
};

// Counts in the type of `index`: 64 bits make each division a call.
template <class Index>
__device__ __forceinline__ TilePlace tile_place(Index index, std::common_type_t<Index> rows,
                                                std::common_type_t<Index> columns,
                                                std::common_type_t<Index> at_a_time = kStrip) {
  const Index strip = index / (at_a_time * columns), first = strip * at_a_time;
  const Index height = rows - first < at_a_time ? rows - first : at_a_time;
  const Index within = index - strip * at_a_time * columns;
  return {first + within % height, within / height};
}

// Where a tile's sums lie in shared memory between the tensor cores and C. Rows are turned by 8
// columns each, so that what a warp writes at a time, pairs of four rows, meets every bank once.
template <class S>
__device__ __forceinline__ int staged_at(int row, int column) {
  return row * S::kN + (column + 8 * row) % S::kN;
}

struct Unscaled {
  static constexpr bool kScaled = false;
};

// sums[i][j] of the block's tile, in shared memory at staged_at(); every thread sees them. Returns
// whether one is not finite, of float32 that is split: parts of an infinity, or of a number whose
// products leave float32's range on the way, multiply to NaN where float32 has a number or an
// infinity, and such a tile is to be computed again without parts.
//
// `steps` of 32 bits, because 64 take a register more than there are where float32 is split in two:
// 2^31 of them are 128 GiB of one row.
// load(step, a, b) begins to copy tiles A and B of a step of K; it is called in the order of steps.
// `scales`: where a group of steps ends, and what its sums are multiplied with, by column.
template <class Mode, class S, class A, class B, class Load, class Scales = Unscaled>
__device__ __forceinline__ bool tile_sums(char* shared, int steps, Load&& load,
                                          const Scales& scales = {}) {
  using Sum = typename Mode::Sum;
  constexpr int kStageBytes = A::kBytes + B::kBytes;
  constexpr bool kSplit = sizeof(typename Mode::Element) == 4;
  constexpr bool kTotals = Mode::kGroup || Scales::kScaled;
  constexpr float kMost = 3.402823466e38f;
  static_assert(kStages * kStageBytes >= S::kM * S::kN * int(sizeof(Sum)));

  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int warp_row = warp / S::kWarpsN * S::kRows * 16,
            warp_column = warp % S::kWarpsN * S::kColumns * 8;
  Sum sums[S::kRows][S::kColumns][4] = {};
  Sum totals[kTotals ? S::kRows : 1][S::kColumns][4] = {};  // of the groups before

  auto begin = [&](int step) {
    if (step < steps) {
      char* stage = shared + step % kStages * kStageBytes;
      load(step, stage, stage + A::kBytes);
    }
    ptx::cp_async_commit();  // an empty group where nothing is left, so that the count below holds
  };
  for (int s = 0; s < kStages - 1; s++) begin(s);
  for (int step = 0; step < steps; step++) {
    ptx::cp_async_wait<kStages - 2>();
    // Everyone's copies of this step are there, and nobody reads the stage that is filled next.
    __syncthreads();
    begin(step + kStages - 1);
    const char* stage = shared + step % kStages * kStageBytes;
    Mode::template step<A, B>(sums, stage, stage + A::kBytes, warp_row, warp_column);
    if constexpr (Mode::kGroup)
      if (step % Mode::kGroup == Mode::kGroup - 1 || step == steps - 1) {
#pragma unroll
        for (int i = 0; i < S::kRows; i++)
#pragma unroll
          for (int j = 0; j < S::kColumns; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) totals[i][j][e] += sums[i][j][e], sums[i][j][e] = 0;
      }
    if constexpr (Scales::kScaled)
      if (scales.ends(step))
#pragma unroll
        for (int j = 0; j < S::kColumns; j++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const float scale = scales.at(step, warp_column + 8 * j + lane % 4 * 2 + e % 2);
#pragma unroll
            for (int i = 0; i < S::kRows; i++)
              totals[i][j][e] += sums[i][j][e] * scale, sums[i][j][e] = 0;
          }
  }
  ptx::cp_async_wait<0>();

  bool finite = true;
  __syncthreads();  // everyone has read the last stage
  auto* staged = reinterpret_cast<Sum*>(shared);
#pragma unroll
  for (int i = 0; i < S::kRows; i++)
#pragma unroll
    for (int j = 0; j < S::kColumns; j++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const Sum* sum = (kTotals ? totals[i] : sums[i])[j] + 2 * half;
        if constexpr (kSplit) finite = finite && fabsf(sum[0]) <= kMost && fabsf(sum[1]) <= kMost;
        Sum* to = staged + staged_at<S>(warp_row + 16 * i + lane / 4 + 8 * half,
                                        warp_column + 8 * j + lane % 4 * 2);
        to[0] = sum[0], to[1] = sum[1];
      }
  return __syncthreads_or(!finite);
}

}  // namespace fastnn::cuda
