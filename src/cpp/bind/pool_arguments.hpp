// How the arguments of a pool are read, on CPUs and GPUs alike.
#pragma once
#include <pybind11/pybind11.h>

#include "bind/arguments.hpp"
#include "pool/pool.hpp"

namespace fastnn {

// By PoolJob.
constexpr const char* kPoolNames[] = {"max_pool",         "max_pool_scatter", "max_pool_gather",
                                      "max_pool_indices", "avg_pool",         "avg_pool_backward"};

// (batch, channels, d, h, w) from (batch, channels, h, w), (channels, w) and so on. Where there is
// no batch it has size 1.
inline void read_five(const char* op, const char* name, pybind11::handle tuple, int dims,
                      int64_t missing, int64_t* to) {
  int64_t given[5];
  const int n = read_tuple(op, name, tuple, given, 5);
  if (n != dims + 1 && n != dims + 2)
    bad_argument(op, name,
                 std::to_string(dims + 1) + " or " + std::to_string(dims + 2) + " entries, got " +
                     std::to_string(n));
  for (int i = 0; i < 5; i++) to[i] = missing;
  for (int d = 1; d <= dims; d++) to[5 - d] = given[n - d];
  to[1] = given[n - dims - 1];
  if (n == dims + 2) to[0] = given[0];
}

inline PoolCall pool_arguments(int job, int dims, uintptr_t x_ptr, pybind11::handle x_shape,
                               pybind11::handle x_strides, uintptr_t out_ptr,
                               pybind11::handle out_shape, pybind11::handle out_strides,
                               uintptr_t codes_ptr, pybind11::handle code_strides, bool wide_codes,
                               pybind11::handle kernel, pybind11::handle stride,
                               pybind11::handle padding, pybind11::handle dilation,
                               bool include_padding, double divisor, int dtype) {
  if (job < kPoolMax || job > kPoolAvgBackward)
    bad_argument("pool", "job", "0 to 5, got " + std::to_string(job));
  const char* op = kPoolNames[job];
  const bool reads_codes = job == kPoolScatter || job == kPoolGather || job == kPoolIndices;
  if (dims < 1 || dims > 3) bad_argument(op, "dims", "1 to 3, got " + std::to_string(dims));
  if (dtype < 0 || dtype >= kPoolTypes)
    bad_argument(op, "dtype", "a floating-point type (0 to 3), got " + std::to_string(dtype));
  PoolCall call;
  call.type = DType(dtype);
  int64_t in[5], out[5];
  read_five(op, "x_shape", x_shape, dims, 1, in);
  read_five(op, "out_shape", out_shape, dims, 1, out);
  for (int i = 0; i < 5; i++)
    if (in[i] < 0 || out[i] < 0) bad_argument(op, "shape", "sizes of 0 or more");
  if (in[0] != out[0] || in[1] != out[1])
    bad_argument(op, "out_shape", "the batch and the channels of x");
  call.batch = in[0];
  call.channels = in[1];
  read_five(op, "x_strides", x_strides, dims, 0, call.x.stride);
  read_five(op, "out_strides", out_strides, dims, 0, call.out.stride);
  if (codes_ptr) read_five(op, "code_strides", code_strides, dims, 0, call.codes.stride);
  call.x.data = reinterpret_cast<void*>(x_ptr);
  call.out.data = reinterpret_cast<void*>(out_ptr);
  call.codes.data = reinterpret_cast<void*>(codes_ptr);
  const bool empty = call.batch == 0 || call.channels == 0;
  if (!empty && (!out_ptr || (!x_ptr && job != kPoolIndices)))
    bad_argument(op, "x_ptr, out_ptr", "addresses");
  if (!empty && reads_codes && !codes_ptr) bad_argument(op, "codes_ptr", "an address");
  call.wide_codes = wide_codes;
  call.include_padding = include_padding;
  call.divisor = divisor;
  int64_t k[3], s[3], p[3], d[3];
  const int windows = read_tuple(op, "kernel", kernel, k, 3);  // none: adaptive
  if (windows != 0 && windows != dims)
    bad_argument(op, "kernel", std::to_string(dims) + " entries or none");
  if (windows && (read_tuple(op, "stride", stride, s, 3) != dims ||
                  read_tuple(op, "padding", padding, p, 3) != dims ||
                  read_tuple(op, "dilation", dilation, d, 3) != dims))
    bad_argument(op, "stride, padding, dilation", std::to_string(dims) + " entries");
  for (int i = 0; i < dims; i++) {
    PoolAxis& a = call.axis[3 - dims + i];
    a.in = in[5 - dims + i];
    a.out = out[5 - dims + i];
    a.kernel = 0;
    if (!windows) continue;
    if (k[i] < 1) bad_argument(op, "kernel", "sizes of 1 or more");
    a.kernel = k[i];
    a.stride = s[i];
    a.padding = p[i];
    a.dilation = d[i];
  }
  return call;
}

}  // namespace fastnn
