// The short way of pooling: see tensors.cpp.
#include <algorithm>

#include "bind/image_tensors.hpp"
#include "pool/pool.hpp"

namespace py = pybind11;
using namespace fastnn;
using namespace fastnn::tensors;

namespace {

enum Kind { kMaximum = 0, kAverage = 1 };

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
  bool gives_channels_last(const Tensor& x, Kind kind, bool grad) const {
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

void set(PoolTensor& to, const Tensor& t) {
  to.data = t.data;
  to.stride[0] = t.strides[0], to.stride[1] = t.strides[1];
  for (int d = 2; d < t.dims; d++) to.stride[5 - t.dims + d] = t.strides[d];
}

bool has_shape(const Tensor& t, const int64_t* shape, int dims) {
  return t.dims == dims && std::equal(shape, shape + dims, t.shape);
}

// tensor_pool(make, kind, dims, x, windows), of x (N, C, *spatial): the result, or, where a
// gradient is wanted, (result, codes or None, whether they are channels-last).
PyObject* tensor_pool(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor x, out, codes;
  Pool pool;
  int kind, dims;
  if (n != 5 || !readable() || !integer(args[1], kAverage, kind) ||
      !integer(args[2], kMostSpatial, dims) || !read(args[3], x) || x.dims != dims + 2 ||
      !pool.read(args[4], x.type, x.shape, x.dims) || !quiet())
    return not_taken();
  const bool grad = wants_grad(args[3]);
  if (PyErr_Occurred()) return not_taken();
  const bool last = pool.gives_channels_last(x, Kind(kind), grad);
  Held result{new_image(args[0], x, pool.shape, x.dims, last, x.type, out)}, found;
  if (!result.object) return not_taken();
  if (grad && kind == kMaximum) {
    found.object = new_image(args[0], x, pool.shape, x.dims, last, pool.code_type(), codes);
    if (!found.object) return not_taken();
    set(pool.call.codes, codes);
  }
  set(pool.call.x, x), set(pool.call.out, out);
  result.object = run(result.release(), pool.operations(),
                      [&] { kind == kMaximum ? max_pool(pool.call) : avg_pool(pool.call); });
  if (!grad || !result.object) return result.release();
  return PyTuple_Pack(3, result.object, found.object ? found.object : Py_None,
                      last ? Py_True : Py_False);
}

// tensor_pool_backward(make, kind, size, grad, codes, last, windows): the gradient of an input of
// shape `size`, channels-last or not, from what tensor_pool gave.
PyObject* tensor_pool_backward(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor grad, codes, out;
  Pool pool;
  int kind;
  bool last;
  int64_t size[kMaxDims];
  if (n != 7 || !readable() || !integer(args[1], kAverage, kind) || !PyTuple_Check(args[2]) ||
      !read(args[3], grad) || PyTuple_GET_SIZE(args[2]) != grad.dims || !flag(args[5], last))
    return not_taken();
  for (int d = 0; d < grad.dims; d++)
    if (!numbers(PyTuple_GET_ITEM(args[2], d), 1, 1, size + d)) return not_taken();
  if (!pool.read(args[6], grad.type, size, grad.dims) || !has_shape(grad, pool.shape, grad.dims))
    return not_taken();
  if (kind == kMaximum) {
    if (!read_codes(args[4], codes) || codes.type != pool.code_type() ||
        !has_shape(codes, pool.shape, grad.dims))
      return not_taken();
    set(pool.call.codes, codes);
  }
  if (!quiet() || !grad_is_off()) return not_taken();
  PyObject* result = new_image(args[0], grad, size, grad.dims, last, grad.type, out);
  if (!result) return not_taken();
  set(pool.call.x, out), set(pool.call.out, grad);
  return run(result, pool.operations(), [&] {
    kind == kMaximum ? max_pool_scatter(pool.call) : avg_pool_backward(pool.call);
  });
}

PyMethodDef pool_functions[] = {
    method("tensor_pool", tensor_pool,
           "Pooling; None where not taken, (result, codes, channels_last) where a gradient is "
           "wanted."),
    method("tensor_pool_backward", tensor_pool_backward,
           "The gradient of the input; None where not taken."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_pool_tensors(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), pool_functions) != 0) throw py::error_already_set();
}
