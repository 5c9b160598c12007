// The arguments of a pooling, read from Python, for an input of some shape.
#pragma once
#include "bind/image_tensors.hpp"
#include "pool/pool.hpp"

namespace fastnn::tensors {

enum PoolKind { kMaximum = 0, kAverage = 1 };

constexpr int kPoolArguments = 2;  // kind and windows

// What a call asks for, and what it gives.
struct Pool {
  PoolCall call;
  int dims;  // spatial ones
  bool adaptive;
  double taps = 1;          // of the largest window, or no fewer
  int64_t shape[kMaxDims];  // of the result

  // None and the numbers a tuple of output sizes may hold beside them.
  bool read_output_size(PyObject* size, const int64_t* in) {
    const bool tuple = PyTuple_CheckExact(size);
    if (tuple && PyTuple_GET_SIZE(size) != dims) return false;
    for (int d = 0; d < dims; d++) {
      PyObject* number = tuple ? PyTuple_GET_ITEM(size, d) : size;
      int64_t& out = shape[2 + d];
      if (tuple && dims > 1 && number == Py_None)
        out = in[d];
      else if (!numbers(number, 1, 1, &out))
        return false;
      PoolAxis& a = call.axis[3 - dims + d];
      a.in = in[d], a.out = out, a.kernel = 0;
      taps *= double((in[d] - 1) / out + 2);
    }
    return true;
  }

  // (kernel_size, stride, padding, dilation, ceil_mode, count_include_pad, divisor_override)
  bool read_windows(PyObject* windows, const int64_t* in) {
    auto argument = [windows](int i) { return PyTuple_GET_ITEM(windows, i); };
    int64_t kernel[kMostSpatial], stride[kMostSpatial], padding[kMostSpatial],
        dilation[kMostSpatial];
    bool ceil;
    PyObject* steps = argument(1) == Py_None ? argument(0) : argument(1);
    if (!numbers(argument(0), dims, 1, kernel) || !numbers(steps, dims, 1, stride) ||
        !numbers(argument(2), dims, 0, padding) || !numbers(argument(3), dims, 1, dilation) ||
        !flag(argument(4), ceil) || !flag(argument(5), call.include_padding))
      return false;
    if (argument(6) != Py_None) {
      int64_t divisor;
      if (!numbers(argument(6), 1, 1, &divisor)) return false;  // negative ones take the long way
      call.divisor = double(divisor);
    }
    for (int d = 0; d < dims; d++) {
      PoolAxis& a = call.axis[3 - dims + d];
      a = {in[d], 1, kernel[d], stride[d], padding[d], dilation[d]};
      const int64_t reach = a.dilation * (a.kernel - 1) + 1, room = a.in + 2 * a.padding - reach;
      if (a.padding > a.kernel / 2 || room < 0 || a.dilation > a.in) return false;
      a.out = (ceil ? room + a.stride - 1 : room) / a.stride + 1;
      // No window begins in the padding on the right.
      if (ceil && (a.out - 1) * a.stride >= a.in + a.padding) a.out--;
      shape[2 + d] = a.out;
      taps *= double(a.kernel);
    }
    return true;
  }

  // `windows`: as above, or, of adaptive ones, (output_size,). `size`: the input's.
  bool read(PyObject* windows, DType type, const int64_t* size, int size_dims) {
    dims = size_dims - 2;
    if (dims < 1 || dims > kMostSpatial || !PyTuple_CheckExact(windows)) return false;
    adaptive = PyTuple_GET_SIZE(windows) == 1;
    if (!adaptive && PyTuple_GET_SIZE(windows) != 7) return false;
    call.type = type;
    call.batch = shape[0] = size[0], call.channels = shape[1] = size[1];
    if (!(adaptive ? read_output_size(PyTuple_GET_ITEM(windows, 0), size + 2)
                   : read_windows(windows, size + 2)))
      return false;
    call.wide_codes = taps > 256;
    return taps <= double(kMostTaps);
  }

  DType code_type() const { return call.wide_codes ? DType::s32 : DType::u8; }

  // Whether torch makes the result of this input channels-last.
  bool gives_channels_last(const Tensor& x, PoolKind kind, bool grad) const {
    if (dims == 1 && !adaptive && kind == kMaximum && !grad) return false;
    if (dims == 3 && (kind == kAverage || adaptive)) {
      // One average of a whole volume is torch.mean's.
      const bool whole = shape[2] == 1 && shape[3] == 1 && shape[4] == 1;
      if (!whole || !adaptive || kind == kMaximum) return false;
    }
    if (dims > 1) return like_channels_last(x.shape, x.strides, x.dims);
    // torch sees one dimension as the second of two.
    const int64_t size[4] = {x.shape[0], x.shape[1], 1, x.shape[2]};
    const int64_t stride[4] = {x.strides[0], x.strides[1], x.shape[2] * x.strides[2], x.strides[2]};
    return like_channels_last(size, stride, 4);
  }

  double operations() const {
    double in = double(call.batch * call.channels), out = in * taps;
    for (const PoolAxis& a : call.axis) in *= double(a.in), out *= double(a.out);
    return in + out;
  }
};

inline void set(PoolTensor& to, const Tensor& t) {
  to.data = t.data;
  to.stride[0] = t.strides[0], to.stride[1] = t.strides[1];
  for (int d = 2; d < t.dims; d++) to.stride[5 - t.dims + d] = t.strides[d];
}

}  // namespace fastnn::tensors
