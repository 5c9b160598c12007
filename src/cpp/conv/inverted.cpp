#include "conv/inverted.hpp"

#include <algorithm>
#include <optional>
#include <vector>

#include "common/parallel.hpp"
#include "common/scratch.hpp"
#include "conv/depthwise_window.hpp"
#include "conv/kernels.hpp"
#include "conv/strips.hpp"
#include "gemm/prepared.hpp"
#include "gemm/row_product.hpp"

namespace fastnn {

namespace {

constexpr int64_t kTaps = 3;
constexpr int64_t kBandBytes = 384 << 10;  // of hidden channels: a share of L2
constexpr int64_t kGroupPanels = 2;        // of hidden channels, where threads share them
constexpr int64_t kStripRows = 4;          // of the hidden layer, whose input is copied at once
constexpr int64_t kRowsAThread = 6;        // fewer rows than this, and their halo costs too much

// Images as one column of rows: (image, row), evenly apart, channels innermost.
bool in_rows(const Tensor5& t) {
  int64_t expected = 1;
  for (const int d : {1, 4, 3, 2, 0}) {
    if (t.size[d] != 1 && t.stride[d] != expected) return false;
    expected *= t.size[d];
  }
  return t.size[2] == 1;
}

// An odd number of cache lines, so that positions do not share few sets of the cache.
int64_t apart(int64_t channels, int64_t size) {
  return ((round_up(channels * size, 64) / 64) | 1) * 64;
}

// (channels, 1, 1, 3, 3) as (tap, channel).
const char* taps_first(const Inverted::Layer& l, int64_t channels, int64_t size) {
  auto turn = [&](char* to) {
    Prepared::want(l.w.data, l.w.count());
    for (int64_t i = 0; i < kTaps; i++)
      for (int64_t k = 0; k < kTaps; k++)
        for (int64_t m = 0; m < channels; m++, to += size)
          std::memcpy(to,
                      l.w.data + (m * l.w.stride[0] + i * l.w.stride[3] + k * l.w.stride[4]) * size,
                      size_t(size));
  };
  return l.prepared->get("taps first", nullptr, 0, 0, size_t(channels * kTaps * kTaps * size),
                         turn);
}

// (m, c, 1, rows, columns) as (m, tap, c), with c up to `padded` as zeros.
const char* channels_last(const Inverted::Layer& l, int64_t padded, int64_t size) {
  const Tensor5& w = l.w;
  const size_t bytes = size_t(w.size[0] * w.spatial() * padded * size);
  return l.prepared->get("channels last", nullptr, padded, 0, bytes, [&](char* to) {
    Prepared::want(w.data, w.count());
    std::memset(to, 0, bytes);
    for (int64_t m = 0; m < w.size[0]; m++)
      for (int64_t i = 0; i < w.size[3]; i++)
        for (int64_t k = 0; k < w.size[4]; k++, to += padded * size)
          for (int64_t c = 0; c < w.size[1]; c++)
            std::memcpy(
                to + c * size,
                w.data +
                    (m * w.stride[0] + c * w.stride[1] + i * w.stride[3] + k * w.stride[4]) * size,
                size_t(size));
  });
}

// What the first convolution sees, where it sees more than a position at a time.
Patches patches_of(const Inverted& c) {
  Patches p;
  p.data = c.x.data;
  p.element = int64_t(dtype_size(c.type));
  p.images = c.x.size[0], p.channels = c.x.size[1];
  p.image_stride = c.x.stride[0], p.channel_stride = c.x.stride[1];
  for (int d = 0; d < kSpatial; d++) {
    const int64_t stride = d ? c.expand_stride[d - 1] : 1, pad = d ? c.expand_padding[d - 1] : 0;
    p.size[d] = c.x.size[2 + d], p.stride[d] = c.x.stride[2 + d];
    p.taps[d] = c.expand.w.size[2 + d], p.first[d] = -pad, p.delta[d] = 1, p.step[d] = stride;
    p.out[d] = (p.size[d] + 2 * pad - p.taps[d]) / stride + 1;
  }
  p.channels_inner = true;
  return p;
}
bool is_pointwise(const Inverted& c) {
  return c.expand.w.spatial() == 1 && c.expand_stride[0] == 1 && c.expand_stride[1] == 1 &&
         c.expand_padding[0] == 0 && c.expand_padding[1] == 0;
}

Store store_of(const Inverted::Layer& l, DType type, char* c, int64_t c_row, const char* residual) {
  Gemm g;
  g.c.data = c, g.c.type = type, g.c.rs = c_row, g.c.cs = 1;
  if (residual) g.residual = g.c, g.residual.data = const_cast<char*>(residual), g.beta = 1;
  if (l.bias) g.bias = l.bias, g.bias_type = type, g.bias_axis = BiasAxis::column;
  g.activation = l.activation;
  return make_store(g);
}

struct Block {
  const Inverted& c;
  const int64_t size, channels, hidden;
  std::optional<Patches> patches;
  std::optional<PatchStrips> strips;          // of the input, for the first convolution
  const int64_t height, width;                // of the hidden layer
  const int64_t out_height, out_width, rows;  // of the result, of all images
  const DepthwiseKernels& dw;
  const char* filters;
  std::optional<RowProduct> expand, project;
  std::vector<char> zeros;

