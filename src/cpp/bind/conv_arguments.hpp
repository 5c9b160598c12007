// What the bindings of all convolutions read of their arguments.
#pragma once
#include "bind/arguments.hpp"
#include "conv/conv.hpp"

namespace fastnn {

inline Tensor5 tensor5_argument(const char* op, const char* name, uintptr_t ptr,
                                pybind11::handle shape, pybind11::handle strides) {
  Tensor5 t;
  if (read_tuple(op, name, shape, t.size, 5) != 5 ||
      read_tuple(op, name, strides, t.stride, 5) != 5)
    bad_argument(op, name, "five sizes and strides");
  for (const int64_t size : t.size)
    if (size < 0) bad_argument(op, name, "sizes of 0 or more");
  if (!ptr && t.count()) bad_argument(op, name, "an address");
  t.data = reinterpret_cast<char*>(ptr);
  return t;
}

// The geometry of c, a Conv or one like it whose x, w and y are there. With `two_ends` the padding
// may be six numbers: those of the beginnings, then those of the ends.
template <class C>
void read_geometry(const char* op, C& c, pybind11::handle stride, pybind11::handle padding,
                   pybind11::handle dilation, int64_t groups, bool two_ends = false) {
  int64_t pads[2 * kSpatial];
  const int ends = read_tuple(op, "padding", padding, pads, two_ends ? 2 * kSpatial : kSpatial);
  if (read_tuple(op, "stride", stride, c.stride, kSpatial) != kSpatial ||
      (ends != kSpatial && ends != 2 * kSpatial) ||
      read_tuple(op, "dilation", dilation, c.dilation, kSpatial) != kSpatial)
    bad_argument(op, "stride, padding, dilation", "three numbers each");
  if (groups < 1 || c.x.size[1] != c.w.size[1] * groups || c.w.size[0] % groups ||
      c.y.size[1] != c.w.size[0])
    bad_argument(op, "groups", "channels that groups divide");
  if (c.x.size[0] != c.y.size[0]) bad_argument(op, "y", "as many images as x");
  for (int d = 0; d < kSpatial; d++) {
    const int64_t end = pads[ends - kSpatial + d];
    c.padding[d] = pads[d];
    if (c.stride[d] < 1 || c.dilation[d] < 1 || c.padding[d] < 0 || end < 0)
      bad_argument(op, "stride, padding, dilation", "positive numbers");
    // Each position of the filter starts within the padded input. (Positions beyond what a forward
    // convolution would have are a transposed one's output padding.)
    const int64_t reach =
        c.x.size[2 + d] + c.padding[d] + end - c.dilation[d] * (c.w.size[2 + d] - 1) - 1;
    if (c.w.size[2 + d] < 1 || (c.y.count() && c.y.size[2 + d] != reach / c.stride[d] + 1) ||
        (c.y.count() && reach < 0))
      bad_argument(op, "y", "the size that x, w, stride, padding and dilation give");
  }
  c.groups = groups;
}

}  // namespace fastnn
