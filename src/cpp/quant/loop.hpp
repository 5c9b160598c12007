// The loop over all elements of what is quantized, on CPUs and GPUs: dimensions that lie densely
// together become one, with a pattern of scales that may repeat.
#pragma once
#include <algorithm>

#include "quant/quantize.hpp"

namespace fastnn {

enum class By { index, x, q };

// Shape and strides with as few dimensions as there can be, in the order of the index, or of the
// strides of x or q. The last is the inner loop: along it element i has scale
// (i / group % period) * stride.
struct Loop {
  int dims = 0;
  int64_t size[kMaxQuantizeDims], x[kMaxQuantizeDims], q[kMaxQuantizeDims], s[kMaxQuantizeDims];
  int64_t elements = 1;
  int64_t group = 1, period = 1, stride = 0;

  Loop(const Numbers& numbers, By by) {
    int order[kMaxQuantizeDims], kept = 0;
    for (int d = 0; d < numbers.dims; d++) {
      elements *= numbers.shape[d];
      if (numbers.shape[d] != 1) order[kept++] = d;
    }
    if (by != By::index) {
      const int64_t* strides = by == By::x ? numbers.x_strides : numbers.q_strides;
      std::stable_sort(order, order + kept, [&](int a, int b) { return strides[a] > strides[b]; });
    }
    for (int i = 0; i < kept; i++) {
      const int d = order[i], last = dims - 1;
      const int64_t n = numbers.shape[d], xs = numbers.x_strides[d], ss = numbers.scale_strides[d];
      const int64_t qs = numbers.q_strides ? numbers.q_strides[d] : 0;
      if (dims && x[last] == xs * n && q[last] == qs * n && s[last] == ss * n) {
        size[last] *= n, x[last] = xs, q[last] = qs, s[last] = ss;
      } else {
        size[dims] = n, x[dims] = xs, q[dims] = qs, s[dims] = ss;
        dims++;
      }
    }
    if (!dims) size[0] = dims = 1, x[0] = q[0] = 1, s[0] = 0;
    if (s[dims - 1])
      period = size[dims - 1], stride = s[dims - 1];
    else
      group = size[dims - 1];
    while (dims > 1 && merge_pattern(dims - 2, dims - 1)) dims--;
  }

  // Whether the elements of each scale lie in one run, of `group` elements, and nowhere else.
  bool each_in_a_run() const {
    bool alone = size[dims - 1] == group * period;
    for (int d = 0; d < dims - 1; d++) alone &= s[d] != 0;
    return alone;
  }

 private:
  bool merge_pattern(int outer, int last) {
    if (x[outer] != x[last] * size[last] || q[outer] != q[last] * size[last]) return false;
    const bool shared = group == size[last] && period == 1;
    if (s[outer] && !shared) return false;
    if (s[outer]) period = size[outer], stride = s[outer];
    x[outer] = x[last], q[outer] = q[last];
    size[outer] *= size[last];
    return true;
  }
};

// Random numbers go by the index, and so do numbers of which a byte holds two.
inline By order_for(const Numbers& numbers, bool stochastic, By otherwise) {
  return stochastic || is_packed(numbers.scheme) ? By::index : otherwise;
}

}  // namespace fastnn
