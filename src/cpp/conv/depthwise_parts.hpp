// What depthwise convolution and its weight's gradient share.
#pragma once
#include <algorithm>

#include "common/parallel.hpp"
#include "conv/axis.hpp"
#include "conv/conv.hpp"
#include "conv/kernels.hpp"

namespace fastnn {

inline int64_t multiplier(const Conv& c) { return c.w.size[0] / c.groups; }
// Channels are neighbours in both images, and one to one.
inline bool channels_last(const Conv& c) {
  return c.x.stride[1] == 1 && c.y.stride[1] == 1 && multiplier(c) == 1;
}
inline int threads_for(const Conv& c) {
  return double(c.y.count()) * double(c.w.spatial()) < 3e5 ? 1 : max_threads();
}
// Positions of a plane are evenly spaced.
inline bool is_even(const Tensor5& t) {
  return t.size[3] <= 1 || t.size[4] <= 1 || t.stride[3] == t.size[4] * t.stride[4];
}
inline int64_t size_of(const Conv& c) { return int64_t(dtype_size(c.type)); }
inline int64_t sum_size(const Conv& c) { return c.type == DType::f64 ? 8 : 4; }

inline void set_forward_axes(const Conv& c, Axis axis[kSpatial]) {
  for (int d = 0; d < kSpatial; d++)
    axis[d] = {c.x.size[2 + d], c.y.size[2 + d], c.stride[d],
               c.w.size[2 + d], -c.padding[d],   c.dilation[d]};
}

// Some rows of a plane with what surrounds it as zeros, the elements of each row sorted by their
// remainder to the step, so that each tap of a row of positions is a run of neighbours:
// [tap in depth][row][remainder][column].
struct Window {
  const Axis* axis;
  int64_t size;  // of an element
  int64_t rows, columns, row_stride, depth_stride;

  Window(const Axis* a, int64_t element_size, int64_t most_rows, int64_t column_grain = 1)
      : axis(a), size(element_size) {
    rows = (most_rows - 1) * a[1].step + a[1].reach() + 1;
    columns = a[2].out + a[2].reach() / a[2].step;
    columns = (columns + column_grain - 1) / column_grain * column_grain;
    row_stride = a[2].step * columns;
    depth_stride = rows * row_stride;
  }
  int64_t elements() const { return axis[0].taps * depth_stride; }
  int64_t offset(int64_t t0, int64_t t1, int64_t t2) const {
    const int64_t w = axis[2].tap(t2), step = axis[2].step;
    return t0 * depth_stride + axis[1].tap(t1) * row_stride + w % step * columns + w / step;
  }
  // For positions (o0, [o1, o1 + count)).
  void load(const ConvKernels& kernels, const char* plane, const int64_t* stride, int64_t o0,
            int64_t o1, int64_t count, char* to) const {
    const auto copy = kernels.copy_rows[size_index(size)];
    const int64_t used = (count - 1) * axis[1].step + axis[1].reach() + 1;
    const int64_t top = o1 * axis[1].step + axis[1].lowest();
    const int64_t begin = std::clamp<int64_t>(-top, 0, used),
                  end = std::clamp<int64_t>(axis[1].in - top, begin, used);
    const int64_t step = axis[2].step, left = axis[2].lowest();
    for (int64_t t = 0; t < axis[0].taps; t++) {
      char* dst = to + t * depth_stride * size;
      const bool inside = axis[0].sees(o0, t);
      const int64_t at = o0 * axis[0].step + axis[0].first + t * axis[0].delta;
      const int64_t from = inside ? begin : 0, until = inside ? end : 0;
      auto zero = [&](int64_t a, int64_t b) {
        if (a < b)
          copy(dst + a * row_stride * size, row_stride, plane, 0, b - a, 1, 0, 0, row_stride);
      };
      zero(0, from);
      if (from < until)
        for (int64_t q = 0; q < step; q++) {
          // Column j of this remainder is the element left + q + j * step of its row.
          const int64_t x0 = left + q;
          const int64_t lo = std::clamp<int64_t>(ceil_div_signed(-x0, step), 0, columns),
                        hi = std::clamp<int64_t>(ceil_div_signed(axis[2].in - x0, step), lo,
                                                 columns);
          copy(dst + (from * row_stride + q * columns) * size, row_stride,
               plane + (at * stride[0] + (top + from) * stride[1] + x0 * stride[2]) * size,
               stride[1], until - from, step * stride[2], lo, hi, columns);
        }
      zero(until, used);
    }
  }
};

constexpr int64_t kWindowBytes = 64 << 10;

// As many rows of positions at a time as keep their window in the cache.
inline int64_t rows_at_once(const Axis* axis, int64_t size, int64_t planes) {
  const Window one(axis, size, 1);
  const int64_t a_row = std::max<int64_t>(1, axis[0].taps * axis[1].step * one.row_stride * size);
  const int64_t fixed = one.elements() * size;
  return std::clamp<int64_t>((kWindowBytes / planes - fixed) / a_row, 1,
                             std::max<int64_t>(1, axis[1].out));
}

}  // namespace fastnn
