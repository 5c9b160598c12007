#include "conv/winograd.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/integers.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "conv/kernels.hpp"
#include "conv/parts.hpp"
#include "gemm/kernel.hpp"
#include "gemm/prepared.hpp"

namespace fastnn {

namespace {

constexpr int kPositions = 16;  // of a transformed tile
// Tiles whose products with a panel of filters wait for each other in the second cache.
constexpr int64_t kMostTiles = 56;
// A tile mixes its 16 inputs, and each output is rounded as if it were as large as all of them. An
// output's own 9 inputs must not be smaller than this part of the tile's.
constexpr float kLeastShare = 1.f / 64;
// Filters of no more bytes than this are read anew for every block of tiles, and transformed tiles
// of no more than these stay in a core's second cache, or in the one that the cores share.
constexpr int64_t kFewFilters = 5 << 18, kOwnTiles = 3 << 17, kSharedTiles = 8 << 20;

// The correlation with 3 x 3 filters of w[row * rows + channel * channels + tap].
struct Job {
  const Tensor5& in;
  const Tensor5& out;
  const char* w;
  int64_t rows, row_stride, channel_stride;  // output channels; strides in elements
  const int64_t* tap_stride;                 // of a filter's rows and columns
  bool turned;                               // by 180 degrees
  int64_t top, left;                         // padding
  const Conv& c;

