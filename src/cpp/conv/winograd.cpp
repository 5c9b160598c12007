#include "conv/winograd.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "common/integers.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "conv/kernels.hpp"
#include "gemm/kernel.hpp"
#include "gemm/prepared.hpp"

namespace fastnn {

namespace {

constexpr int kPositions = 16;     // of a transformed tile
constexpr int64_t kChannels = 16;  // transformed together
// Sums of 16 products, sums of 8 of those, and sums of these: with chains as short as that the
// error stays about that of a direct convolution, which knows no cancellation within a tile.
constexpr int64_t kSum = 16, kGroup = 128;
// A tile mixes its 16 inputs, and each output is rounded as if it were as large as all of them. An
// output's own 9 inputs must not be smaller than this part of the tile's.
constexpr float kLeastShare = 1.f / 64;

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

  // Whether filters of neighbouring output channels are nearer to each other than those of
  // neighbouring input channels. They are transformed in the order in which they lie.
  bool rows_inner() const { return row_stride < channel_stride; }
};

// Tiles of one row of one image, side by side in a block.
struct TileRun {
  int64_t image, row, column;  // of tiles
  int begin, length, at;       // lanes; `at`: where its columns are, one more than tiles
};
constexpr int kMostLanes = 128;

struct Sizes {
  int64_t tile_rows, tile_columns, tiles, blocks, panels, row;
  int64_t position;  // elements from a position of a panel's filters to the next
  Sizes(const Job& j, const Kernel& kn)
      : tile_rows(ceil_div(j.out.size[3], 2)),
        tile_columns(ceil_div(j.out.size[4], 2)),
        tiles(j.out.size[0] * tile_rows * tile_columns),
        blocks(ceil_div(tiles, kn.nr)),
        panels(ceil_div(j.rows, kn.mr)),
        row(2 * kn.nr + 32),
        position(ceil_div(j.in.size[1], kSum) * kSum * kn.mr) {}
};

int runs_of(const Sizes& s, int64_t block, int lanes, TileRun* runs) {
  int count = 0;
  const int64_t first = block * lanes, end = std::min(s.tiles, first + lanes);
  for (int64_t t = first; t < end;) {
    TileRun& r = runs[count];
    r.column = t % s.tile_columns;
    r.row = t / s.tile_columns % s.tile_rows;
    r.image = t / s.tile_columns / s.tile_rows;
    r.length = int(std::min(s.tile_columns - r.column, end - t));
    r.begin = int(t - first);
    r.at = r.begin + count;
    t += r.length;
    count++;
  }
  return count;
}

// Channels [c0, c0 + count) of a run's inputs as (channel, row, even or odd, column), with zeros
// where the image ends.
void load_run(const Job& j, const Sizes& s, const ConvKernels& kernels, const TileRun& r,
              int64_t c0, int64_t count, float* slab) {
  const Tensor5& x = j.in;
  const int64_t channel = 8 * s.row;
  const char* image = x.data + (r.image * x.stride[0] + c0 * x.stride[1]) * 4;
  const int64_t y0 = 2 * r.row - j.top, x0 = 2 * r.column - j.left, n = r.length + 1;
  for (int row = 0; row < 4; row++)
    for (int odd = 0; odd < 2; odd++) {
      float* dst = slab + (2 * row + odd) * s.row + r.at;
      const int64_t y = y0 + row, from = x0 + odd;
      // Column i is the input's from + 2 i.
      const bool inside = y >= 0 && y < x.size[3];
      const int64_t lo = from >= 0 ? 0 : std::min(n, ceil_div(-from, 2));
      const int64_t hi =
          std::clamp<int64_t>(x.size[4] > from ? ceil_div(x.size[4] - from, 2) : 0, lo, n);
      const char* src = image + (y * x.stride[3] + from * x.stride[4]) * 4;
      if (x.stride[1] == 1 && x.size[1] > 1) {
        Lane lanes[kMostLanes + 1];
        for (int64_t i = 0; i < n; i++) {
          const bool in = inside && i >= lo && i < hi;
          lanes[i] = {in ? src + 2 * i * x.stride[4] * 4 : x.data, 0, in ? int32_t(count) : 0};
        }
        kernels.transpose[size_index(4)](dst, channel, lanes, int(n), 1, count);
      } else {
        kernels.copy_rows[size_index(4)](dst, channel, src, x.stride[1], count, 2 * x.stride[4], lo,
                                         inside ? hi : lo, n);
      }
    }
}

// An output whose inputs are all zero, among nonzero ones of its tile: column `at` of row `row` of
// the tiles' results.
struct Hole {
  int row, at;
};

// Looks at the magnitudes that the tiles' inputs have, summed over channels. False where an
// output's own inputs are too small a part of its tile's.
bool judge(const Sizes& s, const TileRun* runs, int count, const float* sums, Hole* holes,
           int& hole_count) {
  hole_count = 0;
  for (int k = 0; k < count; k++)
    for (int i = 0; i < runs[k].length; i++) {
      float column[4][4];  // (row, column)
      float all = 0;
      for (int r = 0; r < 4; r++)
        for (int q = 0; q < 4; q++)
          all += column[r][q] = sums[(2 * r + q % 2) * s.row + runs[k].at + i + q / 2];
      if (!(all * kLeastShare > 0)) continue;  // nothing there; or NaN, which the results show
      for (int r = 0; r < 2; r++)
        for (int q = 0; q < 2; q++) {
          float own = 0;
          for (int a = 0; a < 3; a++)
            for (int b = 0; b < 3; b++) own += column[r + a][q + b];
          if (own == 0)
            holes[hole_count++] = {r, 2 * (runs[k].begin + i) + q};
          else if (own < all * kLeastShare)
            return false;
        }
    }
  return true;
}

struct Buffers {
  float *slab, *sums, *u, *m, *part, *y;
  static int64_t floats(const Job& j, const Sizes& s, const Kernel& kn) {
    return kChannels * 8 * s.row + 8 * s.row + kPositions * j.in.size[1] * kn.nr + 16 +
           (kPositions + 5) * kn.mr * kn.nr + 64;
  }
  Buffers(float* memory, const Job& j, const Sizes& s, const Kernel& kn) {
    slab = memory;
    sums = slab + kChannels * 8 * s.row;
    u = sums + 8 * s.row;
    m = u + kPositions * j.in.size[1] * kn.nr + 16;
    part = m + kPositions * kn.mr * kn.nr;
    y = part + kn.mr * kn.nr;
  }
};

// The inputs of a block of tiles, transformed: u as (position, channel, lane).
bool transform_block(const Job& j, const Sizes& s, const Kernel& kn, const ConvKernels& kernels,
                     int64_t block, Buffers b, float* u, Hole* holes, int& hole_count) {
  TileRun runs[kMostLanes];
  const int count = runs_of(s, block, kn.nr, runs);
  const int64_t channels = j.in.size[1], position = channels * kn.nr;
  std::memset(b.sums, 0, size_t(8 * s.row) * sizeof(float));
  // Lanes without a tile, at the end of the last block.
  if ((block + 1) * kn.nr > s.tiles)
    std::memset(u, 0, size_t(kPositions * position) * sizeof(float));
  for (int64_t c0 = 0; c0 < channels; c0 += kChannels) {
    const int64_t group = std::min(kChannels, channels - c0);
    for (int k = 0; k < count; k++) load_run(j, s, kernels, runs[k], c0, group, b.slab);
    for (int k = 0; k < count; k++)
      kernels.winograd_input(b.slab + runs[k].at, b.slab + s.row + runs[k].at, 2 * s.row, 8 * s.row,
                             group, u + c0 * kn.nr + runs[k].begin, kn.nr, position, runs[k].length,
                             b.sums + runs[k].at, s.row);
  }
  return judge(s, runs, count, b.sums, holes, hole_count);
}

// A panel of output channels of a block of tiles; v is the panel's filters.
bool multiply_panel(const Job& j, const Sizes& s, const Kernel& kn, const ConvKernels& kernels,
                    const Store& store, const float* v, const float* u, int64_t block,
                    int64_t panel, const Hole* holes, int hole_count, Buffers b) {
  const int64_t channels = j.in.size[1];
  const int rows = int(std::min<int64_t>(kn.mr, j.rows - panel * kn.mr));
  TileArgs t{};
  t.rows = rows, t.cols = kn.nr;
  t.packed_a = j.rows_inner(), t.packed_b = true;
  t.a_row = 4 * kSum, t.a_word = 4, t.b_word = 4 * kn.nr;  // those of a panel are known
  t.acc_row = 4 * kn.nr;
  for (int p = 0; p < kPositions; p++) {
    float* total = b.m + p * kn.mr * kn.nr;
    auto join = [&](int64_t end) {
      if (end > kGroup)
        for (int e = 0; e < rows * kn.nr; e++) total[e] += b.part[e];
    };
    for (int64_t k = 0; k < channels; k += kSum) {
      if (k % kGroup == 0) join(k);
      t.acc = k < kGroup ? total : b.part;
      t.words = std::min(kSum, channels - k);
      t.a = reinterpret_cast<const char*>(v + p * s.position + k * kn.mr);
      t.b = reinterpret_cast<const char*>(u + (p * channels + k) * kn.nr);
      t.add = k % kGroup != 0;
      kn.tile(t);
    }
    join(channels);
  }
  const int64_t y_row = 2 * kn.nr;
  if (!kernels.winograd_output(b.m, int64_t(kn.mr) * kn.nr, kn.nr, b.y, y_row, rows, kn.nr))
    return false;
  for (int h = 0; h < hole_count; h++)
    for (int r = 0; r < rows; r++) b.y[(2 * r + holes[h].row) * y_row + holes[h].at] = 0;

  TileRun runs[kMostLanes];
  const int count = runs_of(s, block, kn.nr, runs);
  for (int k = 0; k < count; k++)
    for (int r = 0; r < 2; r++) {
      const int64_t row = 2 * runs[k].row + r, column = 2 * runs[k].column;
      if (row >= j.out.size[3]) continue;
      const int columns = int(std::min<int64_t>(2 * runs[k].length, j.out.size[4] - column));
      const int64_t at =
          (runs[k].image * j.out.stride[0] + row * j.out.stride[3] + column * j.out.stride[4]) * 4;
      Store to = store;
      to.c += at;
      if (to.residual) to.residual += at;
      kn.store(b.y + r * y_row + 2 * runs[k].begin, int(2 * y_row), rows, columns, to,
               panel * kn.mr, 0);
    }
  return true;
}

// Some filters, transformed: `lanes` that lie `lane` apart go side by side to v.
void transform_some(const Job& j, const ConvKernels& kernels, const float* w, int64_t lane,
                    int lanes, float* v, int64_t position) {
  float copy[9 * kMostLanes];
  const float* taps = w;
  int64_t ld = j.tap_stride[1];  // from a tap to the next
  if (lane != 1 || j.tap_stride[0] != 3 * ld) {
    if (ld == 1 && j.tap_stride[0] == 3) {
      Lane lie[kMostLanes];
      for (int l = 0; l < lanes; l++) lie[l] = {reinterpret_cast<const char*>(w + l * lane), 0, 9};
      kernels.transpose[size_index(4)](copy, lanes, lie, lanes, 1, 9);
    } else {
      for (int t = 0; t < 9; t++)
        for (int l = 0; l < lanes; l++)
          copy[t * lanes + l] = w[l * lane + t / 3 * j.tap_stride[0] + t % 3 * j.tap_stride[1]];
    }
    taps = copy, ld = lanes;
  }
  // Turned filters are read from their last tap on.
  kernels.winograd_filter(j.turned ? taps + 8 * ld : taps, j.turned ? -ld : ld, v, position, lanes);
}

// The filters of a panel, transformed, by position: then (channel, row), as the kernel packs them,
// or pieces of kSum channels as (row, channel), in which it reads them in place.
void transform_panel(const Job& j, const Sizes& s, const Kernel& kn, const ConvKernels& kernels,
                     int64_t panel, float* v) {
  const int64_t channels = j.in.size[1], mr = kn.mr, rows = std::min(mr, j.rows - panel * mr);
  const float* w = reinterpret_cast<const float*>(j.w) + panel * mr * j.row_stride;
  if (j.rows_inner()) {
    for (int64_t c = 0; c < channels; c++)
      transform_some(j, kernels, w + c * j.channel_stride, j.row_stride, int(rows), v + c * mr,
                     s.position);
    return;
  }
  for (int64_t row = 0; row < rows; row++)
    for (int64_t c0 = 0; c0 < channels; c0 += kSum)
      transform_some(j, kernels, w + row * j.row_stride + c0 * j.channel_stride, j.channel_stride,
                     int(std::min(kSum, channels - c0)), v + c0 * mr + row * kSum, s.position);
}

bool run(const Job& j) {
  const Kernel& kn = exact_kernel(DType::f32);
  const ConvKernels& kernels = conv_kernels();
  const Sizes s(j, kn);
  Gemm g;
  g.c.data = j.out.data, g.c.rs = j.out.stride[1], g.c.cs = j.out.stride[4];
  g.activation = j.c.activation;
  if (j.c.bias) g.bias = j.c.bias, g.bias_axis = BiasAxis::row;
  if (j.c.residual) {
    g.residual = g.c;
    g.residual.data = const_cast<char*>(j.c.residual);
    g.beta = 1;
  }
  const Store store = make_store(g);

  const int threads = max_threads();
  const int64_t channels = j.in.size[1];
  // With many blocks, all filters are transformed first, and then a block is whole to a thread,
  // which finds what it transformed in its own cache. With few, it is the other way round: all
  // blocks are transformed first, and then a panel of filters is whole to a thread.
  const bool even = 8 * s.blocks >= 7 * ceil_div(s.blocks, threads) * threads;
  const bool by_blocks = s.blocks >= 4 * threads || (even && j.c.prepared && !j.turned);
  const int64_t u_floats = kPositions * channels * kn.nr + 16, v_floats = kPositions * s.position;
  const int64_t own = (Buffers::floats(j, s, kn) + (by_blocks ? 0 : v_floats + 15) + 15) / 16 * 16;
  float* memory = static_cast<float*>(scratch(Scratch::accumulator, size_t(own * threads) * 4));
  const float* kept = nullptr;  // all filters, transformed before
  if (j.c.prepared && !j.turned)
    kept = reinterpret_cast<const float*>(
        j.c.prepared->get("winograd", &kn, 0, 0, size_t(s.panels * v_floats) * 4, [&](char* to) {
          Prepared::want(j.w, j.c.w.count());
          parallel(threads, [&](int thread, int came) {
            const Range mine = share_of(s.panels, 1, thread, came);
            for (int64_t p = mine.begin; p < mine.end; p++)
              transform_panel(j, s, kn, kernels, p, reinterpret_cast<float*>(to) + p * v_floats);
          });
        }));
  const int64_t shared_floats = by_blocks ? (kept ? 0 : s.panels * v_floats) : s.blocks * u_floats;
  float* shared = static_cast<float*>(scratch(Scratch::packed_b, size_t(shared_floats) * 4));
  const float* filters = kept ? kept : shared;
  constexpr int kHoles = 4 * kMostLanes;
  Hole* shared_holes = by_blocks
                           ? nullptr
                           : static_cast<Hole*>(scratch(
                                 Scratch::misc, size_t(s.blocks) * (kHoles + 1) * sizeof(Hole)));
  // Few panels are shared by threads, which each transform them for their part of the blocks.
  const int64_t parts = std::min(s.blocks, ceil_div(2 * threads, s.panels)),
                in_part = ceil_div(s.blocks, parts);
  std::atomic<int64_t> next{0}, next_unit{0};
  std::atomic<bool> refused{false};
  parallel(threads, [&](int thread, int came) {
    const Buffers b(memory + own * thread, j, s, kn);
    if (by_blocks) {
      if (!kept) {
        for (int64_t p; (p = next.fetch_add(1)) < s.panels;)
          transform_panel(j, s, kn, kernels, p, shared + p * v_floats);
        if (came > 1) barrier();
      }
      Hole holes[kHoles];
      int count;
      for (int64_t block; !refused && (block = next_unit.fetch_add(1)) < s.blocks;) {
        bool good = transform_block(j, s, kn, kernels, block, b, b.u, holes, count);
        for (int64_t p = 0; good && p < s.panels; p++)
          good = multiply_panel(j, s, kn, kernels, store, filters + p * v_floats, b.u, block, p,
                                holes, count, b);
        if (!good) refused = true;
      }
      return;
    }
    for (int64_t block; (block = next.fetch_add(1)) < s.blocks;) {
      Hole* holes = shared_holes + block * (kHoles + 1);
      int count;
      if (!transform_block(j, s, kn, kernels, block, b, shared + block * u_floats, holes + 1,
                           count))
        refused = true;
      holes[0].at = count;
    }
    if (came > 1) barrier();
    float* v = memory + own * (thread + 1) - (v_floats + 15) / 16 * 16;
    for (int64_t unit; !refused && (unit = next_unit.fetch_add(1)) < s.panels * parts;) {
      const int64_t panel = unit / parts, first = unit % parts * in_part;
      if (!kept) transform_panel(j, s, kn, kernels, panel, v);
      const float* panel_of = kept ? kept + panel * v_floats : v;
      for (int64_t block = first; block < std::min(s.blocks, first + in_part); block++) {
        const Hole* holes = shared_holes + block * (kHoles + 1);
        if (!multiply_panel(j, s, kn, kernels, store, panel_of, shared + block * u_floats, block,
                            panel, holes + 1, holes[0].at, b))
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
  // Multiplications a pair of channels: 9 a position directly; 16 a tile here, and a fourth as much
  // time again for the tiles' transformation, and about 200 for that of the filter. Tiles go in
  // blocks as wide as the kernel's panels.
  const double positions = double(out.size[0]) * double(out.size[3] * out.size[4]);
  const double tiles =
      double(out.size[0]) * double(ceil_div(out.size[3], 2) * ceil_div(out.size[4], 2));
  const double width = exact_kernel(DType::f32).nr, lanes = std::ceil(tiles / width) * width;
  return 16 * lanes + 4 * tiles + (c.prepared ? 0 : 200) < 9 * positions;
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