  Block(const Inverted& c_, const Kernel& kernel, int threads)
      : c(c_),
        size(dtype_size(c.type)),
        channels(c.x.size[1]),
        hidden(c.depthwise.w.size[0]),
        patches(c.expands() && !is_pointwise(c) ? std::optional(patches_of(c)) : std::nullopt),
        height(patches ? patches->out[1] : c.x.size[3]),
        width(patches ? patches->out[2] : c.x.size[4]),
        out_height(c.y.size[3]),
        out_width(c.y.size[4]),
        rows(c.y.size[0] * out_height),
        dw(conv_kernels().depthwise[int(c.type)]),
        filters(taps_first(c.depthwise, hidden, size)),
        zeros(size_t(hidden * size)) {
    auto operand = [&](const Inverted::Layer& l) {
      Matrix b;
      b.data = l.w.data, b.type = c.type, b.rs = l.w.stride[1], b.cs = l.w.stride[0];
      return b;
    };
    if (patches) {
      strips.emplace(*patches, kernel.k_step);
      const int64_t padded = PatchStrips::padded_channels(*patches, kernel.k_step);
      const int64_t k = patches->tap_count() * padded;
      Matrix b = operand(c.expand);
      b.data = const_cast<char*>(channels_last(c.expand, padded, size)), b.rs = 1, b.cs = k;
      expand.emplace(kernel, b, k, hidden, *c.expand.prepared, threads, &*strips);
    } else if (c.expands()) {
      expand.emplace(kernel, operand(c.expand), channels, hidden, *c.expand.prepared, threads);
    }
    project.emplace(kernel, operand(c.project), hidden, c.y.size[1], *c.project.prepared, threads);
  }

