// The weight's gradient of a depthwise convolution. Each unit of work sums some channels over some
// bands of positions: in float32 over a few hundred positions, which a float64 adds up in the
// unit's own slot. Units depend on the shape alone, and a channel's slots are added in order.
#include <algorithm>
#include <vector>

#include "common/scratch.hpp"
#include "conv/depthwise.hpp"
#include "conv/depthwise_parts.hpp"

namespace fastnn {

namespace {

constexpr int64_t kPositions = 512;               // a float32 sums up
constexpr int64_t kUnits = 32;                    // for threads to share
constexpr int64_t kBandBytes = int64_t(1) << 18;  // this band and the next in a core's cache

// Positions in bands of a plane: some rows, or a piece of one that is long.
struct Bands {
  int64_t rows, columns;          // of a band, at most
  int64_t row_bands, row_pieces;  // of a plane
  int64_t planes, count;          // planes of an image, bands of all

  Bands(const Axis* a, int64_t images, int64_t most_rows, int64_t most_columns) {
    columns = std::min(std::max<int64_t>(1, a[2].out), most_columns);
    row_pieces = (a[2].out + columns - 1) / columns;
    rows = std::clamp<int64_t>(row_pieces > 1 ? 1 : most_rows, 1, std::max<int64_t>(1, a[1].out));
    row_bands = (a[1].out + rows - 1) / rows;
    rows = row_bands ? (a[1].out + row_bands - 1) / row_bands : rows;
    planes = a[0].out;
    count = images * planes * row_bands * row_pieces;
  }
};
struct Band {
  int64_t n, o0, o1, rows, o2, columns;
  Band(const Bands& b, const Axis* a, int64_t i) {
    o2 = i % b.row_pieces * b.columns, i /= b.row_pieces;
    o1 = i % b.row_bands * b.rows, i /= b.row_bands;
    o0 = i % b.planes, n = i / b.planes;
    rows = std::min(b.rows, a[1].out - o1), columns = std::min(b.columns, a[2].out - o2);
  }
  int64_t positions() const { return rows * columns; }
};

// Slots of `items` that are summed apart, and of the bands' chunks. Chunks are no smaller than what
// a slot is flushed after, so that slots cost nothing; items are grouped where chunks are enough.
struct Units {
  int64_t items, groups, bands, chunks;
  Units(int64_t items_, int64_t bands_, int64_t positions) : items(items_), bands(bands_) {
    chunks = std::clamp<int64_t>(std::min(positions / kPositions, bands), 1, kUnits);
    groups = std::min(items, (kUnits + chunks - 1) / chunks);
  }
  int64_t count() const { return groups * chunks; }
  Range chunk(int64_t unit) const { return share_of(bands, 1, int(unit / groups), int(chunks)); }
  Range group(int64_t unit) const { return share_of(items, 1, int(unit % groups), int(groups)); }
};

// What one kind of element is computed with.
struct Elements {
  const DepthwiseKernels& dw;
  int64_t size, vector;  // bytes of an element, and of a vector of sums
  explicit Elements(const Conv& c)
      : dw(conv_kernels().depthwise[int(c.type)]),
        size(size_of(c)),
        vector(dw.width * sum_size(c)) {}
};

// How many of the taps that are left of an axis are met together.
int64_t taps_together(const Axis& axis, int64_t left) {
  if (axis.step > 2 || (axis.step == 2 && axis.delta > 1)) return 1;
  // Where there are fewer positions than taps, not all of them.
  const int64_t most =
      std::min(left, (axis.delta > 1 ? axis.out / axis.delta : axis.out) * axis.step);
  return most < 3 ? 1 : most < 5 ? 3 : most < 7 ? 5 : 7;
}

// What one of several calls over the same runs asks for, so that memory is kept busy by all.
int share_of_asks(int64_t part, int64_t parts) {
  return (part == 0 % parts ? 1 : 0) | (part == 1 % parts ? 2 : 0) | (part == 2 % parts ? 4 : 0);
}

// Adds what all taps of an axis meet on runs along it, x being its position 0. Numbers are taken
// out of r and put into it one by one: it was just written so, and a copy would wait for that.
void add_runs(const Elements& e, const Axis& axis, TapRuns& r) {
  const char *x = static_cast<const char*>(r.x), *y = static_cast<const char*>(r.y);
  char* sums = static_cast<char*>(r.sums);
  const int64_t x_step = r.x_step, y_step = r.y_step, x_row = r.x_row, y_row = r.y_row;
  const int64_t rows = r.rows, *offset = r.offset;
  const int count = r.count, asks = r.asks;
  for (int64_t tap = 0, taps; tap < axis.taps; tap += taps) {
    taps = taps_together(axis, axis.taps - tap);
    // Positions as far apart as the taps meet the same ones.
    const int64_t apart = taps == 1 ? 1 : axis.delta;
    for (int64_t start = 0; start < std::min(apart, axis.out); start++) {
      if (taps == 1) {
        const int64_t begin = axis.begin(tap), positions = axis.end(tap) - begin;
        if (positions == 0) continue;
        r.x = x + (begin * axis.step + axis.first + tap * axis.delta) * x_step * e.size;
        r.y = y + begin * y_step * e.size;
        r.x_step = x_step * axis.step, r.y_step = y_step, r.x_row = x_row, r.y_row = y_row;
        r.in = r.out = positions, r.first = 0, r.rows = rows;
        if (positions < rows) {
          std::swap(r.x_step, r.x_row), std::swap(r.y_step, r.y_row);
          r.in = r.out = rows, r.rows = positions;
        }
      } else {
        const int64_t at = start + axis.first + tap * axis.delta;
        int64_t from = 0;
        r.in = axis.in, r.first = at, r.out = axis.out, r.rows = rows;
        if (apart > 1) {
          from = (at % apart + apart) % apart;
          r.in = ceil_div_signed(axis.in - from, apart), r.first = (at - from) / apart;
          r.out = (axis.out - start + apart - 1) / apart;
          if (r.in <= 0) continue;
        }
        r.x = x + from * x_step * e.size, r.y = y + start * y_step * e.size;
        r.x_step = x_step * apart, r.y_step = y_step * apart, r.x_row = x_row, r.y_row = y_row;
      }
      const int64_t most = e.dw.weight_rows[taps];
      const int64_t parts = count <= most ? 1 : (count + most - 1) / most;
      for (int64_t i = 0; i < parts; i++) {
        const Range b = parts == 1 ? Range{0, count} : share_of(count, 1, int(i), int(parts));
        r.offset = offset + b.begin, r.count = int(b.end - b.begin);
        r.sums = sums + tap * e.vector + b.begin * r.sums_row * (e.vector / e.dw.width);
        r.asks = tap > 0 || start > 0 ? 0 : asks & share_of_asks(i, parts);
        e.dw.weight(int(taps), taps == 1 ? 1 : int(axis.step), r);
      }
    }
  }
  r.x_step = x_step, r.y_step = y_step, r.x_row = x_row, r.y_row = y_row;
  r.offset = offset, r.count = count, r.sums = sums, r.asks = asks;
}

// ---- vectors of channels ------------------------------------------------------------------------

// An image whose channels are neighbours, or those of a block that were made so.
struct Image {
  const char *x, *y;
  const int64_t *x_stride, *y_stride;  // of depth, row and column
  // Where what the next band sees begins and how far its lines are from each other (0: there is
  // none): while a row is read, as many lines are asked for.
  int64_t line = 0;
  const char *x_ahead = x, *y_ahead = y;
};

// The rows of a filter in parts that are met together, and what the rows of y see of each part.
struct FilterRows {
  struct Seen {
    int64_t begin, end;  // taps
    int64_t next;        // the row from which on it is not these
  };
  int64_t parts, middle;   // the part that most rows see
  std::vector<Seen> seen;  // [part][row]

