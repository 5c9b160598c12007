#include "conv/winograd.hpp"

#include <algorithm>
#include <atomic>
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
// Transformed tiles, or filters, of no more bytes than this stay in a core's second cache.
constexpr int64_t kOwnBytes = 3 << 18;
// Fewer tiles than this are not worth reading all filters for.
constexpr int64_t kLeastTiles = 40;
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

// How results go from a thread's memory to `out`, channels as columns or as rows.
Store store_of(const Job& j) {
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
  return make_store(g);
}

// One call: what its threads share. Each thread takes blocks of tiles, as many as its second cache
// holds, with all filters, panel by panel. Where a panel is larger than that cache, or there are
// few tiles, all threads transform a block of tiles, as many as the cores' common cache holds, and
// then each takes all of those with some of the filters. Either way what comes from the common
// cache, which may be slow or others' as well, is read once for what there is of the other operand.
class Run {
 public:
  explicit Run(const Job& job)
      : j_(job),
        s_(job),
        kernel_(exact_kernel(DType::f32)),
        kernels_(conv_kernels()),
        store_(store_of(job)),
        source_(job.source()),
        threads_(max_threads()) {
    const int64_t tile_bytes = s_.positions * s_.depth * 4, tiles = s_.grid.count;
    by_tiles_ = s_.v * 4 <= kOwnBytes && tiles >= kLeastTiles * threads_;
    const int64_t most = std::clamp((by_tiles_ ? kOwnBytes : kSharedTiles) / tile_bytes,
                                    std::min(kLeastTiles, tiles), tiles);
    blocks_ = ceil_div(tiles, most);
    if (by_tiles_ && blocks_ < 8 * threads_) blocks_ = ceil_div(blocks_, threads_) * threads_;
    block_ = ceil_div(tiles, blocks_), blocks_ = ceil_div(tiles, block_);
    keep_filters();
    own_filters_ = !kept_ && !by_tiles_ && blocks_ == 1 && s_.panels >= 2 * threads_;
  }

  // False where the numbers are such that the result is to be computed otherwise.
  bool operator()() {
    const int64_t shared_filters = kept_ || own_filters_ ? 0 : filters_floats();
    auto* shared = static_cast<float*>(
        scratch(Scratch::packed_b,
                size_t(shared_filters + (by_tiles_ ? 0 : tiles_floats())) * sizeof(float)));
    filters_ = kept_ ? kept_ : shared;
    const int64_t each = own_floats();
    auto* memory =
        static_cast<float*>(scratch(Scratch::accumulator, size_t(each * threads_) * sizeof(float)));
    std::vector<std::atomic<int64_t>> next(size_t(1 + 2 * blocks_));
    parallel(threads_, [&](int thread, int came) {
      const Own own = own_of(memory + each * thread, shared + shared_filters);
      if (shared_filters) {
        for (int64_t p; (p = next[0].fetch_add(1)) < s_.panels;)
          transform_panel(j_, s_, kernels_, p, shared + p * s_.v);
        if (came > 1) barrier();
      }
      if (by_tiles_) return take_tiles(own, next[1]);
      for (int64_t b = 0; b < blocks_; b++) {
        if (b > 0 && came > 1) barrier();  // until nobody reads the last block's any more
        const Tiles tiles = tiles_of(own, b);
        for (int64_t t;
             (t = tiles.begin + next[size_t(1 + 2 * b)].fetch_add(kTilesPiece)) < tiles.end;)
          transform(own, tiles, t, std::min(tiles.end, t + kTilesPiece));
        if (came > 1) barrier();
        take_filters(own, tiles, next[size_t(2 + 2 * b)]);
      }
    });
    scratch_trim();
    count_call(refused_ ? "winograd refused" : "winograd");
    return !refused_;
  }

 private:
  // A thread's memory; u is its own, or that of all.
  struct Own {
    float *u, *v, *zeros, *slab, *m;
  };

