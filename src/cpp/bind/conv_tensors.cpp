// The short way of convolutions: see tensors.cpp.
#include <algorithm>
#include <utility>

#include "bind/image_tensors.hpp"
#include "common/activation.hpp"
#include "conv/conv.hpp"
#include "conv/inverted.hpp"
#include "gemm/prepared.hpp"

namespace py = pybind11;
using namespace fastnn;
using namespace fastnn::tensors;

namespace {

bool like_channels_last(const Tensor& t) {
  return t.dims == 4 && tensors::like_channels_last(t.shape, t.strides, t.dims);
}

// Whether the result of these is channels-last. False where that is for the long way to find out.
bool layout_of(const Tensor& x, const Tensor& w, bool& last) {
  last = false;
  if (x.dims == 3) return w.contiguous();
  if (x.dims == 4) {
    last = like_channels_last(x) || like_channels_last(w);
    return true;
  }
  return x.contiguous() && w.contiguous() && x.strides[1] != 1 && w.strides[1] != 1;
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

// What the three products have in common: a batch, filters and options that go together. `out` are
// the sizes of a result. False where the long way is to say what is wrong, or to compute.
bool understood(const Tensor& x, const Tensor& w, PyObject* stride, PyObject* padding,
                PyObject* dilation, PyObject* groups, Conv& c, int64_t* out) {
  const int rank = x.dims - 2;
  if (rank < 1 || rank > kSpatial || w.dims != x.dims || w.type != x.type ||
      !PyLong_CheckExact(groups) || !numbers(stride, rank, 1, c.stride + kSpatial - rank) ||
      !numbers(padding, rank, 0, c.padding + kSpatial - rank) ||
      !numbers(dilation, rank, 1, c.dilation + kSpatial - rank))
    return false;
  c.groups = PyLong_AsLongLong(groups);
  if (c.groups == -1 && PyErr_Occurred()) PyErr_Clear();
  if (c.groups < 1 || w.shape[0] % c.groups || x.shape[1] % c.groups ||
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
  c.type = x.type;
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

double operations_of(const Tensor& y, const Tensor& w) {
  return double(y.count()) * double(w.count()) / double(w.shape[0]);
}

// Whether it has the strides that a result of this shape would be given.
bool as_made(const Tensor& t, const int64_t* shape, int dims, bool last) {
  int64_t strides[kMaxDims];
  if (last)
    channels_last_strides(shape, dims, strides);
  else
    for (int64_t d = dims - 1, step = 1; d >= 0; step *= shape[d--]) strides[d] = step;
  for (int d = 0; d < dims; d++)
    if (t.shape[d] != shape[d] || (shape[d] > 1 && t.strides[d] != strides[d])) return false;
  return true;
}

// tensor_convolution(make, x, w, bias, residual, stride, padding, dilation, groups, activation,
// prepared, overwrite): activation(conv(x, w) + bias + residual), of x (N, C, *spatial). The
// residual has the result's shape and strides. `prepared`: None, or what keeps what is made of
// these very filters, so that w may be None from the second call on: not taken where they are
// needed. `overwrite`: whether the residual may be made the result.
PyObject* tensor_convolution(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor x, w, bias, residual, out;
  Conv c;
  int64_t shape[kMaxDims];
  bool last;
  int activation;
  if (n != 12 || !readable() || !read(args[1], x) || x.dims < 3 ||
      (args[10] != Py_None && !prepared_of(args[10], c.prepared)) ||
      !read_filters(args[2], c.prepared, w) ||
      !understood(x, w, args[5], args[6], args[7], args[8], c, shape) || !dense_filters(w) ||
      !layout_of(x, w, last) || !integer(args[9], kActivations - 1, activation))
    return not_taken();
  const bool has_bias = args[3] != Py_None, added = args[4] != Py_None;
  if (has_bias && (!read(args[3], bias) || bias.type != x.type || bias.dims != 1 ||
                   bias.shape[0] != w.shape[0] || !bias.contiguous()))
    return not_taken();
  if (added && (!read(args[4], residual) || residual.type != x.type || residual.dims != x.dims))
    return not_taken();
  double operations = double(w.count()) / double(w.shape[0]);
  for (int d = 0; d < x.dims; d++) operations *= double(shape[d]);
  if (!precision_of(x.type, operations, c.precision) || !quiet()) return not_taken();
  const bool grad = wants_grad(args[1], w.data ? args[2] : args[1], has_bias ? args[3] : args[1],
                               added ? args[4] : args[1]);
  if (PyErr_Occurred() || (grad && (activation || added))) return not_taken();
  c.x = five(x), c.w = five(w);
  PyObject* result = nullptr;
  if (args[11] == Py_True && added && residual.data != x.data &&
      as_made(residual, shape, x.dims, last)) {
    c.y = five(residual), c.residual = residual.data;
    if (conv_takes_its_own_residual(c)) result = Py_NewRef(args[4]);
  }
  if (!result) {
    result = new_image(args[0], x, shape, x.dims, last, x.type, out);
    if (!result) return not_taken();
    for (int d = 0; added && d < x.dims; d++)
      if (residual.shape[d] != shape[d] || (shape[d] > 1 && residual.strides[d] != out.strides[d]))
        return not_taken(result);
    c.y = five(out);
  }
  if (has_bias) c.bias = bias.data;
  if (added) c.residual = residual.data;
  c.activation = activation;
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

// (weight, bias or None, activation, prepared) with m filters of `channels` x edge x edge; 0 is
// any. The weight is None as above.
bool layer_of(PyObject* object, DType type, int64_t m, int64_t channels, int64_t edge,
              Inverted::Layer& l) {
  Tensor w, bias;
  if (!PyTuple_CheckExact(object) || PyTuple_GET_SIZE(object) != 4 ||
      !prepared_of(PyTuple_GET_ITEM(object, 3), l.prepared) ||
      !read_filters(PyTuple_GET_ITEM(object, 0), l.prepared, w) || w.type != type || w.dims != 4 ||
      (m && w.shape[0] != m) || w.shape[1] != channels ||
      (edge && (w.shape[2] != edge || w.shape[3] != edge)) ||
      !integer(PyTuple_GET_ITEM(object, 2), kActivations - 1, l.activation))
    return false;
  PyObject* added = PyTuple_GET_ITEM(object, 1);
  if (added != Py_None) {
    if (!read(added, bias) || bias.type != type || bias.dims != 1 || bias.shape[0] != w.shape[0] ||
        !bias.contiguous())
      return false;
    l.bias = bias.data;
  }
  l.w = five(w);
  return true;
}

// tensor_inverted_residual(make, x, residual, expand, expand_stride, expand_padding, depthwise,
// stride, project): see inverted.hpp. Layers as layer_of reads them, the first None where there is
// none; the depthwise one has padding 1.
PyObject* tensor_inverted_residual(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor x, residual, out;
  Inverted c;
  int stride;
  if (n != 9 || !readable() || !read(args[1], x) || x.dims != 4 || !integer(args[7], 2, stride) ||
      stride == 0)
    return not_taken();
  const bool added = args[2] != Py_None, expands = args[3] != Py_None;
  int64_t hidden = x.shape[1], size[] = {x.shape[2], x.shape[3]};
  if (expands) {
    int64_t step[2], padding[2];
    if (!layer_of(args[3], x.type, 0, hidden, 0, c.expand) || !numbers(args[4], 2, 1, step) ||
        !numbers(args[5], 2, 0, padding))
      return not_taken();
    hidden = c.expand.w.size[0];
    for (int d = 0; d < 2; d++) {
      c.expand_stride[d] = step[d], c.expand_padding[d] = padding[d];
      const int64_t reach = size[d] + 2 * padding[d] - c.expand.w.size[3 + d];
      if (reach < 0) return not_taken();
      size[d] = reach / step[d] + 1;
    }
  }
  if (!layer_of(args[6], x.type, hidden, 1, 3, c.depthwise) ||
      !layer_of(args[8], x.type, 0, hidden, 1, c.project) ||
      (added && (!read(args[2], residual) || residual.type != x.type || residual.dims != 4)))
    return not_taken();
  const int64_t shape[] = {x.shape[0], c.project.w.size[0], (size[0] - 1) / stride + 1,
                           (size[1] - 1) / stride + 1};
  const double operations = double(x.count()) * double(hidden);
  if (!precision_of(x.type, operations, c.precision) || !quiet() || !grad_is_off())
    return not_taken();
  PyObject* result = new_image(args[0], x, shape, 4, true, x.type, out);
  if (!result) return not_taken();
  for (int d = 0; added && d < 4; d++)
    if (residual.shape[d] != shape[d] || (shape[d] > 1 && residual.strides[d] != out.strides[d]))
      return not_taken(result);
  c.x = five(x), c.y = five(out), c.type = x.type, c.stride = stride;
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
      !read(args[3], w) || !understood(x, w, args[4], args[5], args[6], args[7], c, shape) ||
      grad.dims != x.dims || grad.type != x.type)
    return not_taken();
  for (int d = 0; d < x.dims; d++)
    if (grad.shape[d] != shape[d]) return not_taken();
  const bool by_x = args[8] == Py_True, by_w = args[9] == Py_True, by_bias = args[10] == Py_True;
  if ((by_x && !layout_of(grad, w, last)) || (by_w && (w.dims > 4 || !evenly_spaced(grad))))
    return not_taken();
  const double operations = operations_of(grad, w);
  if (!precision_of(x.type, operations, c.precision) || !quiet() || !grad_is_off())
    return not_taken();
  c.x = five(x), c.w = five(w), c.y = five(grad);

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
    PyObject* result = new_image(args[0], w, w.shape, w.dims, like_channels_last(w), x.type, out);
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
