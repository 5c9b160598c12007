// How the bindings of quantization read their arguments, on CPUs and GPUs alike.
#pragma once
#include "bind/arguments.hpp"
#include "quant/quantize.hpp"

namespace fastnn {

// Numbers, as Python tells them: shapes and strides are tuples, read into the arrays here.
struct NumbersArgument {
  int64_t shape[kMaxQuantizeDims], x_strides[kMaxQuantizeDims], q_strides[kMaxQuantizeDims],
      scale_strides[kMaxQuantizeDims];
  Numbers numbers{};

  NumbersArgument(const char* op, pybind11::handle shape_, int dtype, uintptr_t x,
                  pybind11::handle x_strides_, int scheme, uintptr_t q, pybind11::handle q_strides_,
                  pybind11::handle scale_strides_, int64_t scales, bool has_q) {
    if (dtype < 0 || dtype >= kQuantizeTypes)
      bad_argument(op, "dtype", "a floating-point type (0 to 3), got " + std::to_string(dtype));
    if (scheme < 0 || scheme >= kSchemes)
      bad_argument(op, "scheme", "0 to 5, got " + std::to_string(scheme));
    const int dims = read_tuple(op, "shape", shape_, shape, kMaxQuantizeDims);
    bool empty = false;
    for (int d = 0; d < dims; d++) {
      if (shape[d] < 0) bad_argument(op, "shape", "sizes of 0 or more");
      empty |= shape[d] == 0;
    }
    auto strides = [&](const char* name, pybind11::handle tuple, int64_t* to) {
      if (read_tuple(op, name, tuple, to, kMaxQuantizeDims) != dims)
        bad_argument(op, name, "as many strides as dimensions");
    };
    strides("x_strides", x_strides_, x_strides);
    if (has_q) strides("q_strides", q_strides_, q_strides);
    strides("scale_strides", scale_strides_, scale_strides);
    int64_t last = 0;  // scale
    for (int d = 0; d < dims; d++) {
      if (scale_strides[d] < 0) bad_argument(op, "scale_strides", "strides of 0 or more");
      if (shape[d] > 0) last += (shape[d] - 1) * scale_strides[d];
    }
    if (scales < 0 || (!empty && last >= scales))
      bad_argument(op, "scales", "as many as the strides reach");
    if ((!x || (has_q && !q)) && !empty) bad_argument(op, "x, q", "addresses");
    numbers = {dims,
               shape,
               DType(dtype),
               reinterpret_cast<void*>(x),
               x_strides,
               Scheme(scheme),
               reinterpret_cast<void*>(q),
               has_q ? q_strides : nullptr,
               scale_strides,
               scales};
    if (has_q && is_packed(Scheme(scheme)) && !empty) check_packed(op);
  }

  // Elements are halves of bytes: the innermost dimensions are dense up to an even size (so that
  // they become one loop: those of x are, too), and all around them begin at whole bytes.
  void check_packed(const char* op) {
    int64_t dense = 1, x_step = 0;
    int d = numbers.dims - 1;
    for (; d >= 0 && dense % 2; d--) {
      if (shape[d] == 1) continue;
      if (!x_step) x_step = x_strides[d];
      if (q_strides[d] != dense || x_strides[d] != x_step * dense)
        bad_argument(op, "x_strides, q_strides", "dense groups where two numbers make a byte");
      dense *= shape[d];
    }
    if (dense % 2)
      bad_argument(op, "shape", "an even last dimension where two numbers make a byte");
    for (; d >= 0; d--)
      if (shape[d] != 1 && q_strides[d] % 2)
        bad_argument(op, "q_strides", "even strides where two numbers make a byte");
  }
  NumbersArgument(const NumbersArgument&) = delete;
};

inline const float* scale_argument(const char* op, uintptr_t scale, int64_t scales) {
  if (!scale && scales) bad_argument(op, "scale", "an address");
  return reinterpret_cast<const float*>(scale);
}

}  // namespace fastnn
