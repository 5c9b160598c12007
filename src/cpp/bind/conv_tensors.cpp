// The short way of convolutions: see tensors.cpp.
#include <algorithm>
#include <utility>

#include "bind/conv_layers.hpp"
#include "common/activation.hpp"
#include "gemm/prepared.hpp"

namespace py = pybind11;
using namespace fastnn;
using namespace fastnn::tensors;

namespace {

bool like_channels_last(const Tensor& t) {
  return t.dims == 4 && tensors::like_channels_last(t.shape, t.strides, t.dims);
}

bool dense_filters(const Tensor& w) {
  if (w.contiguous()) return true;
  int64_t strides[kMaxDims];
  channels_last_strides(w.shape, w.dims, strides);
  for (int d = 0; d < w.dims; d++)
    if (w.shape[d] != 1 && w.strides[d] != strides[d]) return false;
  return w.dims > 3;
}
bool evenly_spaced(const Tensor& y) {
  int64_t step = 0, count = 1;
  for (int d = y.dims - 1; d > 1; d--) {
    if (y.shape[d] == 1) continue;
    if (count == 1) step = y.strides[d];
    if (y.strides[d] != step * count) return false;
    count *= y.shape[d];
  }
  return true;
}

bool prepared_of(PyObject* object, Prepared*& prepared) {
  py::detail::make_caster<Prepared> caster;
  if (object == Py_None || !caster.load(object, false)) return false;
  prepared = py::detail::cast_op<Prepared*>(caster);
  return true;
}

// The filters, or their layout alone where they are None and `prepared` has been called with them.
bool read_filters(PyObject* object, Prepared* prepared, Tensor& w) {
  if (object == Py_None) {
    if (!prepared || !prepared->dims) return false;
    w = {nullptr, nullptr, prepared->type, prepared->dims, prepared->shape, prepared->strides};
    return true;
  }
  if (!read(object, w) || w.dims > Prepared::kMostDims) return false;
  if (prepared && !prepared->dims) {
    std::copy(w.shape, w.shape + w.dims, prepared->shape);
    std::copy(w.strides, w.strides + w.dims, prepared->strides);
    prepared->type = w.type, prepared->dims = w.dims;
  }
  return true;
}

// One number a filter, or none.
bool read_bias(PyObject* object, const Tensor& w, const char*& data) {
  data = nullptr;
  if (object == Py_None) return true;
  Tensor bias;
  if (!read(object, bias) || bias.type != w.type || bias.dims != 1 || bias.shape[0] != w.shape[0] ||
      !bias.contiguous())
    return false;
  data = bias.data;
  return true;
}

// A layer of an inverted residual, with m filters of `channels` x edge x edge; 0 is any.
bool layer_of(PyObject* object, int64_t m, int64_t channels, int64_t edge, Inverted::Layer& l,
              DType& type) {
  Tensor w;
  if (!PyTuple_CheckExact(object) || PyTuple_GET_SIZE(object) != 4 ||
      !prepared_of(PyTuple_GET_ITEM(object, 3), l.prepared) ||
      !read_filters(PyTuple_GET_ITEM(object, 0), l.prepared, w) || w.dims != 4 ||
      (m && w.shape[0] != m) || (channels && w.shape[1] != channels) ||
      (edge && (w.shape[2] != edge || w.shape[3] != edge)) ||
      !integer(PyTuple_GET_ITEM(object, 2), kActivations - 1, l.activation) ||
      !read_bias(PyTuple_GET_ITEM(object, 1), w, l.bias))
    return false;
  l.w = five(w), type = w.type;
  return true;
}

}  // namespace

