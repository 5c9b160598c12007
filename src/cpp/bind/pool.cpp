// The pooling kernels for Python.
#include "pool/pool.hpp"
#include "pool/int8_max.hpp"

#include <pybind11/pybind11.h>

#include "bind/bind.hpp"
#include "bind/pool.hpp"
#include "bind/pool_arguments.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

// By PoolJob.
constexpr void (*kJobs[])(const PoolCall&) = {
    max_pool, max_pool_scatter, max_pool_gather, max_pool_indices, avg_pool, avg_pool_backward};

void pool_call(int job, int dims, uintptr_t x_ptr, py::handle x_shape, py::handle x_strides,
               uintptr_t out_ptr, py::handle out_shape, py::handle out_strides, uintptr_t codes_ptr,
               py::handle code_strides, bool wide_codes, py::handle kernel, py::handle stride,
               py::handle padding, py::handle dilation, bool include_padding, double divisor,
               int dtype) {
  const PoolCall call = pool_arguments(job, dims, x_ptr, x_shape, x_strides, out_ptr, out_shape,
                                       out_strides, codes_ptr, code_strides, wide_codes, kernel,
                                       stride, padding, dilation, include_padding, divisor, dtype);
  py::gil_scoped_release release;
  kJobs[job](call);
}

void int8_max(uintptr_t x, py::handle shape, uintptr_t y, py::handle out, py::handle kernel,
              py::handle stride, py::handle padding) {
  Int8MaxPool p;
  if (!int8_max_pool_arguments(p, x, shape, y, out, kernel, stride, padding)) return;
  py::gil_scoped_release release;
  int8_max_pool(p);
}

}  // namespace

bool fastnn::int8_max_pool_arguments(Int8MaxPool& p, uintptr_t x, py::handle shape, uintptr_t y,
                                     py::handle out, py::handle kernel, py::handle stride,
                                     py::handle padding) {
  const char* op = "int8_max_pool";
  int64_t size[4];
  if (read_tuple(op, "shape", shape, size, 4) != 4) bad_argument(op, "shape", "four sizes");
  if (read_tuple(op, "out", out, p.out, 2) != 2 ||
      read_tuple(op, "kernel", kernel, p.kernel, 2) != 2 ||
      read_tuple(op, "stride", stride, p.stride, 2) != 2 ||
      read_tuple(op, "padding", padding, p.padding, 2) != 2)
    bad_argument(op, "out, kernel, stride, padding", "two numbers each");
  p.images = size[0], p.channels = size[1], p.size[0] = size[2], p.size[1] = size[3];
  bool empty = p.images == 0 || p.channels == 0;
  for (const int64_t n : size)
    if (n < 0) bad_argument(op, "shape", "sizes of 0 or more");
  for (int d = 0; d < 2; d++) {
    if (p.kernel[d] < 1 || p.stride[d] < 1 || p.padding[d] < 0 || 2 * p.padding[d] > p.kernel[d])
      bad_argument(op, "kernel, stride, padding", "windows, padded by half of them at most");
    const int64_t seen = p.size[d] + 2 * p.padding[d] - p.kernel[d];
    if (p.out[d] < 0 ||
        (p.out[d] && (seen < 0 || (p.out[d] - 1) * p.stride[d] - p.padding[d] >= p.size[d])))
      bad_argument(op, "out", "windows of neighbours that meet the image");
    empty |= p.out[d] == 0;
  }
  if (empty) return false;
  if (!x || !y) bad_argument(op, "x, y", "addresses");
  p.x = reinterpret_cast<const uint8_t*>(x), p.y = reinterpret_cast<uint8_t*>(y);
  return true;
}

void bind_pool(py::module_& m) {
  m.def("int8_max_pool", &int8_max,
        "y = the maxima of windows of x (images, channels, height, width), uint8 with the channels "
        "as neighbours, both without gaps.",
        py::arg("x"), py::arg("shape"), py::arg("y"), py::arg("out"), py::arg("kernel"),
        py::arg("stride"), py::arg("padding"));
  m.def("pool", &pool_call,
        "job: 0 max_pool, 1 its gradient, 2 the gradient's, 3 the indices of its codes, "
        "4 avg_pool, 5 its gradient. x has the shape of the input, out and codes that of the "
        "output; the gradients write x. An empty kernel means adaptive windows.",
        py::arg("job"), py::arg("dims"), py::arg("x_ptr"), py::arg("x_shape"), py::arg("x_strides"),
        py::arg("out_ptr"), py::arg("out_shape"), py::arg("out_strides"), py::arg("codes_ptr"),
        py::arg("code_strides"), py::arg("wide_codes"), py::arg("kernel"), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("include_padding"), py::arg("divisor"),
        py::arg("dtype"));
}
