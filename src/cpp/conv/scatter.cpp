#include "conv/scatter.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/integers.hpp"
#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "conv/kernels.hpp"
#include "gemm/tiles.hpp"

namespace fastnn {

namespace {

constexpr int64_t kMostResults = 8;  // from about 16 on they fill a tile themselves
constexpr int64_t kLeastDepth = 16;  // products a sum, that adding it up costs little beside them
constexpr int64_t kBandBytes = 192 << 10;  // of the results that a thread adds up, a share of L2

const Kernel* kernel_for(const Conv& c) {
  return runs_kernel(c.type, c.precision, c.batch_invariant);
}

// The filter as a matrix of (row tap, column tap, result) by depth, packed: the panels of one row
// tap, then those of the next, each block of K after the other.
struct Filter {
  int64_t rows, parts, lanes;  // of a row tap: rows, panels, rows of each
  int64_t blocks, panel_bytes;
  int64_t kc, depth;

  Filter(const Kernel& kn, const Scatter& s)
      : rows(s.taps[2] * s.out.size[1]),
        parts(ceil_div(rows, kn.mr)),
        lanes(ceil_div(rows, parts)),
        blocks(ceil_div(s.in.size[1], kn.kc)),
        panel_bytes(
            round_up(round_up(std::min(kn.kc, s.in.size[1]), kn.k_step) * kn.mr * kn.a_bytes, 64)),
        kc(kn.kc),
        depth(s.in.size[1]) {}
  int64_t bytes(const Scatter& s) const { return s.taps[1] * parts * blocks * panel_bytes; }
  int64_t length(int64_t block) const { return std::min(kc, depth - block * kc); }

