#include "conv/depthwise_window.hpp"

#include <vector>

#include "common/parallel.hpp"
#include "conv/kernels.hpp"

namespace fastnn {

namespace {

constexpr int kTaps = 3;
constexpr int kMostPointers = 128;                 // of a tile
constexpr int64_t kCacheBytes = int64_t(1) << 20;  // of input and output that a core has at hand

}  // namespace

bool window_fits(const Axis* a, int64_t channels, DType type) {
  const DepthwiseKernels& dw = conv_kernels().depthwise[int(type)];
  return channels >= dw.width && a[0].taps == 1 && a[1].taps == kTaps && a[2].taps == kTaps &&
         std::abs(a[1].delta) == 1 && std::abs(a[2].delta) == 1 && a[1].step == a[2].step &&
         a[1].step <= 2;
}

void run_window(const WindowJob& j, int threads) {
  const Conv& c = j.c;
  count_call("depthwise window");
  const DepthwiseKernels& dw = conv_kernels().depthwise[int(c.type)];
  const Axis* a = j.axis;
  const int64_t size = dtype_size(c.type), channels = j.out.size[1], step = a[1].step;
  const int64_t columns = (dw.window_positions - 1) * step + kTaps;
  const int64_t bands = (a[1].out + dw.window_rows - 1) / dw.window_rows;
  const std::vector<char> zeros(size_t(channels * size));

  // The filter in the order of the window, whichever way its taps run.
  const void* w[kTaps * kTaps];
  for (int64_t i = 0; i < kTaps; i++)
    for (int64_t k = 0; k < kTaps; k++)
      w[a[1].tap(i) * kTaps + a[2].tap(k)] = j.filters + (i * j.tap_row + k * j.tap_column) * size;

  const int64_t on = dw.window_positions * step * j.in.stride[4];  // from a tile to the next
  const bool cached = (j.in.count() + j.out.count()) * size <= kCacheBytes * threads;

  parallel(threads, [&](int thread, int came) {
    const char* x[kMostPointers];
    const Range mine = share_of(j.out.size[0] * a[0].out * bands, 1, thread, came);
    for (int64_t unit = mine.begin; unit < mine.end; unit++) {
      const int64_t n = unit / bands / a[0].out, o0 = unit / bands % a[0].out,
                    o1 = unit % bands * dw.window_rows;
      const int rows = int(std::min<int64_t>(dw.window_rows, a[1].out - o1));
      const int64_t in_rows = (rows - 1) * step + kTaps;
      const int64_t depth = o0 * a[0].step + a[0].first;
      const char* image = j.in.data + (n * j.in.stride[0] + depth * j.in.stride[2]) * size;
      char* out =
          j.out.data + (n * j.out.stride[0] + o0 * j.out.stride[2] + o1 * j.out.stride[3]) * size;
      const int64_t top = o1 * step + a[1].lowest();
      auto row_inside = [&](int64_t i) {
        return a[0].sees(o0, 0) && top + i >= 0 && top + i < a[1].in;
      };
      bool inner = false;  // whether the tile before this one saw no side
      for (int64_t o2 = 0; o2 < a[2].out; o2 += dw.window_positions) {
        const int64_t left = o2 * step + a[2].lowest();
        const bool is_inner = left >= 0 && left + columns <= a[2].in;
        if (inner && is_inner) {
          for (int64_t i = 0; i < in_rows; i++)
            if (row_inside(i))
              for (int64_t k = 0; k < columns; k++) x[i * columns + k] += on * size;
        } else {
          for (int64_t i = 0; i < in_rows; i++)
            for (int64_t k = 0; k < columns; k++) {
              const bool inside = row_inside(i) && left + k >= 0 && left + k < a[2].in;
              x[i * columns + k] =
                  inside ? image + ((top + i) * j.in.stride[3] + (left + k) * j.in.stride[4]) * size
                         : zeros.data();
            }
        }
        inner = is_inner;
        const int positions = int(std::min<int64_t>(dw.window_positions, a[2].out - o2));
        char* to = out + o2 * j.out.stride[4] * size;
        dw.window(int(step), reinterpret_cast<const void* const*>(x), w, c.bias, to,
                  j.out.stride[3], j.out.stride[4], rows, positions, channels, cached ? 0 : on,
                  c.activation);
      }
    }
  });
}

}  // namespace fastnn
