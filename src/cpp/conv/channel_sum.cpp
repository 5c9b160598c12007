// The sum of each channel over images and positions: the gradient of the bias.
#include <stdexcept>

#include "common/parallel.hpp"
#include "conv/conv.hpp"

#define FASTNN_TARGET portable
#define FASTNN_TARGET_ID 0
#include "isa/vec.hpp"

namespace fastnn {

namespace {

template <class T>
auto value(T x) {
  if constexpr (sizeof(T) == 8)
    return x;
  else
    return portable::to_f32(x);
}

// In float32 (float64 for float64) over short blocks, which a float64 adds up: the error is that of
// one block.
constexpr int64_t kLanes = 16, kSteps = 64;

template <class T>
double sum_run(const T* x, int64_t stride, int64_t n) {
  using Acc = decltype(value(T{}));
  double total = 0;
  int64_t i = 0;
  while (n - i >= kLanes) {
    Acc block[kLanes] = {};
    for (int64_t step = 0; step < kSteps && n - i >= kLanes; step++, i += kLanes)
      if (stride == 1)
        for (int64_t l = 0; l < kLanes; l++) block[l] += value(x[i + l]);
      else
        for (int64_t l = 0; l < kLanes; l++) block[l] += value(x[(i + l) * stride]);
    for (const Acc v : block) total += v;
  }
  for (; i < n; i++) total += value(x[i * stride]);
  return total;
}

template <class T>
void sum_channels(const Tensor5& y, T* out) {
  const double microseconds = double(y.count()) * sizeof(T) / 1e4;
  parallel(microseconds < 20 ? 1 : max_threads(), [&](int thread, int threads) {
    const Range mine = share_of(y.size[1], 1, thread, threads);
    for (int64_t c = mine.begin; c < mine.end; c++) {
      double total = 0;
      const T* channel = reinterpret_cast<const T*>(y.data) + c * y.stride[1];
      const bool plane = y.size[3] == 1 || y.stride[3] == y.stride[4] * y.size[4];
      const int64_t rows = plane ? 1 : y.size[3],
                    length = plane ? y.size[3] * y.size[4] : y.size[4];
      for (int64_t n = 0; n < y.size[0]; n++)
        for (int64_t d = 0; d < y.size[2]; d++)
          for (int64_t h = 0; h < rows; h++)
            total += sum_run(channel + n * y.stride[0] + d * y.stride[2] + h * y.stride[3],
                             y.size[4] == 1 ? y.stride[3] : y.stride[4], length);
      if constexpr (sizeof(T) == 8)
        out[c] = total;
      else
        portable::from_f32(out[c], float(total));
    }
  });
}

}  // namespace

void channel_sum(const Tensor5& y, DType type, void* out) {
  // Neighbouring channels are summed side by side, where the positions are one after the other.
  const int64_t step = y.stride[4], c = y.size[1];
  if (y.stride[1] == 1 && c > 1 && y.size[4] > 1 && y.stride[3] == step * y.size[4] &&
      (y.size[2] == 1 || y.stride[2] == y.stride[3] * y.size[3]) &&
      (y.size[0] == 1 || y.stride[0] == step * y.spatial()))
    return column_sum(y.data, y.size[0] * y.spatial(), c, step, 1, type, out);
  switch (type) {
    case DType::f32:
      return sum_channels(y, (float*)out);
    case DType::f64:
      return sum_channels(y, (double*)out);
    case DType::bf16:
      return sum_channels(y, (bf16*)out);
    case DType::f16:
      return sum_channels(y, (f16*)out);
    default:
      throw std::invalid_argument("channel_sum: dtype: expected a floating-point type");
  }
}

}  // namespace fastnn
