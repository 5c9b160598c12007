#include "conv/depthwise_window.hpp"

#include <vector>

#include "common/parallel.hpp"
#include "conv/kernels.hpp"

namespace fastnn {

namespace {

constexpr int kTaps = 3;
constexpr int kMostPointers = 128;                 // of a tile,
constexpr int kMostRows = 8;                       // in so many rows
constexpr int64_t kCacheBytes = int64_t(1) << 20;  // of input and output that a core has at hand

}  // namespace

bool window_fits(const Axis* a, int64_t channels, DType type) {
  const DepthwiseKernels& dw = conv_kernels().depthwise[int(type)];
  return channels >= dw.width && a[0].taps == 1 && a[1].taps == kTaps && a[2].taps == kTaps &&
         std::abs(a[1].delta) == 1 && std::abs(a[2].delta) == 1 && a[1].step == a[2].step &&
         a[1].step <= 2;
}

void run_window_rows(const WindowRows& j, const char* const* in, int rows, char* out) {
  const DepthwiseKernels& dw = *j.kernels;
  const int64_t columns = (dw.window_positions - 1) * j.step + kTaps;
  const int64_t in_rows = (rows - 1) * j.step + kTaps;
  const int64_t on = dw.window_positions * j.step * j.in_step;  // from a tile to the next
  const char* x[kMostPointers];
  bool inner = false;  // whether the tile before this one saw no side
  for (int64_t o = 0; o < j.out_columns; o += dw.window_positions) {
    const int64_t left = o * j.step + j.first;
    const bool is_inner = left >= 0 && left + columns <= j.in_columns;
    for (int64_t i = 0; i < in_rows; i++) {
      const char** row = x + i * columns;
      if (inner && is_inner) {
        if (in[i])
          for (int64_t k = 0; k < columns; k++) row[k] += on;
      } else {
        for (int64_t k = 0; k < columns; k++)
          row[k] = in[i] && left + k >= 0 && left + k < j.in_columns
                       ? in[i] + (left + k) * j.in_step
                       : j.zeros;
      }
    }
    inner = is_inner;
    const int positions = int(std::min<int64_t>(dw.window_positions, j.out_columns - o));
    dw.window(int(j.step), reinterpret_cast<const void* const*>(x), j.filter, j.bias,
              out + o * j.out_step * j.size, j.out_row, j.out_step, rows, positions, j.channels,
              j.ahead ? on / j.size : 0, j.activation);
  }
}

void run_window(const WindowJob& j, int threads) {
  const Conv& c = j.c;
  count_call("depthwise window");
  const DepthwiseKernels& dw = conv_kernels().depthwise[int(c.type)];
  const Axis* a = j.axis;
  const int64_t size = dtype_size(c.type), channels = j.out.size[1], step = a[1].step;
  const int64_t bands = (a[1].out + dw.window_rows - 1) / dw.window_rows;
  const std::vector<char> zeros(size_t(channels * size));

  WindowRows w{};
  w.kernels = &dw, w.size = size, w.step = step, w.first = a[2].lowest();
  w.in_columns = a[2].in, w.out_columns = a[2].out, w.channels = channels;
  w.in_step = j.in.stride[4] * size, w.out_row = j.out.stride[3], w.out_step = j.out.stride[4];
  w.zeros = zeros.data(), w.bias = c.bias, w.activation = c.activation;
  // The filter in the order of the window, whichever way its taps run.
  for (int64_t i = 0; i < kTaps; i++)
    for (int64_t k = 0; k < kTaps; k++)
      w.filter[a[1].tap(i) * kTaps + a[2].tap(k)] =
          j.filters + (i * j.tap_row + k * j.tap_column) * size;
  w.ahead = (j.in.count() + j.out.count()) * size > kCacheBytes * threads;

  parallel(threads, [&](int thread, int came) {
    const char* rows_in[kMostRows];
    const Range mine = share_of(j.out.size[0] * a[0].out * bands, 1, thread, came);
    for (int64_t unit = mine.begin; unit < mine.end; unit++) {
      const int64_t n = unit / bands / a[0].out, o0 = unit / bands % a[0].out,
                    o1 = unit % bands * dw.window_rows;
      const int rows = int(std::min<int64_t>(dw.window_rows, a[1].out - o1));
      const int64_t depth = o0 * a[0].step + a[0].first, top = o1 * step + a[1].lowest();
      const char* image = j.in.data + (n * j.in.stride[0] + depth * j.in.stride[2]) * size;
      for (int64_t i = 0; i < (rows - 1) * step + kTaps; i++)
        rows_in[i] = a[0].sees(o0, 0) && top + i >= 0 && top + i < a[1].in
                         ? image + (top + i) * j.in.stride[3] * size
                         : nullptr;
      run_window_rows(
          w, rows_in, rows,
          j.out.data + (n * j.out.stride[0] + o0 * j.out.stride[2] + o1 * j.out.stride[3]) * size);
    }
  });
}

}  // namespace fastnn
