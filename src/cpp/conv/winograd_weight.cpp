// The filters' gradient by Winograd's algorithm, transposed: for transformed tiles u of inputs and
// z of the results' gradients, the sum over tiles of u z, for each position, channel and filter,
// and then each filter's taps from its positions.
#include <algorithm>
#include <atomic>
#include <iterator>
#include <vector>

#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "conv/winograd.hpp"
#include "conv/winograd_tiles.hpp"

namespace fastnn {

namespace {

// A tap is rounded as if it were as large as the products of all of a tile's inputs with all of its
// results' gradients, of which it has a sixteenth where these are alike. Its own products must not
// be smaller than this part of them all.
constexpr double kLeastShare = 1. / 512;
constexpr int64_t kMostInRow = 32;  // tiles that are brought to a slab together

// The magnitudes of a piece's products: all, and those of each tap.
struct Magnitudes {
  double all = 0, tap[kMostWinogradTaps * kMostWinogradTaps] = {};
  void add(const Magnitudes& other) {
    all += other.all;
    for (size_t t = 0; t < std::size(tap); t++) tap[t] += other.tap[t];
  }
  void add(const WinogradKernels& way, const float* x, const float* y) {
    float all_x = 0;
    for (int i = 0; i < way.span * way.span; i++) all_x += x[i];
    all += double(all_x) * (double(y[0]) + y[1] + y[2] + y[3]);
    for (int r = 0; r < way.taps; r++)
      for (int q = 0; q < way.taps; q++) {
        const float* at = x + r * way.span + q;
        const int next = way.step, below = way.step * way.span;
        tap[r * way.taps + q] +=
            at[0] * y[0] + at[next] * y[1] + at[below] * y[2] + at[below + next] * y[3];
      }
  }
  bool even_enough(const WinogradKernels& way) const {
    return !std::any_of(tap, tap + way.taps * way.taps,
                        [&](double own) { return own < all * kLeastShare; });
  }
};

// Some channels of a panel of filters, (channel, tap, filter), to where w has them.
void store_taps(const Tensor5& w, int taps, int64_t channel, int channels, int64_t filter,
                int filters, const float* g, int64_t panel) {
  const auto transpose = conv_kernels().transpose[size_index(4)];
  const int all = taps * taps;
  float* to = reinterpret_cast<float*>(w.data) + filter * w.stride[0] + channel * w.stride[1];
  Lane lanes[kWinogradSum * kMostWinogradTaps * kMostWinogradTaps];
  if (w.stride[4] == 1 && w.stride[3] == taps && w.stride[1] == all) {
    for (int l = 0; l < channels * all; l++)
      lanes[l] = {reinterpret_cast<const char*>(g + l * panel), 0, filters};
    return transpose(to, w.stride[0], lanes, channels * all, 1, filters);
  }
  for (int t = 0; t < all; t++) {
    float* at = to + t / taps * w.stride[3] + t % taps * w.stride[4];
    const float* from = g + t * panel;
    if (w.stride[1] == 1) {
      for (int l = 0; l < channels; l++)
        lanes[l] = {reinterpret_cast<const char*>(from + l * all * panel), 0, filters};
      transpose(at, w.stride[0], lanes, channels, 1, filters);
    } else {
      for (int l = 0; l < channels; l++)
        for (int f = 0; f < filters; f++)
          at[f * w.stride[0] + l * w.stride[1]] = from[l * all * panel + f];
    }
  }
}

}  // namespace

bool winograd_weight(const Conv& c) {
  const WinogradKernels* found = winograd_way(c, Pass::weight);
  if (!found) return false;
  const WinogradKernels& way = *found;
  const TileGrid grid(c.y);
  const TileSource x{c.x, way.input, way.span, 2 * way.step, c.padding[1], c.padding[2]};
  const TileSource y{c.y, way.spread, 2, 2, 0, 0};
  const int64_t channels = c.w.size[1], filters = c.w.size[0];
  const int64_t panel = way.panel, panels = ceil_div(filters, panel);
  const int64_t depth = x.depth(), z_depth = std::max(y.depth(), panels * panel);
  const int64_t positions = way.products * way.products, groups = depth / kWinogradSum;
  // As many tiles at once as the cores' common cache holds, in blocks of whole sums.
  const int64_t most = std::max(kWinogradGroup, kSharedTiles / (positions * 4 * (depth + z_depth)));
  const int64_t blocks = ceil_div(grid.count, most);
  const int64_t block = ceil_div(ceil_div(grid.count, blocks), kWinogradSum) * kWinogradSum;
  const int64_t u_step = depth * block, z_step = z_depth * block;
  const int64_t m_step = panels * depth * panel;  // from a position to the next
  auto* u = static_cast<float*>(
      scratch(Scratch::packed_b, size_t(positions * (u_step + z_step)) * sizeof(float)));
  float* z = u + positions * u_step;
  auto* m = static_cast<float*>(scratch(Scratch::misc, size_t(positions * m_step) * sizeof(float)));
  const int64_t in_row = std::min(grid.columns, kMostInRow);
  const int64_t zeros_floats = std::max(depth, y.depth()),
                slab_floats = std::max(x.slab(in_row), y.slab(in_row)),
                g_floats = kWinogradSum * way.taps * way.taps * panel;
  const int64_t each = ceil_div(zeros_floats + slab_floats + g_floats, 16) * 16;
  const int threads = max_threads();
  auto* memory =
      static_cast<float*>(scratch(Scratch::accumulator, size_t(each * threads) * sizeof(float)));

  std::vector<Magnitudes> magnitudes(size_t(ceil_div(block, kTilesPiece)));
  Magnitudes total;
  std::vector<std::atomic<int64_t>> next_piece(static_cast<size_t>(blocks)),
      next_unit(static_cast<size_t>(blocks));
  parallel(threads, [&](int thread, int came) {
    float* const zeros = memory + each * thread;
    float* const slab = zeros + zeros_floats;
    std::fill_n(zeros, zeros_floats, 0.f);
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t begin = b * block, end = std::min(grid.count, begin + block);
      const TileTarget to_u{begin, u, block * kWinogradSum, u_step},
          to_z{begin, z, block * kWinogradSum, z_step};
      if (b > 0 && came > 1) barrier();  // until nobody reads the last block's any more
      for (int64_t i; (i = next_piece[size_t(b)].fetch_add(1)) * kTilesPiece < end - begin;) {
        const int64_t from = begin + i * kTilesPiece, to = std::min(end, from + kTilesPiece);
        float of_x[kTilesPiece][kMostWinogradSpan * kMostWinogradSpan];
        transform_tiles(x, grid, kMostInRow, to_u, from, to, zeros, slab,
                        [&](int64_t tile, const float* sums) {
                          std::copy_n(sums, way.span * way.span, of_x[tile - from]);
                        });
        Magnitudes& sum = magnitudes[size_t(i)] = {};
        transform_tiles(
            y, grid, kMostInRow, to_z, from, to, zeros, slab,
            [&](int64_t tile, const float* sums) { sum.add(way, of_x[tile - from], sums); });
        // Filters that fill the last panel.
        for (int64_t p = 0; z_depth > y.depth() && p < positions; p++)
          for (int64_t d = y.depth(); d < z_depth; d += kWinogradSum)
            std::fill_n(z + p * z_step + d * block + (from - begin) * kWinogradSum,
                        (to - from) * kWinogradSum, 0.f);
      }
      if (came > 1) barrier();
      // In the order of the tiles, whichever thread saw them.
      for (int64_t i = 0; thread == 0 && i * kTilesPiece < end - begin; i++)
        total.add(magnitudes[size_t(i)]);
      for (int64_t unit; (unit = next_unit[size_t(b)].fetch_add(1)) < positions * panels;) {
        const int64_t p = unit / panels, filter = unit % panels * panel;
        for (int64_t group = 0; group < groups; group++)
          way.weight_product(
              u + p * u_step + group * to_u.group, z + p * z_step, to_z.group, filter, end - begin,
              m + p * m_step + (filter * groups + group * panel) * kWinogradSum, b > 0);
      }
    }
  });

  std::atomic<bool> refused{!total.even_enough(way)};
  std::atomic<int64_t> next{0};
  if (!refused)
    parallel(threads, [&](int thread, int) {
      float* const g = memory + each * thread + zeros_floats + slab_floats;
      for (int64_t unit; (unit = next.fetch_add(1)) < panels * groups;) {
        const int64_t filter = unit / groups * panel, channel = unit % groups * kWinogradSum;
        const int some = int(std::min(kWinogradSum, channels - channel));
        for (int i = 0; i < some; i++)
          if (!way.gather(m + filter * depth + (channel + i) * panel, m_step,
                          g + i * way.taps * way.taps * panel))
            refused = true;
        store_taps(c.w, way.taps, channel, some, filter, int(std::min(panel, filters - filter)), g,
                   panel);
      }
    });
  scratch_trim();
  count_call(refused ? "winograd refused" : "winograd");
  return !refused;
}

}  // namespace fastnn