  // The rows of the hidden layer that rows [begin, end) of the result see.
  Range seen(Range r) const {
    auto first = [&](int64_t image, int64_t row) {
      return image * height + std::clamp<int64_t>(row, 0, height);
    };
    const int64_t last = r.end - 1;
    return {first(r.begin / out_height, r.begin % out_height * c.stride - 1),
            first(last / out_height, last % out_height * c.stride + 2)};
  }
  // So many of the result see no more rows of it than these.
  int64_t most_seen(int64_t count) const {
    return std::min((count - 1) * c.stride + kTaps, c.x.size[0] * height);
  }
};

// Some rows of the hidden layer, of some of its channels, as one thread needs them: the ones that
// are needed next overwrite those that were needed first.
class HiddenRows {
 public:
  HiddenRows(const Block& b, int64_t capacity, int64_t most_channels, char* memory)
      : b_(b),
        capacity_(capacity),
        step_(b.expand ? apart(most_channels, b.size) : b.channels * b.size),
        row_(step_ * b.width),
        memory_(memory),
        sums_(memory + capacity * row_),
        strip_(sums_ + (b.expand ? sums_bytes(b, capacity) : 0)) {}
  static int64_t bytes(const Block& b, int64_t capacity, int64_t most_channels) {
    if (!b.expand) return 0;
    return round_up(capacity * b.width * apart(most_channels, b.size) + sums_bytes(b, capacity) +
                        (b.strips ? b.strips->bytes(std::min(kStripRows, b.height)) : 0),
                    4096);
  }
  int64_t step() const { return step_; }
  // From now on, panels [q0, q1) of channels.
  void panels(int64_t q0, int64_t q1) { q0_ = q0, q1_ = q1, held_ = {0, 0}; }
  // These rows, of which those that were there in the last call stay.
  void need(Range r) {
    if (!b_.expand) return;
    if (r.begin < held_.begin || r.begin >= held_.end) held_ = {r.begin, r.begin}, base_ = r.begin;
    while (held_.end < r.end) {
      const int64_t at = (held_.end - base_) % capacity_;
      const int64_t count = std::min(r.end - held_.end, capacity_ - at);
      held_.end += b_.strips ? from_strip(at, count) : from_rows(at, count);
    }
    held_.begin = std::max(held_.begin, held_.end - capacity_);
  }
  // Where channel `channel` of a row of the hidden layer begins.
  const char* at(int64_t row, int64_t channel) const {
    if (!b_.expand) return b_.c.x.data + (row * b_.width * b_.channels + channel) * b_.size;
    return memory_ + (row - base_) % capacity_ * row_ +
           (channel - q0_ * b_.expand->panel_columns()) * b_.size;
  }

 private:
  static int64_t sums_bytes(const Block& b, int64_t capacity) {
    return round_up(b.expand->sums_bytes(capacity * b.width), 64);
  }
  // As many of the next `count` rows as can be made at once, into the one `at` and those after it.
  int64_t from_rows(int64_t at, int64_t count) {
    const int64_t in_row = b_.width * b_.channels * b_.size;
    b_.expand->run(to(at), {b_.c.x.data + held_.end * in_row, b_.channels, count * b_.width}, q0_,
                   q1_, sums_);
    return count;
  }
  int64_t from_strip(int64_t at, int64_t count) {
    const PatchStrips& s = *b_.strips;
    count = std::min({count, kStripRows, b_.height - held_.end % b_.height});
    const char* rows = s.fill(strip_, held_.end, count);
    b_.expand->run(to(at), {rows, s.row_step, b_.width, count, s.line_step, row_ / b_.size}, q0_,
                   q1_, sums_);
    return count;
  }
  Store to(int64_t at) const {
    const int64_t first = q0_ * b_.expand->panel_columns() * b_.size;
    return store_of(b_.c.expand, b_.c.type, memory_ + at * row_ - first, step_ / b_.size, nullptr);
  }