  void pack(const Kernel& kn, const Scatter& s, char* to) const {
    const int64_t size = dtype_size(s.c.type), results = s.out.size[1];
    std::vector<char> row(size_t(rows * depth * size));  // one row tap's, depth running fastest
    for (int64_t t1 = 0; t1 < s.taps[1]; t1++) {
      for (int64_t r = 0; r < rows; r++) {
        const char* from =
            s.w + (t1 * s.w_tap[1] + r / results * s.w_tap[2] + r % results * s.w_out) * size;
        for (int64_t k = 0; k < depth; k++)
          std::memcpy(&row[size_t((r * depth + k) * size)], from + k * s.w_in * size, size_t(size));
      }
      for (int64_t part = 0; part < parts; part++)
        for (int64_t block = 0; block < blocks; block++)
          kn.pack_a(to + ((t1 * parts + part) * blocks + block) * panel_bytes,
                    &row[size_t((part * lanes * depth + block * kc) * size)], depth, 1,
                    int(std::min(lanes, rows - part * lanes)), length(block));
    }
  }
};

// Some rows of the results, each result's elements sorted by their remainder to the step: what one
// tap adds of a line is a run of neighbours.
struct Band {
  int64_t step, low, columns;     // of a remainder: its first column's quotient, and how many
  int64_t result_step, row_step;  // elements
  Band(const Scatter& s) : step(s.step[2]) {
    const int64_t reach = (s.taps[2] - 1) * s.delta[2];
    const int64_t least = s.first[2] + std::min<int64_t>(0, reach),
                  most = s.first[2] + std::max<int64_t>(0, reach);
    low = std::min<int64_t>(0, floor_div(least, step));
    columns = std::max(ceil_div(s.out.size[4], step), s.in.size[4] + floor_div(most, step)) - low;
    result_step = step * columns, row_step = s.out.size[1] * result_step;
  }
  // Where the first position of a line adds tap t, in a result's row.
  int64_t offset(const Scatter& s, int64_t t) const {
    const int64_t at = s.first[2] + t * s.delta[2], quotient = floor_div(at, step);
    return (at - quotient * step) * columns + quotient - low;
  }
};

// A row of the results in their order.
template <class T>
void sort_row(const Band& b, const char* from_, char* to_, int64_t results, int64_t columns) {
  const auto* from = reinterpret_cast<const T*>(from_);
  auto* to = reinterpret_cast<T*>(to_);
  for (int64_t m = 0; m < results; m++)
    for (int64_t rest = 0; rest < std::min(b.step, columns); rest++) {
      const T* row = from + m * b.result_step + rest * b.columns - b.low;
      T* out = to + m * columns + rest;
      for (int64_t i = 0; i * b.step + rest < columns; i++) out[i * b.step] = row[i];
    }
}

}  // namespace

bool scatter_pays(const Scatter& s) {
  const bool planes = s.taps[0] == 1 && s.step[0] == 1 && s.first[0] == 0;
  return planes && s.out.size[1] <= kMostResults && s.in.size[1] >= kLeastDepth &&
         s.taps[1] * s.taps[2] > 1 && kernel_for(s.c);
}

void run_scatter(const Scatter& s, int threads) {
  const Kernel& kn = *kernel_for(s.c);
  count_call("scatter");
  count_call(kn.name);
  const int64_t size = dtype_size(s.c.type), sum = dtype_size(kn.acc), results = s.out.size[1];
  const int64_t height = s.out.size[3], width = s.out.size[4];
  const Filter filter(kn, s);
  const Band band(s);

  Gemm g;
  g.c.data = s.out.data, g.c.rs = s.out.stride[1], g.c.cs = s.out.stride[4], g.c.type = s.c.type;
  set_epilogue(g, s.c, s.whole, s.channel);
  const Store store = make_store(g);

  // Rows of a band: as many as stay in the cache, and for all threads to have some.
  const int64_t images = s.out.size[0] * s.out.size[2];
  int64_t rows = std::clamp<int64_t>(kBandBytes / (band.row_step * sum), 1, height);
  const int64_t overlap = 4 * (s.taps[1] - 1) * std::abs(s.delta[1]);
  while (images * ceil_div(height, rows) < 3 * threads && threads > 1 && rows > overlap + 1)
    rows = ceil_div(rows, 2);
  const int64_t bands = ceil_div(height, rows);

  const int64_t b_panel =
      round_up(round_up(std::min(filter.kc, filter.depth), kn.k_step) * kn.nr * kn.b_bytes, 64);
  const int64_t band_bytes = round_up(rows * band.row_step * sum, 64),
                row_bytes = round_up(results * width * sum, 64);
  const int64_t own_bytes =
      round_up(filter.blocks * b_panel + band_bytes + row_bytes + tile_bytes(kn), 4096);
  char* own = static_cast<char*>(scratch(Scratch::accumulator, size_t(own_bytes * threads)));
  char* packed = static_cast<char*>(scratch(Scratch::packed_a, size_t(filter.bytes(s))));
  filter.pack(kn, s, packed);

  std::vector<int64_t> offset(size_t(filter.rows));
  for (int64_t r = 0; r < filter.rows; r++)
    offset[size_t(r)] = r % results * band.result_step + band.offset(s, r / results);
  const auto add_rows = conv_kernels().add_rows[kn.acc == DType::f64];

  Shares shares(images * bands, threads);
  parallel(threads, [&](int thread, int) {
    char* panel_b = own + own_bytes * thread;
    char* sums = panel_b + filter.blocks * b_panel;
    char* row = sums + band_bytes;
    char* tile = row + row_bytes;
    TileArgs t;
    t.a_row = int64_t(kn.a_bytes) * kn.k_word, t.a_word = t.a_row * kn.mr;
    t.b_word = int64_t(kn.nr) * kn.b_bytes * kn.k_word;
    t.acc = tile, t.acc_row = kn.nr * sum;
    for (Range r; (r = shares.take(thread, 1)).begin < r.end;) {
      const int64_t image = r.begin / bands, n = image / s.out.size[2], d = image % s.out.size[2];
      const int64_t h0 = r.begin % bands * rows, h1 = std::min(height, h0 + rows);
      const char* in = s.in.data + (n * s.in.stride[0] + d * s.in.stride[2]) * size;
      std::memset(sums, 0, size_t((h1 - h0) * band.row_step * sum));
      for (int64_t i = 0; i < s.in.size[3]; i++) {
        auto row_of = [&](int64_t t1) { return i * s.step[1] + s.first[1] + t1 * s.delta[1]; };
        if (std::max(row_of(0), row_of(s.taps[1] - 1)) < h0 ||
            std::min(row_of(0), row_of(s.taps[1] - 1)) >= h1)
          continue;
        for (int64_t j = 0; j < s.in.size[4]; j += kn.nr) {
          t.cols = int(std::min<int64_t>(kn.nr, s.in.size[4] - j));
          for (int64_t block = 0; block < filter.blocks; block++)
            kn.pack_b(panel_b + block * b_panel,
                      in + (i * s.in.stride[3] + j * s.in.stride[4] +
                            block * filter.kc * s.in.stride[1]) *
                               size,
                      s.in.stride[4], s.in.stride[1], t.cols, filter.length(block));
          for (int64_t t1 = 0; t1 < s.taps[1]; t1++) {
            const int64_t h = row_of(t1);
            if (h < h0 || h >= h1) continue;
            char* to = sums + ((h - h0) * band.row_step + j) * sum;
            for (int64_t part = 0; part < filter.parts; part++) {
              t.rows = int(std::min(filter.lanes, filter.rows - part * filter.lanes));
              for (int64_t block = 0; block < filter.blocks; block++) {
                t.a = packed +
                      ((t1 * filter.parts + part) * filter.blocks + block) * filter.panel_bytes;
                t.b = panel_b + block * b_panel;
                t.words = ceil_div(filter.length(block), kn.k_word);
                t.add = block > 0;
                kn.tile(t);
              }
              add_rows(to, &offset[size_t(part * filter.lanes)], tile, kn.nr, t.rows, t.cols);
            }
          }
        }
      }
      for (int64_t h = h0; h < h1; h++) {
        const char* from = sums + (h - h0) * band.row_step * sum;
        int64_t ld = band.result_step;
        if (band.step == 1)
          from -= band.low * sum;
        else if (sum == 8)
          sort_row<double>(band, from, row, results, width), from = row, ld = width;
        else
          sort_row<float>(band, from, row, results, width), from = row, ld = width;
        const int64_t at = n * s.out.stride[0] + d * s.out.stride[2] + h * s.out.stride[3];
        Store line = store;
        line.c += at * size;
        if (line.residual) line.residual += at * size;
        kn.store(from, int(ld), int(results), int(width), line, 0, 0);
      }
    }
  });
  scratch_trim();
}

}  // namespace fastnn
