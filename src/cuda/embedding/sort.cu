// A stable sort by digits of 8 bits, the lowest first (Satish, Harris and Garland, "Designing
// efficient sorting algorithms for manycore GPUs", IPDPS 2009). Each digit is three kernels:
// how often a digit's values occur in each tile, sums over the tiles before, and the move, for
// which an entry asks how many before it in its tile have the same digit: those in the warp's
// earlier rounds, which the warp counts, and the lanes of this round that match.
#include <utility>

#include "cuda/embedding/embedding.hpp"
#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kLanes = 32, kThreads = 256, kWarps = kThreads / kLanes;
constexpr int kBits = 8, kValues = 1 << kBits;  // a thread has one value of the digit
constexpr int kRounds = 8, kTile = kThreads * kRounds;
static_assert(kValues == kThreads);

__device__ __forceinline__ int digit_of(const Entry& entry, int shift) {
  return int(entry.row >> shift & (kValues - 1));
}

// counts[value][tile]
__global__ void __launch_bounds__(kThreads)
    count_digits(const Entry* const entries, const int64_t count, const int shift,
                 uint32_t* const counts) {
  FASTNN_SHARED(unsigned, often, [kValues]);
  often[threadIdx.x] = 0;
  __syncthreads();
  const int64_t first = int64_t(blockIdx.x) * kTile + threadIdx.x;
#pragma unroll
  for (int r = 0; r < kRounds; r++) {
    const int64_t i = first + r * kThreads;
    if (i < count) atomicAdd(&often[digit_of(entries[i], shift)], 1u);
  }
  __syncthreads();
  counts[int64_t(threadIdx.x) * gridDim.x + blockIdx.x] = often[threadIdx.x];
}

// The sum of what this lane and those before it have.
__device__ __forceinline__ uint32_t sum_of_lanes(uint32_t mine) {
  for (int offset = 1; offset < kLanes; offset *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, mine, offset);
    if (int(threadIdx.x) % kLanes >= offset) mine += other;
  }
  return mine;
}

// A warp a value, a lane kTilesAtOnce neighbouring tiles: what each tile has becomes what the tiles
// before it have; totals[value].
constexpr int kTilesAtOnce = 4;
__global__ void __launch_bounds__(kThreads)
    sum_tiles(uint32_t* const counts, const int64_t tiles, uint32_t* const totals) {
  const int value = int(blockIdx.x) * kWarps + int(threadIdx.x) / kLanes;
  const int lane = int(threadIdx.x) % kLanes;
  uint32_t* mine = counts + value * tiles;
  uint32_t total = 0;
  for (int64_t first = 0; first < tiles; first += kLanes * kTilesAtOnce) {
    const int64_t i = first + lane * kTilesAtOnce;
    uint32_t often[kTilesAtOnce], sum = 0;
#pragma unroll
    for (int t = 0; t < kTilesAtOnce; t++) often[t] = i + t < tiles ? mine[i + t] : 0;
#pragma unroll
    for (int t = 0; t < kTilesAtOnce; t++) sum += often[t];
    const uint32_t up_to = sum_of_lanes(sum);
    uint32_t before = total + up_to - sum;
#pragma unroll
    for (int t = 0; t < kTilesAtOnce; t++) {
      if (i + t < tiles) mine[i + t] = before;
      before += often[t];
    }
    total += __shfl_sync(0xffffffffu, up_to, kLanes - 1);
  }
  if (lane == 0) totals[value] = total;
}

__global__ void __launch_bounds__(kThreads)
    move(const Entry* const entries, Entry* const to, const int64_t count, const int shift,
         const uint32_t* const counts, const uint32_t* const totals) {
  FASTNN_SHARED(uint32_t, of_warps, [kWarps]);
  FASTNN_SHARED(uint32_t, place, [kWarps][kValues]);  // of a warp's first entry of a value
  const int lane = int(threadIdx.x) % kLanes, warp = int(threadIdx.x) / kLanes;
#pragma unroll
  for (int w = 0; w < kWarps; w++) place[w][threadIdx.x] = 0;
  __syncthreads();
  // A warp has kRounds times 32 entries that follow each other.
  const int64_t first = int64_t(blockIdx.x) * kTile + warp * kLanes * kRounds + lane;
  Entry mine[kRounds];
  uint32_t rank[kRounds];  // in the warp
#pragma unroll
  for (int r = 0; r < kRounds; r++) {
    const int64_t i = first + r * kLanes;
    mine[r] = i < count ? entries[i] : Entry{0, 0};
  }
#pragma unroll
  for (int r = 0; r < kRounds; r++) {
    const bool exists = first + r * kLanes < count;
    const int digit = digit_of(mine[r], shift);
    // Lanes without an entry have a value of their own.
    const unsigned same = __match_any_sync(0xffffffffu, exists ? digit : kValues);
    const int before = __popc(same & ((1u << lane) - 1));
    const uint32_t earlier = exists ? place[warp][digit] : 0;
    rank[r] = earlier + before;
    __syncwarp();
    if (exists && before == 0) place[warp][digit] = earlier + __popc(same);
    __syncwarp();
  }
  // Where the entries of this thread's value begin: behind those of smaller ones, which are added
  // up over lanes and warps, and behind those of the tiles before.
  const int value = int(threadIdx.x);
  const uint32_t total = totals[value], up_to = sum_of_lanes(total);
  if (lane == kLanes - 1) of_warps[warp] = up_to;
  __syncthreads();
  uint32_t at = up_to - total + counts[int64_t(value) * gridDim.x + blockIdx.x];
  for (int w = 0; w < warp; w++) at += of_warps[w];
#pragma unroll
  for (int w = 0; w < kWarps; w++) {
    const uint32_t often = place[w][value];
    place[w][value] = at;
    at += often;
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRounds; r++)
    if (first + r * kLanes < count) to[place[warp][digit_of(mine[r], shift)] + rank[r]] = mine[r];
}

}  // namespace

int64_t sort_counts(int64_t count) { return kValues * (ceil_div(count, kTile) + 1); }

Entry* sort(Entry* entries, Entry* others, uint32_t* counts, int64_t count, int64_t rows,
            void* stream) {
  const int64_t tiles = ceil_div(count, kTile);
  const dim3 grid{unsigned(tiles)}, block(kThreads);
  uint32_t* totals = counts + kValues * tiles;
  for (int shift = 0; shift < 32 && uint64_t(rows - 1) >> shift; shift += kBits) {
    launch(count_digits, grid, block, 0, stream, static_cast<const Entry*>(entries), count, shift,
           counts);
    launch(sum_tiles, dim3(kValues / kWarps), block, 0, stream, counts, tiles, totals);
    launch(move, grid, block, 0, stream, static_cast<const Entry*>(entries), others, count, shift,
           static_cast<const uint32_t*>(counts), static_cast<const uint32_t*>(totals));
    std::swap(entries, others);
  }
  return entries;
}

}  // namespace fastnn::cuda