  int64_t filters_floats() const { return s_.panels * s_.v; }
  // Of a block of tiles, with a byte each for their holes.
  int64_t tiles_floats() const {
    return s_.positions * s_.depth * block_ + ceil_div(block_, 64) * 16;
  }
  int64_t slab_floats() const { return source_.slab(std::min(s_.most, s_.grid.columns)); }
  int64_t own_floats() const {
    const int64_t results = 4 * s_.most * s_.panel;  // as they come, and turned
    return ceil_div((by_tiles_ ? tiles_floats() : 0) + (own_filters_ ? s_.v : 0) + s_.depth +
                        slab_floats() + s_.positions * s_.m_step + 2 * results,
                    16) *
           16;
  }
  Own own_of(float* memory, float* shared_tiles) const {
    Own own;
    own.u = by_tiles_ ? memory : shared_tiles;
    own.v = memory + (by_tiles_ ? tiles_floats() : 0);
    own.zeros = own.v + (own_filters_ ? s_.v : 0);
    own.slab = own.zeros + s_.depth;
    own.m = own.slab + slab_floats();
    std::fill_n(own.zeros, s_.depth, 0.f);
    return own;
  }
  Tiles tiles_of(const Own& own, int64_t b) const {
    const int64_t step = s_.depth * block_;
    return Tiles{{b * block_, own.u, block_ * kWinogradSum, step},
                 std::min(s_.grid.count, (b + 1) * block_),
                 reinterpret_cast<uint8_t*>(own.u + s_.positions * step)};
  }

  void keep_filters() {
    if (!j_.c.prepared || j_.turned) return;
    kept_ = reinterpret_cast<const float*>(
        j_.c.prepared->get("winograd", &kernel_, 0, 0, size_t(filters_floats()) * 4, [&](char* to) {
          Prepared::want(j_.w, j_.c.w.count());
          parallel(threads_, [&](int thread, int came) {
            const Range mine = share_of(s_.panels, 1, thread, came);
            for (int64_t p = mine.begin; p < mine.end; p++)
              transform_panel(j_, s_, kernels_, p, reinterpret_cast<float*>(to) + p * s_.v);
          });
        }));
  }

  void transform(const Own& own, const Tiles& to, int64_t begin, int64_t end) {
    transform_tiles(source_, s_.grid, s_.most, to, begin, end, own.zeros, own.slab,
                    [&](int64_t tile, const float* sums) {
                      if (!judge(j_.way, sums, to.holes[tile - to.begin])) refused_ = true;
                    });
  }
  void multiply_some(const Own& own, const Tiles& tiles, int64_t begin, int64_t end, const float* v,
                     int64_t panel) {
    if (!multiply(j_, s_, kernel_, kernels_, store_, tiles, begin, end, v, panel, own.m))
      refused_ = true;
  }

  void take_tiles(const Own& own, std::atomic<int64_t>& next) {
    for (int64_t b; !refused_ && (b = next.fetch_add(1)) < blocks_;) {
      const Tiles tiles = tiles_of(own, b);
      transform(own, tiles, tiles.begin, tiles.end);
      for (int64_t p = 0; !refused_ && p < s_.panels; p++)
        for (int64_t t = tiles.begin; t < tiles.end; t += s_.most)
          multiply_some(own, tiles, t, std::min(tiles.end, t + s_.most), filters_ + p * s_.v, p);
    }
  }

  // A unit of work is a panel and some of the tiles; or all of them, where the panel is transformed
  // for it.
  void take_filters(const Own& own, const Tiles& tiles, std::atomic<int64_t>& next) {
    const int64_t count = tiles.end - tiles.begin, wanted = ceil_div(2 * threads_, s_.panels);
    const int64_t some =
        std::clamp(ceil_div(count, own_filters_ ? 1 : wanted), int64_t(7), s_.most);
    const int64_t parts = ceil_div(count, some), step = ceil_div(count, parts);
    const int64_t units = s_.panels * (own_filters_ ? 1 : parts);
    for (int64_t unit; !refused_ && (unit = next.fetch_add(1)) < units;) {
      const int64_t panel = own_filters_ ? unit : unit / parts;
      const int64_t first = own_filters_ ? 0 : unit % parts,
                    last = own_filters_ ? parts : first + 1;
      const float* v = filters_ + panel * s_.v;
      if (own_filters_) transform_panel(j_, s_, kernels_, panel, own.v), v = own.v;
      for (int64_t part = first; part < last; part++) {
        const int64_t begin = tiles.begin + part * step;
        multiply_some(own, tiles, begin, std::min(tiles.end, begin + step), v, panel);
      }
    }
  }