  // Whether an input's channels are neighbours, to be read where they lie.
  bool in_place() const { return in.stride[1] == 1; }
  bool channels_inner() const { return out.stride[1] == 1; }
};

struct Sizes {
  int64_t tile_rows, tile_columns, tiles;
  int64_t panel, panels;
  int64_t depth;   // channels, with zeros up to whole sums
  int64_t v;       // floats of a panel of filters
  int64_t slab;    // of the inputs of tiles side by side
  int64_t m_step;  // from a position of a panel's products to the next
  Sizes(const Job& j, const ConvKernels& kernels)
      : tile_rows(ceil_div(j.out.size[3], 2)),
        tile_columns(ceil_div(j.out.size[4], 2)),
        tiles(j.out.size[0] * tile_rows * tile_columns),
        panel(kernels.winograd_panel),
        panels(ceil_div(j.rows, panel)),
        depth(ceil_div(j.in.size[1], kWinogradSum) * kWinogradSum),
        v(kPositions * depth * panel),
        slab(j.in_place() ? 0 : 4 * (2 * std::min(kMostTiles, tile_columns) + 2) * depth),
        m_step(kMostTiles * panel + 16) {}
};

// Tiles of one row of one image.
struct TileRun {
  int64_t image, row, column;  // of tiles
  int64_t begin, length;
};

// The runs in [begin, end), each of at most kMostTiles.
template <class F>
void for_runs(const Sizes& s, int64_t begin, int64_t end, F f) {
  for (int64_t t = begin; t < end;) {
    TileRun r;
    r.column = t % s.tile_columns;
    r.row = t / s.tile_columns % s.tile_rows;
    r.image = t / s.tile_columns / s.tile_rows;
    r.begin = t;
    r.length = std::min({s.tile_columns - r.column, end - t, kMostTiles});
    f(r);
    t += r.length;
  }
}

// Transformed tiles [begin, end) as (position, channels / kWinogradSum, tile, kWinogradSum); and
// which of a tile's four outputs are zero, because all of their inputs are, among nonzero ones of
// the tile.
struct Tiles {
  int64_t begin, end;
  float* u;
  int64_t u_group, u_step;  // from some channels, from a position to the next
  uint8_t* holes;
};

// The outputs that are zero, from the magnitudes of a tile's inputs. False where an output's own
// inputs are too small a part of its tile's.
bool judge(const float* sums, uint8_t& holes) {
  holes = 0;
  float all = 0;
  for (int i = 0; i < 16; i++) all += sums[i];
  if (!(all * kLeastShare > 0)) return true;  // nothing there; or NaN, which the results show
  for (int o = 0; o < 4; o++) {
    const float* at = sums + o / 2 * 4 + o % 2;
    float own = 0;
    for (int r = 0; r < 3; r++) own += at[4 * r] + at[4 * r + 1] + at[4 * r + 2];
    if (own == 0)
      holes |= uint8_t(1 << o);
    else if (own < all * kLeastShare)
      return false;
  }
  return true;
}

// Tiles [begin, end) of `to`.
bool transform_tiles(const Job& j, const Sizes& s, const ConvKernels& kernels, const Tiles& to,
                     int64_t begin, int64_t end, const float* zeros, float* slab) {
  const Tensor5& x = j.in;
  const int64_t channels = x.size[1];
  bool good = true;
  for_runs(s, begin, end, [&](const TileRun& run) {
    const int64_t y0 = 2 * run.row - j.top, x0 = 2 * run.column - j.left;
    const int64_t columns = 2 * run.length + 2;
    const char* image = x.data + run.image * x.stride[0] * 4;
    if (!j.in_place())
      for (int r = 0; r < 4; r++) {
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
          kernels.transpose[size_index(4)](slab + r * columns * s.depth + c, s.depth, lanes, count,
                                           x.stride[4], columns);
        }
      }
    const float* pixels[16];
    for (int64_t i = 0; i < run.length; i++) {
      for (int r = 0; r < 4; r++)
        for (int q = 0; q < 4; q++) {
          const int64_t y = y0 + r, column = 2 * i + q, at = x0 + column;
          const bool inside = y >= 0 && y < x.size[3] && at >= 0 && at < x.size[4];
          pixels[4 * r + q] =
              !j.in_place() ? slab + (r * columns + column) * s.depth
              : inside ? reinterpret_cast<const float*>(image) + y * x.stride[3] + at * x.stride[4]
                       : zeros;
        }
      float sums[16];
      const int64_t tile = run.begin + i - to.begin;
      kernels.winograd_input(pixels, channels, to.u + tile * kWinogradSum, to.u_group, to.u_step,
                             sums);
      good = judge(sums, to.holes[tile]) && good;
    }
  });
  return good;
}

// The results of tiles [begin, end), at most kMostTiles, and a panel of filters. False where they
// are not finite.
bool multiply(const Job& j, const Sizes& s, const Kernel& kn, const ConvKernels& kernels,
              const Store& store, const Tiles& tiles, int64_t begin, int64_t end, const float* v,
              int64_t panel, float* m) {
  const int64_t count = end - begin, first = begin - tiles.begin, y_row = 2 * count * s.panel;
  const int filters = int(std::min(s.panel, j.rows - panel * s.panel));
  for (int p = 0; p < kPositions; p++)
    kernels.winograd_product(tiles.u + p * tiles.u_step + first * kWinogradSum, tiles.u_group,
                             count, v + p * s.depth * s.panel, s.depth, m + p * s.m_step);
  float* y = m + kPositions * s.m_step;
  if (!kernels.winograd_output(m, s.m_step, count, y, y_row)) return false;
  for (int64_t i = 0; i < count; i++)
    for (int o = 0; o < 4; o++)
      if (tiles.holes[first + i] >> o & 1)
        std::fill_n(y + o / 2 * y_row + (2 * i + o % 2) * s.panel, s.panel, 0.f);

  float* turned = y + 2 * y_row;
  for_runs(s, begin, end, [&](const TileRun& run) {
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
  constexpr int kMostFilters = 64;
  const int64_t channels = j.in.size[1], position = s.depth * s.panel;
  const int filters = int(std::min(s.panel, j.rows - panel * s.panel));
  const char* w = j.w + panel * s.panel * j.row_stride * 4;
  if (s.depth > channels)
    for (int p = 0; p < kPositions; p++)
      std::fill_n(v + p * position + channels * s.panel, (s.depth - channels) * s.panel, 0.f);
  // A filter's taps, of some channels, that are neighbours are turned all at once.
  const bool taps_inner = j.tap_stride[1] == 1 && j.tap_stride[0] == 3;
  const bool whole = taps_inner && j.channel_stride == 9;
  float copy[kSome * 9 * kMostFilters];
  if (filters < s.panel) std::fill_n(copy, kSome * 9 * s.panel, 0.f);
  Lane lanes[kMostFilters];
  for (int64_t c0 = 0; c0 < channels; c0 += kSome) {
    const int64_t some = std::min(kSome, channels - c0);
    const char* from = w + c0 * j.channel_stride * 4;
    // To (channel, tap, filter), or (tap, channel, filter).
    auto turn = [&](int64_t at, float* to, int64_t length, int64_t stride) {
      for (int f = 0; f < filters; f++)
        lanes[f] = {from + (f * j.row_stride + at) * 4, 0, int32_t(length)};
      kernels.transpose[size_index(4)](to, s.panel, lanes, filters, stride, length);
    };
    int64_t tap_step = s.panel, channel_step = 9 * s.panel;
    if (whole) {
      turn(0, copy, some * 9, 1);
    } else if (taps_inner) {
      for (int64_t c = 0; c < some; c++) turn(c * j.channel_stride, copy + c * channel_step, 9, 1);
    } else {
      tap_step = kSome * s.panel, channel_step = s.panel;
      for (int t = 0; t < 9; t++)
        turn(t / 3 * j.tap_stride[0] + t % 3 * j.tap_stride[1], copy + t * tap_step, some,
             j.channel_stride);
    }
    // Turned filters are read from their last tap on.
    const float* first = j.turned ? copy + 8 * tap_step : copy;
    for (int64_t c = 0; c < some; c++)
      kernels.winograd_filter(first + c * channel_step, j.turned ? -tap_step : tap_step,
                              v + (c0 + c) * s.panel, position, int(s.panel));
  }
}

bool run(const Job& j) {
  const Kernel& kn = exact_kernel(DType::f32);
  const ConvKernels& kernels = conv_kernels();
  const Sizes s(j, kernels);
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
  const int64_t tile_bytes = kPositions * s.depth * 4, filters_bytes = s.panels * s.v * 4;
  // Few filters stay in a core's caches, and each thread takes a block of tiles with all of them.
  // Of many, each thread takes some with all tiles, or as many as the cores' common cache holds.
  const bool by_tiles = filters_bytes <= kFewFilters && s.tiles >= 8 * threads;
  int64_t block = std::clamp(by_tiles ? kOwnTiles / tile_bytes : kSharedTiles / tile_bytes,
                             int64_t(14), by_tiles ? kMostTiles : s.tiles);
  int64_t blocks = ceil_div(s.tiles, block);
  if (by_tiles && blocks < 8 * threads) blocks = ceil_div(blocks, threads) * threads;
  block = ceil_div(s.tiles, blocks), blocks = ceil_div(s.tiles, block);
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
  const int64_t shared_u = by_tiles ? 0 : kPositions * u_step, holes = ceil_div(block, 64) * 16;
  const int64_t shared_v = kept || own ? 0 : s.panels * s.v;
  float* shared = static_cast<float*>(
      scratch(Scratch::packed_b, size_t(shared_v + shared_u + holes) * sizeof(float)));
  const float* filters = kept ? kept : shared;
  // A thread's own: transformed tiles, filters, zeros, a slab, products and results (twice).
  const int64_t own_u = by_tiles ? kPositions * u_step + holes : 0, own_v = own ? s.v : 0;
  const int64_t products = (kPositions * s.m_step + 2 * 4 * kMostTiles * s.panel + 15) / 16 * 16;
  const int64_t each = own_u + own_v + s.depth + s.slab + products;
  float* memory =
      static_cast<float*>(scratch(Scratch::accumulator, size_t(each * threads) * sizeof(float)));
  // A unit of work is some tiles and a panel.
  const int64_t wanted = own ? 1 : ceil_div(2 * threads, s.panels);
  const int64_t some = std::clamp(ceil_div(block, wanted), int64_t(7), kMostTiles),
                parts = own ? 1 : ceil_div(block, some);
  constexpr int64_t kPiece = 8;  // tiles that a thread transforms for all

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
    float* const m = slab + s.slab;
    std::fill_n(zeros, s.depth, 0.f);
    if (shared_v) {
      for (int64_t p; (p = next_panel.fetch_add(1)) < s.panels;)
        transform_panel(j, s, kernels, p, shared + p * s.v);
      if (came > 1) barrier();
    }
    auto tiles_of = [&](int64_t b) {
      return Tiles{b * block, std::min(s.tiles, (b + 1) * block),
                   u,         u_group,
                   u_step,    reinterpret_cast<uint8_t*>(u + kPositions * u_step)};
    };
    if (by_tiles) {
      for (int64_t b; !refused && (b = next_block.fetch_add(1)) < blocks;) {
        const Tiles t = tiles_of(b);
        bool good = transform_tiles(j, s, kernels, t, t.begin, t.end, zeros, slab);
        for (int64_t p = 0; good && p < s.panels; p++)
          good = multiply(j, s, kn, kernels, store, t, t.begin, t.end, filters + p * s.v, p, m);
        if (!good) refused = true;
      }
      return;
    }
    for (int64_t b = 0; b < blocks; b++) {
      const Tiles t = tiles_of(b);
      if (b > 0 && came > 1) barrier();  // until nobody reads the last block's any more
      const int64_t count = t.end - t.begin, pieces = ceil_div(count, kPiece);
      for (int64_t i; (i = next_piece[size_t(b)].fetch_add(1)) < pieces;)
        if (!transform_tiles(j, s, kernels, t, t.begin + i * kPiece,
                             std::min(t.end, t.begin + (i + 1) * kPiece), zeros, slab))
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
  count_call(refused ? "winograd refused" : "winograd 2x2, 3x3");
  return !refused;
}

}  // namespace

bool is_winograd(const Conv& c, const Tensor5& in, const Tensor5& out) {
  if (c.type != DType::f32 || c.batch_invariant || c.groups != 1 || c.w.size[2] != 1 ||
      c.w.size[3] != 3 || c.w.size[4] != 3 || in.size[2] != 1 || out.size[2] != 1)
    return false;
  for (int d = 0; d < kSpatial; d++)
    if (c.stride[d] != 1 || c.dilation[d] != 1) return false;
  if (c.padding[0] != 0 || in.size[1] < 32 || out.size[1] < 16) return false;
  // The time, as measured, in multiplications for each pair of channels: directly 9 a position, at
  // a rate below the best; and 16 a tile, of panels that may not be full, besides the tiles'
  // transformations, shared by the channels on the other side, and that of the filters.
  const ConvKernels& kernels = conv_kernels();
  const auto full = [](int64_t n, int64_t of) { return double(ceil_div(n, of) * of) / double(n); };
  const double positions = double(out.size[0]) * double(out.size[3] * out.size[4]);
  const double tiles =
      double(out.size[0]) * double(ceil_div(out.size[3], 2) * ceil_div(out.size[4], 2));
  const double products =
      18 * full(in.size[1], kWinogradSum) * full(out.size[1], kernels.winograd_panel);
  const double transformations = 190 / double(in.size[1]) + 190 / double(out.size[1]);
  const double filters = c.prepared ? 0 : 400;
  return tiles * (products + transformations) + filters < 10 * positions;
}

bool winograd_forward(const Conv& c) {
  return run({c.x, c.y, c.w.data, c.w.size[0], c.w.stride[0], c.w.stride[1], c.w.stride + 3, false,
              c.padding[1], c.padding[2], c});
}

bool winograd_input(const Conv& c) {
  return run({c.y, c.x, c.w.data, c.w.size[1], c.w.stride[1], c.w.stride[0], c.w.stride + 3, true,
              2 - c.padding[1], 2 - c.padding[2], c});
}

}  // namespace fastnn
