// Tensors (N, C, ...) seen as units, which have statistics of their own: a channel of all images
// (batch norm), a channel of an image, or a group of channels of an image (group norm).
#pragma once
#include "cuda/divisor.cuh"
#include "cuda/norm/batch_norm.hpp"

namespace fastnn::cuda {

enum class UnitKind { channel, channel_of_image, group_of_image };

// Strides in elements. Unit (i, c) has `rows` rows of `n` elements: element (r, j) of operand o
// lies i * image[o] + c * channel[o] + r * row[o] + j * step[o] behind data[o]. `across`: channels
// are neighbours in the result; then n is 1.
struct NormLayout {
  bool across = false;
  int64_t images = 1, channels = 1, units = 1;  // units: their product
  int64_t rows = 1, n = 1, per_unit = 1;
  Divisor by_n;  // 1 for rows of more than kDivided
  static constexpr int64_t kDivided = int64_t{1} << 30;
  void* data[kNormOperands] = {};
  int64_t image[kNormOperands] = {}, channel[kNormOperands] = {};
  int64_t row[kNormOperands] = {}, step[kNormOperands] = {};
  // 16 bytes of neighbours belong together, by the shape alone; and lie together in operand o.
  bool in_packs = false, packed[kNormOperands] = {};
};

// `by`: the operand whose channels decide whether the layout is across. False where an operand's
// elements of a unit are more than rows with one stride of elements with one stride.
inline bool norm_layout(NormLayout& l, UnitKind kind, int64_t groups, int dims,
                        const int64_t* shape, const NormOperand* operands, int count, int by,
                        int64_t item) {
  const bool of_image = kind != UnitKind::channel, grouped = kind == UnitKind::group_of_image;
  const int64_t share = grouped ? shape[1] / groups : 1, each = 16 / item;
  l.across = shape[1] > 1 && operands[by].strides[1] == 1 && !grouped;
  l.images = of_image ? shape[0] : 1;
  l.channels = shape[1] / share;
  auto stride = [&](int o, int d) { return operands[o].data ? operands[o].strides[d] : 0; };
  for (int o = 0; o < count; o++) {
    l.data[o] = operands[o].data;
    l.image[o] = l.images > 1 ? stride(o, 0) : 0;
    l.channel[o] = l.channels > 1 ? stride(o, 1) * share : 0;
  }
  // What follows each other in all operands becomes one.
  int kept = 0;
  int64_t size[kNormDims] = {}, steps[kNormOperands][kNormDims] = {};
  auto add = [&](int64_t more, int d) {
    if (more == 1) return;
    bool follows = kept > 0;
    for (int o = 0; o < count && follows; o++) follows = steps[o][kept - 1] == stride(o, d) * more;
    const int to = follows ? kept - 1 : kept++;
    size[to] = follows ? size[to] * more : more;
    for (int o = 0; o < count; o++) steps[o][to] = stride(o, d);
  };
  if (!of_image) add(shape[0], 0);
  add(share, 1);
  for (int d = 2; d < dims; d++) add(shape[d], d);
  auto take = [&](int64_t& n, int64_t* to) {
    if (kept == 0) return;
    n = size[--kept];
    for (int o = 0; o < count; o++) to[o] = steps[o][kept];
  };
  if (!l.across) take(l.n, l.step);
  take(l.rows, l.row);
  if (kept > 0) return false;
  l.units = l.images * l.channels, l.per_unit = l.rows * l.n;
  l.by_n = Divisor(l.n > NormLayout::kDivided ? 1 : l.n);
  l.in_packs = (l.across ? l.channels : l.n) % each == 0;
  for (int o = 0; o < count; o++)
    l.packed[o] = l.in_packs && (l.across ? l.channel[o] : l.step[o]) == 1 &&
                  l.image[o] % each == 0 && (l.across || l.channel[o] % each == 0) &&
                  l.row[o] % each == 0 && reinterpret_cast<uintptr_t>(l.data[o]) % 16 == 0;
  return true;
}

}  // namespace fastnn::cuda
