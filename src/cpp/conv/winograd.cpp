#include "conv/winograd.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "conv/kernels.hpp"
#include "conv/winograd_tiles.hpp"
#include "gemm/kernel.hpp"
#include "gemm/prepared.hpp"

namespace fastnn {

namespace {

// Tiles whose products with a panel of filters wait for each other in the second cache, by how many
// products each has.
constexpr int64_t kMostTiles = 56, kMostProducts = 16 * kMostTiles;
// A tile mixes its inputs, and each output is rounded as if it were as large as all of them. An
// output's own inputs must not be smaller than this part of the tile's.
constexpr float kLeastShare = 1.f / 64;
// Filters of no more bytes than this are read anew for every block of tiles, and transformed tiles
// of no more than that stay in a core's second cache.
constexpr int64_t kFewFilters = 5 << 18, kOwnTiles = 3 << 17;
// Filters of which there are more than so many transformed numbers are left as they are.
constexpr double kMostFilters = 1 << 25;

// The correlation with square filters of w[row * rows + channel * channels + tap].
struct Job {
  const WinogradKernels& way;
  const Tensor5& in;
  const Tensor5& out;
  const char* w;
  int64_t rows, row_stride, channel_stride;  // output channels; strides in elements
  const int64_t* tap_stride;                 // of a filter's rows and columns
  bool turned;                               // by 180 degrees
  int64_t top, left;                         // padding
  const Conv& c;