  const Block& b_;
  int64_t capacity_, step_, row_;
  char *memory_, *sums_, *strip_;
  int64_t q0_ = 0, q1_ = 0, base_ = 0;
  Range held_{0, 0};
};

// Channels [c0, c0 + count) of rows [r.begin, r.end) of the depthwise layer.
void filter(const Block& b, const HiddenRows& hidden, Range r, int64_t c0, int64_t count, char* out,
            int64_t out_step) {
  WindowRows w{};
  w.kernels = &b.dw, w.size = b.size, w.step = b.c.stride, w.first = -1;
  w.in_columns = b.width, w.out_columns = b.out_width, w.channels = count;
  w.in_step = hidden.step(), w.out_row = b.out_width * out_step / b.size;
  w.out_step = out_step / b.size;
  w.zeros = b.zeros.data();
  w.bias = b.c.depthwise.bias ? b.c.depthwise.bias + c0 * b.size : nullptr;
  w.activation = b.c.depthwise.activation;
  for (int64_t t = 0; t < kTaps * kTaps; t++)
    w.filter[t] = b.filters + (t * b.hidden + c0) * b.size;
  w.ahead = !b.expand;
  for (int64_t row = r.begin; row < r.end;) {
    const int64_t image = row / b.out_height, o = row % b.out_height;
    const int64_t n = std::min({int64_t(b.dw.window_rows), r.end - row, b.out_height - o});
    const char* in[8];
    for (int64_t i = 0; i < (n - 1) * b.c.stride + kTaps; i++) {
      const int64_t at = o * b.c.stride - 1 + i;
      in[i] = at >= 0 && at < b.height ? hidden.at(image * b.height + at, c0) : nullptr;
    }
    run_window_rows(w, in, int(n), out + (row - r.begin) * b.out_width * out_step);
    row += n;
  }
}

Store result(const Block& b, int64_t position) {
  const int64_t n = b.c.y.size[1], at = position * n * b.size;
  return store_of(b.c.project, b.c.type, b.c.y.data + at, n,
                  b.c.residual ? b.c.residual + at : nullptr);
}

// Bands of rows, each with all its channels, from the input to the result.
void by_rows(const Block& b, int threads) {
  const int64_t step = apart(b.hidden, b.size), out_row = b.out_width * step;
  auto band_bytes = [&](int64_t rows) {
    return HiddenRows::bytes(b, b.most_seen(rows), b.hidden) + rows * out_row;
  };
  int64_t band = ceil_div(b.rows, threads);
  while (band > b.dw.window_rows && band_bytes(band) > kBandBytes) band--;
  // As many bands for each thread.
  const int64_t bands = std::min(b.rows, round_up(ceil_div(b.rows, band), threads));
  band = ceil_div(b.rows, bands);
  const int64_t capacity = b.most_seen(band);
  const int64_t hidden_bytes = HiddenRows::bytes(b, capacity, b.hidden);
  const int64_t out_bytes = round_up(band * out_row, 4096);
  const int64_t sums_bytes = round_up(b.project->sums_bytes(band * b.out_width), 4096);
  const int64_t own_bytes = hidden_bytes + out_bytes + sums_bytes;
  char* own = static_cast<char*>(scratch(Scratch::misc, size_t(own_bytes * threads)));
  Shares shares(bands, threads);
  parallel(threads, [&](int thread, int) {
    char* memory = own + own_bytes * thread;
    char* filtered = memory + hidden_bytes;
    HiddenRows hidden(b, capacity, b.hidden, memory);
    if (b.expand) hidden.panels(0, b.expand->panels());
    for (Range item; (item = shares.take(thread, 1)).begin < item.end;) {
      const Range r = share_of(b.rows, 1, int(item.begin), int(bands));
      hidden.need(b.seen(r));
      filter(b, hidden, r, 0, b.hidden, filtered, step);
      b.project->run(result(b, r.begin * b.out_width),
                     {filtered, step / b.size, (r.end - r.begin) * b.out_width}, 0,
                     b.project->panels(), filtered + out_bytes);
    }
  });
}

// Few rows: the threads share the hidden channels first, and then the tiles of the result.
void by_channels(const Block& b, int threads) {
  const int64_t nr = b.project->panel_columns(), panels = ceil_div(b.hidden, nr);
  // The depthwise kernel has no vector of less than its width.
  const int64_t units =
      std::max<int64_t>(1, panels - (b.hidden % nr && b.hidden % nr < b.dw.width));
  const int64_t bands = std::min(b.rows, ceil_div(threads, units));
  const int64_t band = ceil_div(b.rows, bands);
  const int64_t step = apart(b.hidden, b.size), m = b.rows * b.out_width;
  const int64_t filtered_bytes = round_up(m * step, 4096);
  const int64_t capacity = b.most_seen(band), most_channels = (kGroupPanels + 1) * nr;
  const int64_t hidden_bytes = HiddenRows::bytes(b, capacity, most_channels);
  const int64_t own_bytes = hidden_bytes + round_up(b.project->sums_bytes(m), 4096);
  char* filtered =
      static_cast<char*>(scratch(Scratch::misc, size_t(filtered_bytes + own_bytes * threads)));
  const int64_t lanes = b.project->panel_rows(m), down = ceil_div(m, lanes);
  parallel(threads, [&](int thread, int came) {
    char* memory = filtered + filtered_bytes + own_bytes * thread;
    HiddenRows hidden(b, capacity, most_channels, memory);
    const Range mine = share_of(bands * units, 1, thread, came);
    for (int64_t item = mine.begin; item < mine.end;) {
      const int64_t at = item / units, q0 = item % units;
      const int64_t q1 = std::min({q0 + kGroupPanels, units, q0 + mine.end - item});
      const int64_t end = q1 == units ? panels : q1;
      const Range r{at * band, std::min(b.rows, (at + 1) * band)};
      if (r.begin < r.end) {
        hidden.panels(q0, end);
        hidden.need(b.seen(r));
        filter(b, hidden, r, q0 * nr, std::min(end * nr, b.hidden) - q0 * nr,
               filtered + r.begin * b.out_width * step + q0 * nr * b.size, step);
      }
      item += q1 - q0;
    }
    if (came > 1) barrier();
    const Range tiles = share_of(b.project->panels() * down, 1, thread, came);
    for (int64_t tile = tiles.begin; tile < tiles.end;) {
      const int64_t q = tile / down, p0 = tile % down, p1 = std::min(down, p0 + tiles.end - tile);
      const int64_t first = p0 * lanes;
      b.project->run(result(b, first),
                     {filtered + first * step, step / b.size, std::min(p1 * lanes, m) - first}, q,
                     q + 1, memory + hidden_bytes);
      tile += p1 - p0;
    }
  });
}

}  // namespace

// Null: none.
static const Kernel* kernel_of(const Inverted& c) {
  // Split products read packed operands alone, so that the hidden layer would go through memory
  // after all: float32 is multiplied as it is, which is as exact.
  const bool exact_only = c.precision == Precision::highest;
  return strips_kernel(c.type, c.precision, exact_only);
}

bool takes_inverted_residual(const Inverted& c) {
  const Kernel* kernel = kernel_of(c);
  const int64_t hidden = c.depthwise.w.size[0];
  // Tiles have no tails along K: what lies behind the rows would be multiplied with.
  if (!kernel || hidden % kernel->k_step || hidden < conv_kernels().depthwise[int(c.type)].width ||
      !in_rows(c.y))
    return false;
  if (c.expands() && !is_pointwise(c))
    return RowProduct::takes_runs(
        *kernel, round_up(c.expand.w.size[1], kernel->k_step) * c.expand.w.spatial());
  return in_rows(c.x) && (!c.expands() || c.x.size[1] % kernel->k_step == 0);
}

bool inverted_residual(const Inverted& c) {
  if (!takes_inverted_residual(c)) return false;
  if (c.y.count() == 0) return true;
  count_call("inverted residual");
  const int64_t hidden = c.depthwise.w.size[0];
  // Multiplications for an element of the hidden layer.
  const int64_t first = c.expands() ? c.expand.w.size[1] * c.expand.w.spatial() : kTaps * kTaps;
  const double positions = double(c.y.size[0]) * double(c.y.spatial() * c.stride * c.stride);
  const int threads = positions * double(hidden) * double(first) < 1e6 ? 1 : max_threads();
  const Block b(c, *kernel_of(c), threads);
  if (threads > 1 && b.rows < kRowsAThread * threads)
    by_channels(b, threads);
  else
    by_rows(b, threads);
  scratch_trim();
  return true;
}

}  // namespace fastnn