  const Job& j_;
  const Sizes s_;
  const Kernel& kernel_;
  const ConvKernels& kernels_;
  const Store store_;
  const TileSource source_;
  const int threads_;
  bool by_tiles_;
  int64_t block_, blocks_;          // of tiles
  const float* kept_ = nullptr;     // all filters, transformed before
  bool own_filters_;                // each panel is transformed by the thread that takes it
  const float* filters_ = nullptr;  // else all, transformed
  std::atomic<bool> refused_{false};
};

}  // namespace

const WinogradKernels* winograd_way(const Conv& c, Pass pass) {
  if (c.type != DType::f32 || c.batch_invariant || c.groups != 1 || c.w.size[2] != 1 ||
      c.w.size[3] != c.w.size[4] || c.x.size[2] != 1 || c.y.size[2] != 1 || c.padding[0] != 0 ||
      c.stride[1] != c.stride[2] || c.dilation[1] != 1 || c.dilation[2] != 1)
    return nullptr;
  const bool turned = pass == Pass::input;
  const Tensor5 &in = turned ? c.y : c.x, &out = turned ? c.x : c.y;
  if (in.size[1] < 32 || out.size[1] < 16) return nullptr;
  for (const WinogradKernels& way : conv_kernels().winograd) {
    if (way.taps != c.w.size[3] || way.step != c.stride[1]) continue;
    // The larger a tile's transforms are than its inputs and outputs, the more they have to go
    // through memory, twice for filters' gradients.
    if (pass != Pass::forward && way.products > 4) return nullptr;
    // The time, as measured, in multiplications for each pair of channels: directly one a tap and
    // position, at a rate below the best; and one a product of a tile, of panels that may not be
    // full, besides the tiles' transformations, shared by the channels on the other side, and that
    // of the filters, or their way from memory. With a stride there is least to gain: filters are
    // transformed in the call only where the direct way would lose at its best rate, too.
    const auto full = [](int64_t n, int64_t of) {
      return double(ceil_div(n, of) * of) / double(n);
    };
    const double positions = double(out.size[0]) * double(out.size[3] * out.size[4]);
    const double tiles =
        double(out.size[0]) * double(ceil_div(out.size[3], 2) * ceil_div(out.size[4], 2));
    const double multiplied = 1.13 * full(in.size[1], kWinogradSum) * full(out.size[1], way.panel);
    // Filters' gradients read and write most, and are slower where others use the memory as well.
    const double each = pass == Pass::weight ? 50 : 12;
    const double transformed = each / double(in.size[1]) + each / double(out.size[1]);
    const double filters = c.prepared ? 5 : 25;
    const double direct = way.step > 1 && !c.prepared ? 1 : 1.11;
    const double kept =
        double(way.products * way.products) * double(in.size[1]) * double(out.size[1]);
    if (kept > kMostFilters) return nullptr;
    return way.products * way.products * (tiles * (multiplied + transformed) + filters) <
                   direct * double(way.taps * way.taps) * positions
               ? &way
               : nullptr;
  }
  return nullptr;
}

bool is_winograd(const Conv& c) { return winograd_way(c, Pass::forward); }

bool winograd_forward(const Conv& c) {
  const WinogradKernels* way = winograd_way(c, Pass::forward);
  return way && Run({*way, c.x, c.y, c.w.data, c.w.size[0], c.w.stride[0], c.w.stride[1],
                     c.w.stride + 3, false, c.padding[1], c.padding[2], c})();
}

bool winograd_input(const Conv& c) {
  const WinogradKernels* way = winograd_way(c, Pass::input);
  return way &&
         Run({*way, c.y, c.x, c.w.data, c.w.size[1], c.w.stride[1], c.w.stride[0], c.w.stride + 3,
              true, way->taps - 1 - c.padding[1], way->taps - 1 - c.padding[2], c})();
}

}  // namespace fastnn