namespace fastnn::tensors {

Tensor5 five(const Tensor& t) {
  Tensor5 f;
  f.data = t.data;
  for (int d = 0; d < 2 + kSpatial; d++) f.size[d] = f.stride[d] = 1;
  for (int d = 0; d < t.dims; d++) {
    const int to = d < 2 ? d : 2 + kSpatial - t.dims + d;
    f.size[to] = t.shape[d], f.stride[to] = t.strides[d];
  }
  return f;
}

bool read_geometry(PyObject* const* stride_to_groups, int rank, Conv& c) {
  if (rank < 1 || rank > kSpatial) return false;
  const int first = kSpatial - rank;
  if (!numbers(stride_to_groups[0], rank, 1, c.stride + first) ||
      !numbers(stride_to_groups[1], rank, 0, c.padding + first) ||
      !numbers(stride_to_groups[2], rank, 1, c.dilation + first) ||
      !PyLong_CheckExact(stride_to_groups[3]))
    return false;
  c.groups = PyLong_AsLongLong(stride_to_groups[3]);
  if (c.groups == -1 && PyErr_Occurred()) PyErr_Clear();
  return c.groups >= 1;
}

bool sizes_of(const Tensor& x, const Tensor& w, const Conv& c, int64_t* out) {
  const int rank = w.dims - 2;
  if (w.dims != x.dims || w.type != x.type || w.shape[0] % c.groups || x.shape[1] % c.groups ||
      x.shape[1] / c.groups != w.shape[1])
    return false;
  out[0] = x.shape[0], out[1] = w.shape[0];
  for (int d = 0; d < rank; d++) {
    const int s = kSpatial - rank + d;
    const int64_t reach =
        x.shape[2 + d] + 2 * c.padding[s] - c.dilation[s] * (w.shape[2 + d] - 1) - 1;
    if (reach < 0) return false;
    out[2 + d] = reach / c.stride[s] + 1;
  }
  return true;
}

bool layout_of(const Tensor& x, const Tensor& w, bool& last) {
  last = false;
  if (x.dims == 3) return w.contiguous();
  if (x.dims == 4) {
    last = ::like_channels_last(x) || ::like_channels_last(w);
    return true;
  }
  return x.contiguous() && w.contiguous() && x.strides[1] != 1 && w.strides[1] != 1;
}

void strides_as_made(const int64_t* shape, int dims, bool last, int64_t* strides) {
  if (last) return channels_last_strides(shape, dims, strides);
  for (int64_t d = dims - 1, step = 1; d >= 0; step *= shape[d--]) strides[d] = step;
}

bool as_made(const Tensor& t, const int64_t* shape, int dims, bool last) {
  int64_t strides[kMaxDims];
  strides_as_made(shape, dims, last, strides);
  for (int d = 0; d < dims; d++)
    if (t.shape[d] != shape[d] || (shape[d] > 1 && t.strides[d] != strides[d])) return false;
  return t.dims == dims;
}

bool read_layer(PyObject* const* arguments, Conv& c, Tensor& w) {
  if ((arguments[7] != Py_None && !prepared_of(arguments[7], c.prepared)) ||
      !read_filters(arguments[0], c.prepared, w) || !read_geometry(arguments + 2, w.dims - 2, c) ||
      !dense_filters(w) || !integer(arguments[6], kActivations - 1, c.activation) ||
      !read_bias(arguments[1], w, c.bias))
    return false;
  c.type = w.type, c.w = five(w);
  return true;
}

double operations_of(const int64_t* out, const Tensor& w) {
  double n = double(w.count()) / double(w.shape[0]);
  for (int d = 0; d < w.dims; d++) n *= double(out[d]);
  return n;
}

bool read_inverted(PyObject* const* arguments, Inverted& c) {
  DType depthwise = c.type;
  int stride;
  if (!layer_of(arguments[5], 0, 0, 1, c.project, c.type) ||
      !layer_of(arguments[3], c.project.w.size[1], 1, 3, c.depthwise, depthwise) ||
      depthwise != c.type || !integer(arguments[4], 2, stride) || stride == 0)
    return false;
  c.stride = stride;
  if (arguments[0] == Py_None) return true;
  DType expand = c.type;
  return layer_of(arguments[0], c.project.w.size[1], 0, 0, c.expand, expand) && expand == c.type &&
         numbers(arguments[1], 2, 1, c.expand_stride) &&
         numbers(arguments[2], 2, 0, c.expand_padding);
}

bool sizes_of(const Tensor& x, const Inverted& c, int64_t* out) {
  if (x.dims != 4 || x.type != c.type ||
      x.shape[1] != (c.expands() ? c.expand.w.size[1] : c.depthwise.w.size[0]))
    return false;
  out[0] = x.shape[0], out[1] = c.project.w.size[0];
  for (int d = 0; d < 2; d++) {
    int64_t size = x.shape[2 + d];
    if (c.expands()) {
      const int64_t reach = size + 2 * c.expand_padding[d] - c.expand.w.size[3 + d];
      if (reach < 0) return false;
      size = reach / c.expand_stride[d] + 1;
    }
    out[2 + d] = (size - 1) / c.stride + 1;
  }
  return true;
}

double operations_of(const Tensor& x, const Inverted& c) {
  return double(x.count()) * double(c.depthwise.w.size[0]);
}

}  // namespace fastnn::tensors

