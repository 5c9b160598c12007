// Convolution of 8-bit images: a matrix product that reads the image where it lies, or, channel by
// channel, a loop over the taps.
#include "conv/int8_conv.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/integers.hpp"
#include "common/kernels_of.hpp"
#include "conv/int8_kernels.hpp"
#include "conv/parts.hpp"
#include "conv/strips.hpp"
#include "gemm/kernel.hpp"
#include "gemm/prepared.hpp"

namespace fastnn {

namespace {

double work(const Int8Conv& c) {
  return double(c.y.count()) * double(c.w.size[1]) * double(c.w.spatial());
}

// ---- depthwise ---------------------------------------------------------------------------------

Int8DepthwiseFn depthwise_kernel() { return FASTNN_KERNELS_OF(int8_depthwise); }

bool is_depthwise(const Int8Conv& c) { return c.w.size[1] == 1 && c.w.size[0] == c.groups; }

// Filters (t, c) as the words that are multiplied.
void widen_filters(const Tensor5& w, int32_t* to) {
  int64_t tap = 0;
  for (int64_t i = 0; i < w.size[2]; i++)
    for (int64_t j = 0; j < w.size[3]; j++)
      for (int64_t k = 0; k < w.size[4]; k++, tap++) {
        const auto* from = reinterpret_cast<const int8_t*>(w.data) + i * w.stride[2] +
                           j * w.stride[3] + k * w.stride[4];
        for (int64_t m = 0; m < w.size[0]; m++) to[tap * w.size[0] + m] = from[m * w.stride[0]];
      }
}

void depthwise(const Int8Conv& c) {
  count_call("int8 depthwise");
  const int64_t channels = c.groups, taps = c.w.spatial();
  const size_t bytes = size_t(taps * channels) * sizeof(int32_t);
  const char* filters;
  auto fill = [&](char* to) {
    Prepared::want(c.w.data, c.w.count());
    widen_filters(c.w, reinterpret_cast<int32_t*>(to));
  };
  if (c.prepared) {
    filters = c.prepared->get("int8 depthwise", nullptr, 0, 0, bytes, fill);
  } else {
    char* filled = static_cast<char*>(scratch(Scratch::misc, bytes));
    fill(filled);
    filters = filled;
  }
  const std::vector<uint8_t> outside(size_t(channels), uint8_t(c.outside));
  const auto kernel = depthwise_kernel();
  const int64_t lines = c.y.size[0] * c.y.size[2] * c.y.size[3], line = c.y.size[4];
  const int64_t size = int64_t(dtype_size(c.type));
  const int threads = threads_for(work(c));
  // What each tap of each position of a line sees.
  auto* seen = static_cast<const uint8_t**>(
      scratch(Scratch::accumulator, size_t(threads * line * taps) * sizeof(uint8_t*)));
  parallel(threads, [&](int thread, int came) {
    const uint8_t** x = seen + thread * line * taps;
    const Range mine = share_of(lines, 1, thread, came);
    for (int64_t l = mine.begin; l < mine.end; l++) {
      const int64_t n = l / (c.y.size[3] * c.y.size[2]),
                    o[] = {l / c.y.size[3] % c.y.size[2], l % c.y.size[3]};
      int64_t tap = 0;
      for (int64_t i = 0; i < c.w.size[2]; i++)
        for (int64_t j = 0; j < c.w.size[3]; j++) {
          const int64_t d = o[0] * c.stride[0] - c.padding[0] + i * c.dilation[0],
                        h = o[1] * c.stride[1] - c.padding[1] + j * c.dilation[1];
          const bool inside = d >= 0 && d < c.x.size[2] && h >= 0 && h < c.x.size[3];
          const auto* row =
              reinterpret_cast<const uint8_t*>(c.x.data) +
              (inside ? n * c.x.stride[0] + d * c.x.stride[2] + h * c.x.stride[3] : 0);
          for (int64_t k = 0; k < c.w.size[4]; k++, tap++)
            for (int64_t p = 0; p < line; p++) {
              const int64_t w = p * c.stride[2] - c.padding[2] + k * c.dilation[2];
              x[p * taps + tap] =
                  inside && w >= 0 && w < c.x.size[4] ? row + w * c.x.stride[4] : outside.data();
            }
        }
      const int64_t at = n * c.y.stride[0] + o[0] * c.y.stride[2] + o[1] * c.y.stride[3];
      kernel(x, reinterpret_cast<const int32_t*>(filters), int(taps), line, channels, c.requantize,
             c.type, c.y.data + at * size, c.y.stride[4], c.residual ? c.residual + at : nullptr);
    }
  });
}

// ---- product -----------------------------------------------------------------------------------

// Where each position of the input meets one of the output alone: all positions, of all images if
// they go on evenly, as lines of a length that tiles divide well.
void as_lines(Patches& p, Tensor5& y, int64_t mr) {
  Tensor5 x;
  x.size[0] = p.images, x.stride[0] = p.image_stride, x.size[1] = p.channels;
  for (int d = 0; d < kSpatial; d++) {
    if (p.taps[d] != 1 || p.step[d] != 1 || p.first[d] != 0 || p.size[d] != p.out[d]) return;
    x.size[2 + d] = p.size[d], x.stride[2 + d] = p.stride[d];
  }
  int64_t x_step, y_step;
  if (!flat(x, x_step) || !flat(y, y_step)) return;
  int64_t positions = x.spatial();
  if (p.images == 1 || (x.stride[0] == positions * x_step && y.stride[0] == positions * y_step)) {
    positions *= p.images;
    p.images = y.size[0] = 1;
  }
  constexpr int64_t kMost = 512;
  int64_t line = positions, rows = round_up(positions, mr);  // of all tiles
  if (positions > kMost) line = p.size[2], rows = positions / line * round_up(line, mr);
  for (int64_t l = std::min(positions, kMost); l > 1; l--)
    if (positions % l == 0 && positions / l * round_up(l, mr) < rows)
      line = l, rows = positions / l * round_up(l, mr);
  p.size[0] = p.out[0] = y.size[2] = 1;
  p.size[1] = p.out[1] = y.size[3] = positions / line;
  p.size[2] = p.out[2] = y.size[4] = line;
  p.stride[1] = line * x_step, p.stride[2] = x_step;
  y.stride[3] = line * y_step, y.stride[4] = y_step;
}

// Filters (m, t, c) with the channels padded with zeros.
void order_filters(const Tensor5& w, int64_t padded, char* to) {
  std::memset(to, 0, size_t(w.size[0] * w.spatial() * padded));
  for (int64_t m = 0; m < w.size[0]; m++)
    for (int64_t i = 0; i < w.size[2]; i++)
      for (int64_t j = 0; j < w.size[3]; j++)
        for (int64_t k = 0; k < w.size[4]; k++, to += padded) {
          const char* from =
              w.data + m * w.stride[0] + i * w.stride[2] + j * w.stride[3] + k * w.stride[4];
          for (int64_t c = 0; c < w.size[1]; c++) to[c] = from[c * w.stride[1]];
        }
}
// Whether they lie so.
bool are_ordered(const Tensor5& w, int64_t padded) {
  if (padded != w.size[1] || (w.size[1] > 1 && w.stride[1] != 1)) return false;
  int64_t expected = w.size[1];
  for (const int d : {4, 3, 2, 0}) {
    if (w.size[d] != 1 && w.stride[d] != expected) return false;
    expected *= w.size[d];
  }
  return true;
}

void product(const Int8Conv& c, int64_t group, int threads) {
  const int64_t channels = c.w.size[1], filters = c.w.size[0] / c.groups;
  Tensor5 y = channels_from(c.y, group * filters, filters, c.type);
  Tensor5 w = c.w;
  w.data += group * filters * w.stride[0], w.size[0] = filters;
  Patches p =
      patches_of(channels_from(c.x, group * channels, channels, DType::u8), channels, DType::u8);
  p.outside = c.outside;
  for (int d = 0; d < kSpatial; d++) {
    p.out[d] = c.y.size[2 + d], p.step[d] = c.stride[d];
    p.taps[d] = c.w.size[2 + d], p.first[d] = -c.padding[d], p.delta[d] = c.dilation[d];
  }
  const Kernel& kn = byte_strips_kernel(channels);
  as_lines(p, y, kn.mr);
  const PatchStrips strips(p, kn.k_step);
  const int64_t padded = PatchStrips::padded_channels(p, kn.k_step);

  const char* ordered = w.data;
  if (!are_ordered(w, padded)) {
    const size_t bytes = size_t(filters * p.tap_count() * padded);
    auto order = [&](char* to) {
      Prepared::want(c.w.data, c.w.count());
      order_filters(w, padded, to);
    };
    if (c.prepared) {
      ordered = c.prepared->get("int8 filters", nullptr, padded, group, bytes, order);
    } else {
      char* made = static_cast<char*>(scratch(Scratch::misc, bytes));
      order(made);
      ordered = made;
    }
  }
  Requantize columns = c.requantize;
  columns.start += group * filters, columns.scale += group * filters;
  columns.shift += group * filters;
  columns.small = has_small_results(columns, filters);
  Gemm g;
  g.m = p.images * p.positions(), g.n = filters, g.k = p.tap_count() * padded;
  g.a.type = DType::u8, g.b.type = DType::s8, g.c.type = c.type;
  g.b.data = const_cast<char*>(ordered), g.b.rs = 1, g.b.cs = g.k;
  g.c.data = y.data, g.c.rs = y.stride[4], g.c.cs = y.stride[1];
  g.rows.length = y.size[4];
  const int from[] = {0, 2, 3};
  for (int d = 0; d < 3; d++) g.rows.counts[d] = y.size[from[d]], g.rows.c[d] = y.stride[from[d]];
  std::copy(g.rows.c, g.rows.c + Pieces::kDims, g.rows.residual);
  g.requantize = &columns;
  if (c.residual) {
    g.residual = g.c, g.beta = 1;
    g.residual.data = const_cast<char*>(c.residual) + group * filters;
  }
  g.a_strips = &strips;
  g.prepared = c.prepared, g.prepared_part = group * filters;
  count_call(kn.name);
  run_strips(kn, g, threads);
}

}  // namespace

void int8_conv(const Int8Conv& c) {
  if (c.y.count() == 0) return;
  if (is_depthwise(c)) return depthwise(c);
  for_groups(c.groups, work(c), [&](int64_t group, int threads) { product(c, group, threads); });
}

}  // namespace fastnn