  int64_t taps() const { return way.taps * way.taps; }
  TileSource source() const { return {in, way.input, way.span, 2 * way.step, top, left}; }
  bool channels_inner() const { return out.stride[1] == 1; }
};

struct Sizes {
  TileGrid grid;
  int64_t panel, panels;
  int64_t positions;  // of a transformed tile
  int64_t most;       // tiles that are multiplied together
  int64_t depth;      // channels, with zeros up to whole sums
  int64_t v;          // floats of a panel of filters
  int64_t m_step;     // from a position of a panel's products to the next
  explicit Sizes(const Job& j)
      : grid(j.out),
        panel(j.way.panel),
        panels(ceil_div(j.rows, panel)),
        positions(j.way.products * j.way.products),
        most(kMostProducts / positions),
        depth(j.source().depth()),
        v(positions * depth * panel),
        m_step(most * panel + 16) {}
};

// Transformed tiles; and which of each one's four outputs are zero, because all of their inputs
// are, among nonzero ones of the tile.
struct Tiles : TileTarget {
  int64_t end;
  uint8_t* holes;
};

// The outputs that are zero, from the magnitudes of a tile's inputs. False where an output's own
// inputs are too small a part of its tile's.
bool judge(const WinogradKernels& way, const float* sums, uint8_t& holes) {
  holes = 0;
  float all = 0;
  for (int i = 0; i < way.span * way.span; i++) all += sums[i];
  if (!(all * kLeastShare > 0)) return true;  // nothing there; or NaN, which the results show
  for (int o = 0; o < 4; o++) {
    const float* at = sums + (o / 2 * way.span + o % 2) * way.step;
    float own = 0;
    for (int r = 0; r < way.taps; r++)
      for (int q = 0; q < way.taps; q++) own += at[r * way.span + q];
    if (own == 0)
      holes |= uint8_t(1 << o);
    else if (own < all * kLeastShare)
      return false;
  }
  return true;
}

// The results of tiles [begin, end), at most s.most, and a panel of filters. False where they
// are not finite.
bool multiply(const Job& j, const Sizes& s, const Kernel& kn, const ConvKernels& kernels,
              const Store& store, const Tiles& tiles, int64_t begin, int64_t end, const float* v,
              int64_t panel, float* m) {
  const int64_t count = end - begin, first = begin - tiles.begin, y_row = 2 * count * s.panel;
  const int filters = int(std::min(s.panel, j.rows - panel * s.panel));
  for (int64_t p = 0; p < s.positions; p++)
    j.way.product(tiles.u + p * tiles.step + first * kWinogradSum, tiles.group, count,
                  v + p * s.depth * s.panel, s.depth, m + p * s.m_step);
  float* y = m + s.positions * s.m_step;
  if (!j.way.output(m, s.m_step, count, y, y_row)) return false;
  for (int64_t i = 0; i < count; i++)
    for (int o = 0; o < 4; o++)
      if (tiles.holes[first + i] >> o & 1)
        std::fill_n(y + o / 2 * y_row + (2 * i + o % 2) * s.panel, s.panel, 0.f);

  float* turned = y + 2 * y_row;
  for_runs(s.grid, s.most, begin, end, [&](const TileRun& run) {
    for (int r = 0; r < 2; r++) {
      const int64_t row = 2 * run.row + r, column = 2 * run.column;
      if (row >= j.out.size[3]) continue;
      const int columns = int(std::min(2 * run.length, j.out.size[4] - column));
      const float* from = y + r * y_row + 2 * (run.begin - begin) * s.panel;
      const int64_t at =
          (run.image * j.out.stride[0] + row * j.out.stride[3] + column * j.out.stride[4]) * 4;
      Store to = store;
      to.c += at;
      if (to.residual) to.residual += at;
      if (j.channels_inner()) {
        kn.store(from, int(s.panel), columns, filters, to, 0, panel * s.panel);
        continue;
      }
      Lane lanes[2 * kMostTiles];
      for (int i = 0; i < columns; i++)
        lanes[i] = {reinterpret_cast<const char*>(from + i * s.panel), 0, filters};
      kernels.transpose[size_index(4)](turned, columns, lanes, columns, 1, filters);
      kn.store(turned, columns, filters, columns, to, panel * s.panel, 0);
    }
  });
  return true;
}

// The filters of a panel, transformed: v as (position, channel, filter), with zeros where there is
// no channel and no filter.
void transform_panel(const Job& j, const Sizes& s, const ConvKernels& kernels, int64_t panel,
                     float* v) {
  constexpr int64_t kSome = 16;  // channels at a time
  const int taps = j.way.taps, all = int(j.taps());
  const int64_t channels = j.in.size[1], position = s.depth * s.panel;
  const int filters = int(std::min(s.panel, j.rows - panel * s.panel));
  const char* w = j.w + panel * s.panel * j.row_stride * 4;
  if (s.depth > channels)
    for (int64_t p = 0; p < s.positions; p++)
      std::fill_n(v + p * position + channels * s.panel, (s.depth - channels) * s.panel, 0.f);
  // A filter's taps, of some channels, that are neighbours are turned all at once.
  const bool taps_inner = j.tap_stride[1] == 1 && j.tap_stride[0] == taps;
  const bool whole = taps_inner && j.channel_stride == all;
  float copy[kSome * kMostWinogradTaps * kMostWinogradTaps * kMostWinogradFilters];
  if (filters < s.panel) std::fill_n(copy, kSome * all * s.panel, 0.f);
  Lane lanes[kMostWinogradFilters];
  for (int64_t c0 = 0; c0 < channels; c0 += kSome) {
    const int64_t some = std::min(kSome, channels - c0);
    const char* from = w + c0 * j.channel_stride * 4;
    // To (channel, tap, filter), or (tap, channel, filter).
    auto turn = [&](int64_t at, float* to, int64_t length, int64_t stride) {
      for (int f = 0; f < filters; f++)
        lanes[f] = {from + (f * j.row_stride + at) * 4, 0, int32_t(length)};
      kernels.transpose[size_index(4)](to, s.panel, lanes, filters, stride, length);
    };
    int64_t tap_step = s.panel, channel_step = all * s.panel;
    if (whole) {
      turn(0, copy, some * all, 1);
    } else if (taps_inner) {
      for (int64_t c = 0; c < some; c++)
        turn(c * j.channel_stride, copy + c * channel_step, all, 1);
    } else {
      tap_step = kSome * s.panel, channel_step = s.panel;
      for (int t = 0; t < all; t++)
        turn(t / taps * j.tap_stride[0] + t % taps * j.tap_stride[1], copy + t * tap_step, some,
             j.channel_stride);
    }
    // Turned filters are read from their last tap on.
    const float* first = j.turned ? copy + (all - 1) * tap_step : copy;
    for (int64_t c = 0; c < some; c++)
      j.way.filter(first + c * channel_step, j.turned ? -tap_step : tap_step,
                   v + (c0 + c) * s.panel, position, int(s.panel));
  }
}

bool run(const Job& j) {
  const Kernel& kn = exact_kernel(DType::f32);
  const ConvKernels& kernels = conv_kernels();
  const Sizes s(j);
  Gemm g;
  g.c.data = j.out.data, g.c.rs = j.out.stride[1], g.c.cs = j.out.stride[4];
  if (j.channels_inner()) std::swap(g.c.rs, g.c.cs);
  g.activation = j.c.activation;
  if (j.c.bias)
    g.bias = j.c.bias, g.bias_axis = j.channels_inner() ? BiasAxis::column : BiasAxis::row;
  if (j.c.residual) {
    g.residual = g.c;
    g.residual.data = const_cast<char*>(j.c.residual);
    g.beta = 1;
  }
  const Store store = make_store(g);

  const int threads = max_threads();
  const int64_t tile_bytes = s.positions * s.depth * 4, filters_bytes = s.panels * s.v * 4;
  // Few filters stay in a core's caches, and each thread takes a block of tiles with all of them.
  // Of many, each thread takes some with all tiles, or as many as the cores' common cache holds.
  const bool by_tiles = filters_bytes <= kFewFilters && s.grid.count >= 8 * threads;
  int64_t block = std::clamp(by_tiles ? kOwnTiles / tile_bytes : kSharedTiles / tile_bytes,
                             std::min(int64_t(14), s.most), by_tiles ? s.most : s.grid.count);
  int64_t blocks = ceil_div(s.grid.count, block);
  if (by_tiles && blocks < 8 * threads) blocks = ceil_div(blocks, threads) * threads;
  block = ceil_div(s.grid.count, blocks), blocks = ceil_div(s.grid.count, block);
  const int64_t u_group = block * kWinogradSum, u_step = block * s.depth;

  const float* kept = nullptr;  // all filters, transformed before
  if (j.c.prepared && !j.turned)
    kept = reinterpret_cast<const float*>(
        j.c.prepared->get("winograd", &kn, 0, 0, size_t(filters_bytes), [&](char* to) {
          Prepared::want(j.w, j.c.w.count());
          parallel(threads, [&](int thread, int came) {
            const Range mine = share_of(s.panels, 1, thread, came);
            for (int64_t p = mine.begin; p < mine.end; p++)
              transform_panel(j, s, kernels, p, reinterpret_cast<float*>(to) + p * s.v);
          });
        }));
  // Or each by the thread that takes it, or by all of them at the start.
  const bool own = !kept && !by_tiles && blocks == 1 && s.panels >= 2 * threads;
  const int64_t shared_u = by_tiles ? 0 : s.positions * u_step, holes = ceil_div(block, 64) * 16;
  const int64_t shared_v = kept || own ? 0 : s.panels * s.v;
  float* shared = static_cast<float*>(
      scratch(Scratch::packed_b, size_t(shared_v + shared_u + holes) * sizeof(float)));
  const float* filters = kept ? kept : shared;
  // A thread's own: transformed tiles, filters, zeros, a slab, products and results (twice).
  const int64_t own_u = by_tiles ? s.positions * u_step + holes : 0, own_v = own ? s.v : 0;
  const int64_t products = (s.positions * s.m_step + 2 * 4 * s.most * s.panel + 15) / 16 * 16;
  const TileSource source = j.source();
  const int64_t slab_floats = source.slab(std::min(s.most, s.grid.columns));
  const int64_t each = own_u + own_v + s.depth + slab_floats + products;
  float* memory =
      static_cast<float*>(scratch(Scratch::accumulator, size_t(each * threads) * sizeof(float)));
  // A unit of work is some tiles and a panel.
  const int64_t wanted = own ? 1 : ceil_div(2 * threads, s.panels);
  const int64_t some = std::clamp(ceil_div(block, wanted), int64_t(7), s.most),
                parts = own ? 1 : ceil_div(block, some);

  std::atomic<int64_t> next_panel{0}, next_block{0};
  std::vector<std::atomic<int64_t>> next_piece(static_cast<size_t>(by_tiles ? 0 : blocks)),
      next_unit(static_cast<size_t>(by_tiles ? 0 : blocks));
  std::atomic<bool> refused{false};
  parallel(threads, [&](int thread, int came) {
    float* mine = memory + each * thread;
    float* const u = by_tiles ? mine : shared + shared_v;
    float* const v = mine + own_u;
    float* const zeros = v + own_v;
    float* const slab = zeros + s.depth;
    float* const m = slab + slab_floats;
    std::fill_n(zeros, s.depth, 0.f);
    if (shared_v) {
      for (int64_t p; (p = next_panel.fetch_add(1)) < s.panels;)
        transform_panel(j, s, kernels, p, shared + p * s.v);
      if (came > 1) barrier();
    }
    auto tiles_of = [&](int64_t b) {
      return Tiles{{b * block, u, u_group, u_step},
                   std::min(s.grid.count, (b + 1) * block),
                   reinterpret_cast<uint8_t*>(u + s.positions * u_step)};
    };
    auto transform = [&](const Tiles& to, int64_t begin, int64_t end) {
      bool good = true;
      transform_tiles(source, s.grid, s.most, to, begin, end, zeros, slab,
                      [&](int64_t tile, const float* sums) {
                        good = judge(j.way, sums, to.holes[tile - to.begin]) && good;
                      });
      return good;
    };
    if (by_tiles) {
      for (int64_t b; !refused && (b = next_block.fetch_add(1)) < blocks;) {
        const Tiles t = tiles_of(b);
        bool good = transform(t, t.begin, t.end);
        for (int64_t p = 0; good && p < s.panels; p++)
          good = multiply(j, s, kn, kernels, store, t, t.begin, t.end, filters + p * s.v, p, m);
        if (!good) refused = true;
      }
      return;
    }
    for (int64_t b = 0; b < blocks; b++) {
      const Tiles t = tiles_of(b);
      if (b > 0 && came > 1) barrier();  // until nobody reads the last block's any more
      const int64_t count = t.end - t.begin, pieces = ceil_div(count, kTilesPiece);
      for (int64_t i; (i = next_piece[size_t(b)].fetch_add(1)) < pieces;)
        if (!transform(t, t.begin + i * kTilesPiece,
                       std::min(t.end, t.begin + (i + 1) * kTilesPiece)))
          refused = true;
      if (came > 1) barrier();
      for (int64_t unit;
           !refused && (unit = next_unit[size_t(b)].fetch_add(1)) < s.panels * parts;) {
        const int64_t panel = unit / parts, step = own ? some : ceil_div(count, parts);
        const int64_t from = t.begin + unit % parts * step,
                      to = own ? t.end : std::min(t.end, from + step);
        if (own) transform_panel(j, s, kernels, panel, v);
        for (int64_t i = from; i < to; i += step)
          if (!multiply(j, s, kn, kernels, store, t, i, std::min(to, i + step),
                        own ? v : filters + panel * s.v, panel, m))
            refused = true;
      }
    }
  });
  scratch_trim();
  count_call(refused ? "winograd refused" : "winograd");
  return !refused;
}

}  // namespace

const WinogradKernels* winograd_way(const Conv& c, Pass pass) {
  if (c.type != DType::f32 || c.batch_invariant || c.groups != 1 || c.w.size[2] != 1 ||
      c.w.size[3] != c.w.size[4] || c.x.size[2] != 1 || c.y.size[2] != 1 || c.padding[0] != 0 ||
      c.stride[1] != c.stride[2] || c.dilation[1] != 1 || c.dilation[2] != 1)
    return nullptr;
  const bool turned = pass == Pass::input;
  const Tensor5 &in = turned ? c.y : c.x, &out = turned ? c.x : c.y;
  if (in.size[1] < 32 || out.size[1] < 16 || (turned && c.stride[1] != 1)) return nullptr;
  for (const WinogradKernels& way : conv_kernels().winograd) {
    if (way.taps != c.w.size[3] || way.step != c.stride[1]) continue;
    // The time, as measured, in multiplications for each pair of channels: directly one a tap and
    // position, at a rate below the best; and one a product of a tile, of panels that may not be
    // full, besides the tiles' transformations, shared by the channels on the other side, and that
    // of the filters, or their way from memory.
    const auto full = [](int64_t n, int64_t of) {
      return double(ceil_div(n, of) * of) / double(n);
    };
    const double positions = double(out.size[0]) * double(out.size[3] * out.size[4]);
    const double tiles =
        double(out.size[0]) * double(ceil_div(out.size[3], 2) * ceil_div(out.size[4], 2));
    const double multiplied = 1.13 * full(in.size[1], kWinogradSum) * full(out.size[1], way.panel);
    const double transformed = 12 / double(in.size[1]) + 12 / double(out.size[1]);
    const double filters = c.prepared ? 5 : 25;
    const double kept =
        double(way.products * way.products) * double(in.size[1]) * double(out.size[1]);
    if (kept > kMostFilters) return nullptr;
    return way.products * way.products * (tiles * (multiplied + transformed) + filters) <
                   1.11 * double(way.taps * way.taps) * positions
               ? &way
               : nullptr;
  }
  return nullptr;
}

bool is_winograd(const Conv& c) { return winograd_way(c, Pass::forward); }

bool winograd_forward(const Conv& c) {
  const WinogradKernels* way = winograd_way(c, Pass::forward);
  return way && run({*way, c.x, c.y, c.w.data, c.w.size[0], c.w.stride[0], c.w.stride[1],
                     c.w.stride + 3, false, c.padding[1], c.padding[2], c});
}

bool winograd_input(const Conv& c) {
  const WinogradKernels* way = winograd_way(c, Pass::input);
  return way &&
         run({*way, c.y, c.x, c.w.data, c.w.size[1], c.w.stride[1], c.w.stride[0], c.w.stride + 3,
              true, way->taps - 1 - c.padding[1], way->taps - 1 - c.padding[2], c});
}

}  // namespace fastnn