namespace {

// tensor_convolution(make, x, residual, overwrite, weight, ..., prepared): activation(conv(x,
// weight) + bias + residual), of x (N, C, *spatial), the last arguments as read_layer reads them.
// The residual has the result's shape and strides; `overwrite`: whether it may be made the result.
// `prepared`: None, or what keeps what is made of these very filters, so that the weight may be
// None from the second call on: not taken where they are needed.
PyObject* tensor_convolution(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor x, w, residual, out;
  Conv c;
  int64_t shape[kMaxDims];
  bool last;
  if (n != 4 + kLayerArguments || !readable() || !read(args[1], x) || x.dims < 3 ||
      !read_layer(args + 4, c, w) || !sizes_of(x, w, c, shape) || !layout_of(x, w, last))
    return not_taken();
  const bool added = args[2] != Py_None;
  if (added && (!read(args[2], residual) || residual.type != x.type || residual.dims != x.dims))
    return not_taken();
  const double operations = operations_of(shape, w);
  if (!precision_of(x.type, operations, c.precision) || !quiet()) return not_taken();
  const bool grad = wants_grad(args[1], w.data ? args[4] : args[1], c.bias ? args[5] : args[1],
                               added ? args[2] : args[1]);
  if (PyErr_Occurred() || (grad && (c.activation || added))) return not_taken();
  c.x = five(x);
  PyObject* result = nullptr;
  if (args[3] == Py_True && added && residual.data != x.data &&
      as_made(residual, shape, x.dims, last)) {
    c.y = five(residual), c.residual = residual.data;
    if (conv_takes_its_own_residual(c)) result = Py_NewRef(args[2]);
  }
  if (!result) {
    result = new_image(args[0], x, shape, x.dims, last, x.type, out);
    if (!result) return not_taken();
    for (int d = 0; added && d < x.dims; d++)
      if (residual.shape[d] != shape[d] || (shape[d] > 1 && residual.strides[d] != out.strides[d]))
        return not_taken(result);
    c.y = five(out);
  }
  if (added) c.residual = residual.data;
  bool gone = false;
  result = run(result, operations, [&] {
    try {
      conv_forward(c);
    } catch (const OperandGone&) {
      gone = true;
    }
  });
  if (gone) return not_taken(result);
  return grad ? in_tuple(result) : result;
}

// tensor_inverted_residual(make, x, residual, expand, ..., project): see read_inverted.
PyObject* tensor_inverted_residual(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor x, residual, out;
  Inverted c;
  int64_t shape[4];
  if (n != 3 + kInvertedArguments || !readable() || !read(args[1], x) ||
      !read_inverted(args + 3, c) || !sizes_of(x, c, shape))
    return not_taken();
  const bool added = args[2] != Py_None;
  if (added && (!read(args[2], residual) || residual.type != x.type || residual.dims != 4))
    return not_taken();
  const double operations = operations_of(x, c);
  if (!precision_of(x.type, operations, c.precision) || !quiet() || !grad_is_off())
    return not_taken();
  PyObject* result = new_image(args[0], x, shape, 4, true, x.type, out);
  if (!result) return not_taken();
  for (int d = 0; added && d < 4; d++)
    if (residual.shape[d] != shape[d] || (shape[d] > 1 && residual.strides[d] != out.strides[d]))
      return not_taken(result);
  c.x = five(x), c.y = five(out);
  if (added) c.residual = residual.data;
  bool taken = false;
  result = run(result, operations, [&] {
    try {
      taken = inverted_residual(c);
    } catch (const OperandGone&) {
    }
  });
  return result && !taken ? not_taken(result) : result;
}

// tensor_convolution_gradients(make, grad, x, w, stride, padding, dilation, groups, by_x, by_w,
// by_bias): those of x, w and the bias, None where not asked for.
PyObject* tensor_convolution_gradients(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor grad, x, w, out;
  Conv c;
  int64_t shape[kMaxDims];
  bool last = false;
  if (n != 11 || !readable() || !read(args[1], grad) || !read(args[2], x) || x.dims < 3 ||
      !read(args[3], w) || !read_geometry(args + 4, w.dims - 2, c) || !sizes_of(x, w, c, shape) ||
      grad.dims != x.dims || grad.type != x.type)
    return not_taken();
  for (int d = 0; d < x.dims; d++)
    if (grad.shape[d] != shape[d]) return not_taken();
  const bool by_x = args[8] == Py_True, by_w = args[9] == Py_True, by_bias = args[10] == Py_True;
  if ((by_x && !layout_of(grad, w, last)) || (by_w && (w.dims > 4 || !evenly_spaced(grad))))
    return not_taken();
  const double operations = operations_of(grad.shape, w);
  if (!precision_of(x.type, operations, c.precision) || !quiet() || !grad_is_off())
    return not_taken();
  c.type = x.type, c.x = five(x), c.w = five(w), c.y = five(grad);

  PyObject* gradients[3] = {Py_NewRef(Py_None), Py_NewRef(Py_None), Py_NewRef(Py_None)};
  auto give_up = [&] {
    for (PyObject* g : gradients) Py_XDECREF(g);
    return not_taken();
  };
  auto compute = [&](int which, PyObject* result, auto work) {
    Py_DECREF(gradients[which]);
    gradients[which] = result ? run(result, operations, work) : nullptr;
    return gradients[which] != nullptr;
  };
  if (by_x) {
    PyObject* result = new_image(args[0], x, x.shape, x.dims, last, x.type, out);
    if (result) {
      Conv one = c;
      one.x = five(out);
      if (!compute(0, result, [&] { conv_input(one); })) return give_up();
    } else {
      return give_up();
    }
  }
  if (by_w) {
    PyObject* result = new_image(args[0], w, w.shape, w.dims, ::like_channels_last(w), x.type, out);
    if (result) {
      Conv one = c;
      one.w = five(out);
      if (!compute(1, result, [&] { conv_weight(one); })) return give_up();
    } else {
      return give_up();
    }
  }
  if (by_bias) {
    PyObject* result = new_result(grad, &grad.shape[1], 1, out);
    if (!result || !compute(2, result, [&] { channel_sum(c.y, c.type, out.data); }))
      return give_up();
  }
  PyObject* tuple = PyTuple_New(3);
  if (!tuple) return give_up();
  for (int i = 0; i < 3; i++) PyTuple_SET_ITEM(tuple, i, gradients[i]);
  return tuple;
}

PyMethodDef conv_functions[] = {
    method("tensor_convolution", tensor_convolution,
           "activation(conv(x, w) + bias + residual); None where not taken, a tuple of it where a "
           "gradient is wanted."),
    method("tensor_inverted_residual", tensor_inverted_residual,
           "A convolution, a depthwise and a pointwise one in one pass; None where not taken."),
    method("tensor_convolution_gradients", tensor_convolution_gradients,
           "The gradients of a convolution; None where not taken."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_conv_tensors(py::module_& m) {
  py::class_<Prepared>(
      m, "Prepared",
      "What the algorithms of a convolution make of its filters, kept between calls "
      "by one who knows that these do not change.")
      .def(py::init<>())
      .def_property_readonly("nbytes", &Prepared::bytes);
  if (PyModule_AddFunctions(m.ptr(), conv_functions) != 0) throw py::error_already_set();
}
