// Which tiles of C, and which part of K, a persistent block computes after which; and how many
// there are, by the shape alone.
#pragma once
#include <algorithm>

#include "cuda/gemm/hopper_operands.cuh"
#include "cuda/gemm/mainloop.cuh"

namespace fastnn::cuda {

constexpr int kTileStrip = 16;  // rows of tiles that are taken together, see tile_place()
// Multiprocessors of an H100 or H200. The shape of tiles and the number of splits are chosen for
// these, wherever it runs: they are not to change bits from one GPU to the next.
constexpr int kUsualBlocks = 132;
// Of tiles, steps, and what the coordinates of tensor maps count, with room for a tile.
constexpr int64_t kMostCounted = (int64_t(1) << 31) - 512;

struct Work {
  // What is counted here is less than 2 to the power of 31, so that divisions are short.
  uint32_t rows, columns;  // of tiles
  uint32_t steps;          // of K
  uint32_t splits, steps_each;
  uint32_t count;        // of all pieces of work
  int64_t split_stride;  // elements of C from one split's sums to the next one's
  // Batches are the third coordinate of the maps or, deep, the third to the fifth, the innermost of
  // which count to `batch`. Steps are from one to the next, 0 where an operand is shared.
  bool deep;
  uint32_t batch[2];
  int a_step[3], b_step[3];
  int a_parts, b_parts;  // of the third coordinate from part to part
};

struct PieceOfWork {
  uint32_t batch, split, first_step, steps;
  int64_t row, column;
};

// The splits of a tile follow each other, so that they read the same tiles' neighbours at a time.
__device__ __forceinline__ PieceOfWork piece_of(const Work& w, uint32_t index, int columns) {
  PieceOfWork p;
  p.split = index % w.splits, index /= w.splits;
  p.batch = index / (w.rows * w.columns);
  const TilePlace place =
      tile_place(index - p.batch * w.rows * w.columns, w.rows, w.columns, kTileStrip);
  p.row = place.row * kRows, p.column = place.column * columns;
  p.first_step = p.split * w.steps_each;
  p.steps = w.steps - p.first_step < w.steps_each ? w.steps - p.first_step : w.steps_each;
  return p;
}

inline void set_batches(const Batches& batches, const Lying& a, const Lying& b, Work& w) {
  w.deep = batches.dims > 1;
  w.batch[0] = uint32_t(batches.size[0]), w.batch[1] = uint32_t(batches.size[1]);
  std::copy(a.step, a.step + 3, w.a_step), std::copy(b.step, b.step + 3, w.b_step);
}

// Whether tiles of 256 columns take less time than twice as many of 128, which read more.
inline bool wide(int64_t batches, int64_t m, int64_t n) {
  const int64_t rows = ceil_div(m, kRows) * batches;
  const int64_t rounds_wide = ceil_div(rows * ceil_div(n, 256), kUsualBlocks),
                rounds = ceil_div(rows * ceil_div(n, 128), kUsualBlocks);
  return 20 * rounds_wide <= 11 * rounds;
}

// How many ways K is split where there are few tiles: by the shape alone.
inline int64_t splits_of(int size, int64_t batches, int64_t m, int64_t n, int64_t k) {
  constexpr int64_t kFewestSteps = 8;  // of a split
  const int64_t tiles = ceil_div(m, kRows) * ceil_div(n, 128) * batches;
  const int64_t steps = ceil_div(k * size, kRowOfK);
  return std::max<int64_t>(1, std::min(kUsualBlocks / tiles, steps / kFewestSteps));
}

// False where it is too much to be counted.
inline bool count_work(const Gemm& g, int columns, int size, int64_t batches, int64_t splits,
                       Work& w) {
  const int64_t rows = ceil_div(g.m, kRows), across = ceil_div(g.n, columns);
  const int64_t steps = ceil_div(g.k * size, kRowOfK), each = ceil_div(steps, splits);
  const int64_t used = ceil_div(steps, each);  // splits, none without a step
  if (rows * across > kMostCounted / batches / used) return false;
  w.rows = uint32_t(rows), w.columns = uint32_t(across), w.steps = uint32_t(steps);
  w.steps_each = uint32_t(each), w.splits = uint32_t(used);
  w.count = uint32_t(rows * across * batches * used);
  return true;
}

}  // namespace fastnn::cuda
