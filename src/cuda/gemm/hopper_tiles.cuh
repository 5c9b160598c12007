// Tiles of A and B as the copy engine brings them and wgmma reads them.
#pragma once
#include "cuda/gemm/tiles.cuh"
#include "cuda/ptx_sm90.cuh"
#include "cuda/warpgroups.cuh"

namespace fastnn::cuda {

constexpr int kRows = 128;    // of a tile
constexpr int kRowOfK = 128;  // bytes of K in a tile: one row of the swizzling pattern

// `extent` rows of A, or columns of B, times 128 bytes of K. K runs along the rows of 128 bytes,
// or, `across`, 64 elements of M or N do (16-bit ones), in as many boxes as it takes.
template <int size, int extent, bool across>
struct HopperTile {
  static constexpr int kBytes = extent * kRowOfK;
  static constexpr int kBoxExtent = across ? kRowOfK / size : extent;
  static constexpr int kBoxBytes = kBoxExtent * kRowOfK;
  static_assert(!across || size == 2);

  __device__ static __forceinline__ void load(char* to, const TensorMap& map, uint64_t* full,
                                              int first, int k, const int (&batch)[3], bool deep) {
#pragma unroll
    for (int box = 0; box < extent / kBoxExtent; box++) {
      const int from = first + box * kBoxExtent;
      const int inner = across ? from : k, outer = across ? k : from;
      if (deep)
        ptx::copy_tile<5>(to + box * kBoxBytes, map, full,
                          {inner, outer, batch[0], batch[1], batch[2]});
      else
        ptx::copy_tile<3>(to + box * kBoxBytes, map, full, {inner, outer, batch[0]});
    }
  }
  // Of the rows or columns from `first` on, a multiple of 64.
  __device__ static __forceinline__ uint64_t descriptor(const char* tile, int first) {
    return ptx::matrix_descriptor(tile + first * kRowOfK, across ? kBoxBytes : kPieceBytes,
                                  kPattern, Swizzle::bytes128);
  }
  // From one instruction's 32 bytes of K to the next: within the pattern's rows, or 16 rows on.
  static constexpr uint64_t kNext = (across ? 16 * kRowOfK : 32) / 16;
};
constexpr int kInstructions = kRowOfK / 32;  // of a step of one tile

}  // namespace fastnn::cuda
