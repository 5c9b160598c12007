// The pooling kernels for Python.
#include "pool/pool.hpp"
#include "pool/int8_max.hpp"

#include <pybind11/pybind11.h>

#include "bind/bind.hpp"
#include "bind/pool.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

struct Job {
  const char* name;
  void (*run)(const PoolCall&);
  bool reads_codes;
};
constexpr Job kJobs[] = {
    {"max_pool", max_pool, false},
    {"max_pool_scatter", max_pool_scatter, true},
    {"max_pool_gather", max_pool_gather, true},
    {"max_pool_indices", max_pool_indices, true},
    {"avg_pool", avg_pool, false},
    {"avg_pool_backward", avg_pool_backward, false},
};

// (batch, channels, d, h, w) from (batch, channels, h, w), (channels, w) and so on. Where there is
// no batch it has size 1.
void read_five(const char* op, const char* name, py::handle tuple, int dims, int64_t missing,
               int64_t* to) {
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

void pool_call(int job, int dims, uintptr_t x_ptr, py::handle x_shape, py::handle x_strides,
               uintptr_t out_ptr, py::handle out_shape, py::handle out_strides, uintptr_t codes_ptr,
               py::handle code_strides, bool wide_codes, py::handle kernel, py::handle stride,
               py::handle padding, py::handle dilation, bool include_padding, double divisor,
               int dtype) {
  if (job < 0 || job >= int(sizeof(kJobs) / sizeof(*kJobs)))
    bad_argument("pool", "job", "0 to 5, got " + std::to_string(job));
  const char* op = kJobs[job].name;
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
  if (!empty && (!out_ptr || (!x_ptr && kJobs[job].run != max_pool_indices)))
    bad_argument(op, "x_ptr, out_ptr", "addresses");
  if (!empty && kJobs[job].reads_codes && !codes_ptr) bad_argument(op, "codes_ptr", "an address");
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
  py::gil_scoped_release release;
  kJobs[job].run(call);
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