  FilterRows(const Elements& e, const Axis* a) : middle(0) {
    const int64_t most = e.dw.weight_rows[taps_together(a[2], a[2].taps)];
    parts = (a[1].taps + most - 1) / most;
    for (int64_t i = 0; i < parts; i++) {
      const Range part = share_of(a[1].taps, 1, int(i), int(parts));
      if (part.begin * a[1].delta <= -a[1].first) middle = i;
      const size_t first = seen.size();
      for (int64_t o1 = 0; o1 < a[1].out; o1++) {
        Seen s = {part.begin, part.end, o1 + 1};
        while (s.begin < s.end && !a[1].sees(o1, s.begin)) s.begin++;
        while (s.begin < s.end && !a[1].sees(o1, s.end - 1)) s.end--;
        seen.push_back(s);
      }
      for (size_t o1 = seen.size(); o1-- > first + 1;)
        if (seen[o1 - 1].begin == seen[o1].begin && seen[o1 - 1].end == seen[o1].end)
          seen[o1 - 1].next = seen[o1].next;
    }
  }
};

void add_band(const Elements& e, const Axis* a, const FilterRows& filter, const Image& image,
              const Band& band, const int64_t* offset, int lanes, char* sums) {
  Axis columns = a[2];
  columns.out = band.columns, columns.first += band.o2 * a[2].step;
  TapRuns r = {};
  r.x_step = image.x_stride[2], r.y_step = image.y_stride[2];
  r.x_row = a[1].step * image.x_stride[1], r.y_row = image.y_stride[1];
  r.offset = offset, r.lanes = lanes, r.sums_row = a[2].taps * e.dw.width;
  r.x_line = r.y_line = image.line, r.x_ahead_row = image.x_stride[1] * e.size;
  for (int64_t t0 = 0; t0 < a[0].taps; t0++) {
    if (!a[0].sees(band.o0, t0)) continue;
    const int64_t x0 = band.o0 * a[0].step + a[0].first + t0 * a[0].delta;
    for (int64_t i = 0; i < filter.parts; i++) {
      const FilterRows::Seen* seen = filter.seen.data() + i * a[1].out;
      const int64_t end = band.o1 + band.rows;
      for (int64_t o1 = band.o1, next; o1 < end; o1 = next) {
        const FilterRows::Seen& t1 = seen[o1];
        next = std::min(t1.next, end);
        if (t1.begin == t1.end) continue;
        const int64_t x1 = o1 * a[1].step + a[1].first + t1.begin * a[1].delta;
        r.rows = next - o1, r.count = int(t1.end - t1.begin);
        r.x = image.x + (x0 * image.x_stride[0] + x1 * image.x_stride[1]) * e.size;
        r.y = image.y + (band.o0 * image.y_stride[0] + o1 * r.y_row + band.o2 * r.y_step) * e.size;
        r.sums = sums + (t0 * a[1].taps + t1.begin) * a[2].taps * e.vector;
        r.x_ahead = image.x_ahead + (o1 - band.o1) * r.x_row * e.size;
        r.y_ahead = image.y_ahead + (o1 - band.o1) * r.y_row * e.size;
        r.asks =
            !image.line || t0 > 0
                ? 0
                : share_of_asks((i - filter.middle + filter.parts) % filter.parts, filter.parts);
        add_runs(e, columns, r);
      }
    }
  }
}

// The positions of some channels, turned: to[position][lane].
void turn(const Tensor5& t, int64_t size, int64_t n, int64_t channel, int lanes, int width,
          char* to) {
  Lane lane[64];
  const int64_t positions = t.size[3] * t.size[4];
  for (int l = 0; l < lanes; l++)
    lane[l] = {t.data + (n * t.stride[0] + (channel + l) * t.stride[1]) * size, 0,
               int32_t(positions)};
  conv_kernels().transpose[size_index(size)](to, width, lane, lanes,
                                             t.size[4] > 1 ? t.stride[4] : t.stride[3], positions);
}

void by_channels(const Conv& c, const Axis* a, const int64_t* tap_offset, bool turned) {
  const Elements e(c);
  const int64_t channels = c.w.size[0], taps = c.w.spatial(), width = e.dw.width;
  const int lanes = int(std::min(width, channels));
  const int64_t blocks = (channels + width - 1) / width;
  // The last block overlaps the one before it.
  auto first_of = [&](int64_t block) { return std::min(block * width, channels - lanes); };
  Units units(blocks, c.y.size[0] * a[0].out * a[1].out, c.y.size[0] * c.y.spatial());
  const int64_t group_bytes = (blocks + units.groups - 1) / units.groups * width * e.size;
  const int64_t row_bytes = (a[1].step * a[2].in + a[2].out) * group_bytes;
  const Bands bands(a, c.y.size[0],
                    turned ? a[1].out
                           : std::min(kPositions / std::max<int64_t>(1, a[2].out),
                                      kBandBytes / std::max<int64_t>(1, row_bytes)),
                    kPositions);
  units.bands = bands.count;
  const bool in_order = units.groups == 1 && c.x.stride[4] == channels && c.y.stride[4] == channels;
  const int64_t block_totals = taps * width, slot = blocks * block_totals;
  auto* totals = static_cast<double*>(
      scratch(Scratch::accumulator, size_t(units.chunks * slot) * sizeof(double)));
  const int threads = threads_for(c);
  const int64_t plane[] = {0, c.x.size[4] * width, width},
                y_plane[] = {0, c.y.size[4] * width, width};
  const int64_t x_bytes = turned ? (c.x.spatial() * width * e.size + 63) / 64 * 64 : 0,
                y_bytes = turned ? (c.y.spatial() * width * e.size + 63) / 64 * 64 : 0;
  const int64_t sums_bytes = (blocks + units.groups - 1) / units.groups * taps * e.vector;
  const int64_t thread_bytes = x_bytes + y_bytes + (sums_bytes + 63) / 64 * 64;
  char* all_memory = static_cast<char*>(scratch(Scratch::misc, size_t(thread_bytes * threads)));
  const FilterRows filter(e, a);
  std::vector<int64_t> offset;
  for (int64_t t1 = 0; t1 < a[1].taps; t1++)
    offset.push_back(t1 * a[1].delta * (turned ? plane[1] : c.x.stride[3]));

  parallel(threads, [&](int thread, int came) {
    char *x = all_memory + thread * thread_bytes, *y = x + x_bytes, *sums = y + y_bytes;
    const Range mine = share_of(units.count(), 1, thread, came);
    for (int64_t unit = mine.begin; unit < mine.end; unit++) {
      const Range chunk = units.chunk(unit), group = units.group(unit);
      double* to = totals + unit / units.groups * slot + group.begin * block_totals;
      const int64_t vectors = (group.end - group.begin) * taps;
      std::fill_n(to, vectors * width, 0);
      std::fill_n(sums, vectors * e.vector, 0);
      int64_t positions = 0;
      for (int64_t i = chunk.begin; i < chunk.end; i++) {
        const Band band(bands, a, i);
        const bool ends = i + 1 == chunk.end, more = !turned && (!ends || unit + 1 < mine.end);
        const Band next(bands, a, !ends ? i + 1 : more ? units.chunk(unit + 1).begin : i);
        const Range next_group = ends && more ? units.group(unit + 1) : group;
        for (int64_t block = group.begin; block < group.end; block++) {
          const int64_t channel = first_of(block);
          Image image = {x, y, plane, y_plane};
          if (turned) {
            turn(c.x, e.size, band.n, channel, lanes, int(width), x);
            turn(c.y, e.size, band.n, channel, lanes, int(width), y);
          } else {
            image = {c.x.data + (band.n * c.x.stride[0] + channel) * e.size,
                     c.y.data + (band.n * c.y.stride[0] + channel) * e.size, c.x.stride + 2,
                     c.y.stride + 2};
            if (more) {
              const int64_t at = block - group.begin,
                            first = in_order ? 0 : first_of(next_group.begin + at);
              const int64_t depth = next.o0 * a[0].step + a[0].first + a[0].reach();
              const int64_t row = next.o1 * a[1].step + (next.o1 ? a[1].first + a[1].reach() : 0);
              const int64_t share = in_order ? at * width : 0;
              image.line = (in_order ? width : channels) * e.size;
              image.x_ahead = c.x.data + (next.n * c.x.stride[0] + depth * c.x.stride[2] +
                                          row * c.x.stride[3] + first + share * a[2].in) *
                                             e.size;
              image.y_ahead = c.y.data + (next.n * c.y.stride[0] + next.o0 * c.y.stride[2] +
                                          next.o1 * c.y.stride[3] + first + share * a[2].out) *
                                             e.size;
            }
          }
          add_band(e, a, filter, image, band, offset.data(), lanes,
                   sums + (block - group.begin) * taps * e.vector);
        }
        if ((positions += band.positions()) >= kPositions || i + 1 == chunk.end) {
          e.dw.weight_totals(to, sums, vectors, false);
          positions = 0;
        }
      }
    }
    if (came > 1) barrier();
    const Range ends = share_of(blocks, 1, thread, came);
    for (int64_t block = ends.begin; block < ends.end; block++) {
      const int64_t channel = first_of(block);
      e.dw.weight_finish(totals + block * block_totals, units.chunks, slot, width, int(taps),
                         tap_offset, c.w.data + channel * c.w.stride[0] * e.size, c.w.stride[0],
                         block * width - channel, lanes);
    }
  });
}

// ---- vectors of columns -------------------------------------------------------------------------

void by_columns(const Conv& c, const Axis* a, const int64_t* tap_offset) {
  const Elements e(c);
  const ConvKernels& kernels = conv_kernels();
  const int64_t taps = c.w.spatial(), many = multiplier(c), width = e.dw.width;
  const Bands bands(a, c.y.size[0], rows_at_once(a, e.size, 1), std::max<int64_t>(1, a[2].out));
  const Window window(a, e.size, bands.rows, width);
  const Units units(c.x.size[1], bands.count, c.y.size[0] * c.y.spatial() / width);
  const int64_t slot = c.w.size[0] * taps;
  auto* totals = static_cast<double*>(
      scratch(Scratch::accumulator, size_t(units.chunks * slot) * sizeof(double)));
  const int threads = threads_for(c);
  const int64_t sums_bytes = (many * taps * e.vector + 63) / 64 * 64;
  const int64_t window_bytes = (window.elements() * e.size + 63) / 64 * 64 + 64;
  const bool copied = c.y.stride[4] != 1 && a[2].out > 1;
  const int64_t y_bytes = copied ? (bands.rows * a[2].out * e.size + 63) / 64 * 64 + 64 : 0;
  const int64_t thread_bytes = sums_bytes + window_bytes + y_bytes;
  char* all_memory = static_cast<char*>(scratch(Scratch::misc, size_t(thread_bytes * threads)));
  std::vector<int64_t> offset;
  for (int64_t t0 = 0; t0 < a[0].taps; t0++)
    for (int64_t t2 = 0; t2 < a[2].taps; t2++) offset.push_back(window.offset(t0, 0, t2));

  parallel(threads, [&](int thread, int came) {
    char *sums = all_memory + thread * thread_bytes, *memory = sums + sums_bytes,
         *copy = memory + window_bytes;
    const Range mine = share_of(units.count(), 1, thread, came);
    for (int64_t unit = mine.begin; unit < mine.end; unit++) {
      const Range chunk = units.chunk(unit), group = units.group(unit);
      for (int64_t channel = group.begin; channel < group.end; channel++) {
        double* to = totals + unit / units.groups * slot + channel * many * taps;
        std::fill_n(to, many * taps, 0);
        std::fill_n(sums, many * taps * e.vector, 0);
        int64_t positions = 0;
        for (int64_t i = chunk.begin; i < chunk.end; i++) {
          const Band band(bands, a, i);
          window.load(kernels,
                      c.x.data + (band.n * c.x.stride[0] + channel * c.x.stride[1]) * e.size,
                      c.x.stride + 2, band.o0, band.o1, band.rows, memory);
          Axis rows = a[1];
          rows.in = (band.rows - 1) * a[1].step + a[1].reach() + 1, rows.out = band.rows;
          rows.first = 0;
          // The next band's rows are asked for, each by those at the same place of this one.
          const bool last = i + 1 == chunk.end;
          const Band next(bands, a, last ? chunk.begin : i + 1);
          const int64_t next_channel = channel + last;
          const bool more = next_channel < group.end;
          const char* x_ahead = c.x.data + (next.n * c.x.stride[0] + next_channel * c.x.stride[1] +
                                            (next.o0 * a[0].step + a[0].first) * c.x.stride[2] +
                                            next.o1 * a[1].step * c.x.stride[3]) *
                                               e.size;
          for (int64_t k = 0; k < many; k++) {
            auto y_plane = [&](int64_t channel, const Band& b) {
              return c.y.data + (b.n * c.y.stride[0] + (channel * many + k) * c.y.stride[1] +
                                 b.o0 * c.y.stride[2] + b.o1 * c.y.stride[3]) *
                                    e.size;
            };
            const char* y = y_plane(channel, band);
            int64_t y_row = c.y.stride[3];
            if (copied) {
              kernels.copy_rows[size_index(e.size)](copy, a[2].out, y, y_row, band.rows,
                                                    c.y.stride[4], 0, a[2].out, a[2].out);
              y = copy, y_row = a[2].out;
            }
            TapRuns r = {};
            r.x_ahead = memory, r.y_ahead = y;
            r.x_step = window.row_stride, r.y_step = y_row, r.x_row = r.y_row = width;
            r.offset = offset.data(), r.count = int(offset.size());
            r.sums = sums + k * taps * e.vector, r.sums_row = a[1].taps * width;
            const int64_t line = width * e.size;
            if (more) {
              r.asks = 7, r.x_ahead = x_ahead, r.x_ahead_row = line;
              r.x_line = c.x.stride[3] * e.size;
              r.y_ahead = y_plane(next_channel, next), r.y_line = c.y.stride[3] * e.size;
            }
            const int64_t whole = a[2].out / width, rest = a[2].out % width;
            if (whole) {
              r.x = memory, r.y = y, r.rows = whole, r.lanes = int(width);
              add_runs(e, rows, r);
            }
            if (rest) {
              r.x = memory + whole * line, r.y = y + whole * line;
              r.x_ahead += whole * a[2].step * line, r.y_ahead += whole * line;
              r.rows = 1, r.lanes = int(rest);
              add_runs(e, rows, r);
            }
          }
          positions += (band.positions() + width - 1) / width;
          if (positions >= kPositions || i + 1 == chunk.end) {
            e.dw.weight_totals(to, sums, many * taps, true);
            positions = 0;
          }
        }
      }
    }
    if (came > 1) barrier();
    const Range ends = share_of(c.w.size[0], 1, thread, came);
    for (int64_t m = ends.begin; m < ends.end; m++)
      e.dw.weight_finish(totals + m * taps, units.chunks, slot, 1, int(taps), tap_offset,
                         c.w.data + m * c.w.stride[0] * e.size, 0, 0, 1);
  });
}

}  // namespace

void depthwise_weight(const Conv& c) {
  Axis a[kSpatial];
  set_forward_axes(c, a);
  const int64_t width = conv_kernels().depthwise[int(c.type)].width;
  // Where a row does not fill a vector, planes are turned, a block of channels at a time.
  const bool turned = !channels_last(c) && multiplier(c) == 1 && c.w.size[0] >= width &&
                      a[2].out < width && c.y.spatial() <= 4 * kPositions && a[0].in == 1 &&
                      a[0].out == 1 && a[0].taps == 1 && is_even(c.x) && is_even(c.y);
  const bool channels = channels_last(c) || turned;
  // In the order of the sums: the axis that runs are along last.
  std::vector<int64_t> tap_offset;
  for (int64_t t0 = 0; t0 < a[0].taps; t0++)
    for (int64_t i = 0; i < a[1].taps * a[2].taps; i++) {
      const int64_t t1 = channels ? i / a[2].taps : i % a[1].taps,
                    t2 = channels ? i % a[2].taps : i / a[1].taps;
      tap_offset.push_back(t0 * c.w.stride[2] + t1 * c.w.stride[3] + t2 * c.w.stride[4]);
    }
  if (channels)
    by_channels(c, a, tap_offset.data(), turned);
  else
    by_columns(c, a, tap_offset.data());
  scratch_trim();
}

}  // namespace fastnn
