// What Winograd's convolution and its filters' gradient share: tiles, and their transformation.
#pragma once
#include <algorithm>

#include "common/integers.hpp"
#include "conv/conv.hpp"
#include "conv/kernels.hpp"

namespace fastnn {

// Transformed tiles of no more bytes than this stay in the cache that the cores share.
constexpr int64_t kSharedTiles = 4 << 20;
// Tiles that a thread transforms for all.
constexpr int64_t kTilesPiece = 8;

enum class Pass { forward, input, weight };
// The kernels for y from x, x from y, or w from both; null where there are none or these would be
// slower.
const WinogradKernels* winograd_way(const Conv& c, Pass pass);

// Tiles of 2 x 2 positions of `out`, row by row and image by image.
struct TileGrid {
  int64_t rows, columns, count;
  explicit TileGrid(const Tensor5& out)
      : rows(ceil_div(out.size[3], 2)),
        columns(ceil_div(out.size[4], 2)),
        count(out.size[0] * rows * columns) {}
};

// Tiles of one row of one image.
struct TileRun {
  int64_t image, row, column;  // of tiles
  int64_t begin, length;
};

// The runs in [begin, end), each of at most `most`.
template <class F>
void for_runs(const TileGrid& grid, int64_t most, int64_t begin, int64_t end, F f) {
  for (int64_t t = begin; t < end;) {
    TileRun r;
    r.column = t % grid.columns;
    r.row = t / grid.columns % grid.rows;
    r.image = t / grid.columns / grid.rows;
    r.begin = t;
    r.length = std::min({grid.columns - r.column, end - t, most});
    f(r);
    t += r.length;
  }
}

// Where tiles come from: span x span pixels of x each, `apart` from each other, from -top, -left
// on; with zeros where x ends.
struct TileSource {
  const Tensor5& x;
  WinogradTransformFn transform;
  int span;
  int64_t apart, top, left;

  // Channels, with zeros up to whole sums.
  int64_t depth() const { return ceil_div(x.size[1], kWinogradSum) * kWinogradSum; }
  // Whether channels are neighbours, to be read where they lie. Else they are brought to a slab.
  bool in_place() const { return x.stride[1] == 1; }
  int64_t columns(int64_t tiles) const { return apart * (tiles - 1) + span; }
  int64_t slab(int64_t tiles) const { return in_place() ? 0 : span * columns(tiles) * depth(); }
};

// Where they go: (position, channels / kWinogradSum, tile, kWinogradSum), from tile `begin` on.
struct TileTarget {
  int64_t begin;
  float* u;
  int64_t group, step;  // from some channels, from a position to the next
};

// Transforms tiles [begin, end), at most `most` of a row at once, and calls see(tile, sums) with
// the magnitudes of each one's pixels, summed over channels. `zeros` are as many as depth().
template <class See>
void transform_tiles(const TileSource& from, const TileGrid& grid, int64_t most,
                     const TileTarget& to, int64_t begin, int64_t end, const float* zeros,
                     float* slab, See see) {
  const Tensor5& x = from.x;
  const ConvKernels& kernels = conv_kernels();
  const int64_t channels = x.size[1], depth = from.depth();
  const int span = from.span;
  for_runs(grid, most, begin, end, [&](const TileRun& run) {
    const int64_t y0 = from.apart * run.row - from.top, x0 = from.apart * run.column - from.left;
    const int64_t columns = from.columns(run.length);
    const char* image = x.data + run.image * x.stride[0] * 4;
    if (!from.in_place())
      for (int r = 0; r < span; r++) {
        const int64_t y = y0 + r;
        const bool inside = y >= 0 && y < x.size[3];
        const int64_t lo = std::clamp<int64_t>(-x0, 0, columns),
                      hi = std::clamp<int64_t>(x.size[4] - x0, lo, columns);
        Lane lanes[16];
        for (int64_t c = 0; c < channels; c += 16) {
          const int count = int(std::min<int64_t>(16, channels - c));
          for (int l = 0; l < count; l++)
            lanes[l] = {image + ((c + l) * x.stride[1] + y * x.stride[3] + x0 * x.stride[4]) * 4,
                        int32_t(lo), int32_t(inside ? hi : lo)};
          kernels.transpose[size_index(4)](slab + r * columns * depth + c, depth, lanes, count,
                                           x.stride[4], columns);
        }
      }
    const float* pixels[kMostWinogradSpan * kMostWinogradSpan];
    for (int64_t i = 0; i < run.length; i++) {
      for (int r = 0; r < span; r++)
        for (int q = 0; q < span; q++) {
          const int64_t y = y0 + r, column = from.apart * i + q, at = x0 + column;
          const bool inside = y >= 0 && y < x.size[3] && at >= 0 && at < x.size[4];
          pixels[span * r + q] =
              !from.in_place() ? slab + (r * columns + column) * depth
              : inside ? reinterpret_cast<const float*>(image) + y * x.stride[3] + at * x.stride[4]
                       : zeros;
        }
      float sums[kMostWinogradSpan * kMostWinogradSpan];
      const int64_t tile = run.begin + i;
      from.transform(pixels, channels, to.u + (tile - to.begin) * kWinogradSum, to.group, to.step,
                     sums);
      see(tile, sums);
    }
  });
}

}  // namespace fastnn
