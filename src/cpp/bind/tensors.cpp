// The short way of small calls: torch's tensors are read in C, through the table of functions that
// DLPack defines for it (DLPackExchangeAPI, dmlc/dlpack 1.3), which torch has since 2.10, and the
// questions that every op asks first are asked here. From Python each costs 30 to 150 ns, and
// together they take longer than a small product does.
//
// Each function gives None for whatever it does not take; the caller then goes the long way, where
// everything is asked again, in order. Where a gradient is wanted, the result comes in a tuple, and
// is not yet part of the graph: an autograd.Function makes it so.
#include "bind/tensors.hpp"

#include "common/cpu_features.hpp"
#include "elementwise/elementwise.hpp"
#include "gemm/gemm.hpp"

namespace py = pybind11;
using namespace fastnn;
using namespace fastnn::tensors;

namespace {

// The structures of DLPack 1.x that are needed here (include/dlpack/dlpack.h).
struct DLDevice {
  int32_t type;
  int32_t id;
};
struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct ExchangeHeader {
  uint32_t major, minor;
  ExchangeHeader* previous;
};
struct ExchangeTable {
  ExchangeHeader header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* object, DLTensor* out);
  void* current_work_stream;
};
constexpr int32_t kCpu = 1;
constexpr uint8_t kInt = 0, kUnsigned = 1, kFloat = 2, kBfloat = 4, kBool = 6;

static_assert(kMaxDims == kMaxBatchDims + 2);

// What is called in torch and in Python's part of this package, all set once by use_torch. Without
// a table, read_tensor is null, and nothing is taken.
int (*read_tensor)(void*, DLTensor*) = nullptr;
PyTypeObject* tensor_type = nullptr;
PyTypeObject* parameter_type = nullptr;
PyObject* plain_settings = nullptr;
PyObject* forward_ad = nullptr;  // the module, of which _current_level is read
// Functions without arguments.
PyObject *get_settings = nullptr, *dispatch_modes = nullptr, *functorch_active = nullptr,
         *tracing_state = nullptr, *autocast_enabled = nullptr, *grad_enabled = nullptr,
         *get_precision = nullptr;
// Functions of a tensor, or of a tuple of them.
PyObject *is_neg = nullptr, *is_inference = nullptr, *increment_version = nullptr;
PyObject *name_new_empty = nullptr, *name_new_empty_strided = nullptr,
         *name_requires_grad = nullptr, *name_current_level = nullptr, *name_dtype = nullptr;
PyObject* large_empty = nullptr;  // of this package: (shape, dtype) to a tensor
PyObject *float64 = nullptr, *uint8 = nullptr, *int32 = nullptr;  // torch's dtypes
PyObject* names_dtype = nullptr;                                  // ("dtype",)

// After a call that failed: the long way finds out why. What is no Exception (a KeyboardInterrupt
// in a mode written in Python) stays, and not_taken raises it.
void forget_error() {
  if (PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_Exception)) PyErr_Clear();
}

// What a function gives is known by identity. False as well where it fails, or has failed before.
bool gives(PyObject* function, PyObject* expected) {
  PyObject* result = PyErr_Occurred() ? nullptr : PyObject_CallNoArgs(function);
  if (!result) {
    forget_error();
    return false;
  }
  Py_DECREF(result);
  return result == expected;
}
bool gives_of(PyObject* function, PyObject* argument, PyObject* expected) {
  PyObject* result = PyErr_Occurred() ? nullptr : PyObject_CallOneArg(function, argument);
  if (!result) {
    forget_error();
    return false;
  }
  Py_DECREF(result);
  return result == expected;
}

}  // namespace

namespace fastnn::tensors {

bool readable() { return read_tensor != nullptr; }

bool grad_is_off() { return gives(grad_enabled, Py_False); }

bool is_ordinary(PyObject* tensor) { return gives_of(is_inference, tensor, Py_False); }

bool integer(PyObject* object, int last, int& value) {
  const long v = PyLong_AsLong(object);
  if (v == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  value = int(v);
  return v >= 0 && v <= last;
}

bool flag(PyObject* object, bool& value) {
  value = object == Py_True;
  return PyBool_Check(object);
}

bool quiet() {
  if (!gives(get_settings, plain_settings) || !gives(functorch_active, Py_False) ||
      !gives(tracing_state, Py_None) || !gives(autocast_enabled, Py_False))
    return false;
  PyObject* modes = PyObject_CallNoArgs(dispatch_modes);
  PyObject* level = PyObject_GetAttr(forward_ad, name_current_level);
  const bool none = modes && level && PyLong_AsLong(modes) == 0 && PyLong_AsLong(level) < 0;
  Py_XDECREF(modes);
  Py_XDECREF(level);
  forget_error();
  return none;
}

bool requires_grad(PyObject* tensor) {
  PyObject* required = PyObject_GetAttr(tensor, name_requires_grad);
  if (!required) {
    forget_error();
    return true;
  }
  Py_DECREF(required);
  return required != Py_False;
}

PyObject* dtype_object(DType type) {
  return type == DType::u8 ? uint8 : type == DType::s32 ? int32 : float64;
}

// Booleans as u8, where they are wanted.
static bool read_any(PyObject* object, Tensor& t, bool flags) {
  DLTensor dl;
  if (read_tensor(object, &dl) != 0) {
    forget_error();
    return false;
  }
  if (dl.device.type != kCpu || dl.dtype.lanes != 1 || !dl.data || dl.ndim < 1 ||
      dl.ndim > kMaxDims || !dl.strides)
    return false;
  if (flags) {
    if (dl.dtype.code != kBool || dl.dtype.bits != 8) return false;
    t.type = DType::u8;
  } else if (dl.dtype.code == kFloat && dl.dtype.bits == 32) {
    t.type = DType::f32;
  } else if (dl.dtype.code == kFloat && dl.dtype.bits == 64) {
    t.type = DType::f64;
  } else if (dl.dtype.code == kBfloat && dl.dtype.bits == 16) {
    t.type = DType::bf16;
  } else if (dl.dtype.code == kFloat && dl.dtype.bits == 16) {
    t.type = DType::f16;
  } else if (dl.dtype.code == kUnsigned && dl.dtype.bits == 8) {
    t.type = DType::u8;
  } else if (dl.dtype.code == kInt && dl.dtype.bits == 8) {
    t.type = DType::s8;
  } else if (dl.dtype.code == kInt && dl.dtype.bits == 32) {
    t.type = DType::s32;
  } else {
    return false;
  }
  for (int d = 0; d < dl.ndim; d++)
    if (dl.shape[d] <= 0) return false;
  t.object = object;
  t.data = static_cast<char*>(dl.data) + dl.byte_offset;
  t.dims = dl.ndim, t.shape = dl.shape, t.strides = dl.strides;
  return true;
}

bool read_new(PyObject* object, Tensor& t) { return read_any(object, t, false); }

static bool is_plain(PyObject* object) {
  return Py_TYPE(object) == tensor_type || Py_TYPE(object) == parameter_type;
}

bool read(PyObject* object, Tensor& t, bool fresh) {
  return is_plain(object) && read_new(object, t) && t.type <= DType::f16 &&
         // DLPack does not speak of tensors that are negated when read.
         (fresh || gives_of(is_neg, object, Py_False));
}

bool read_flags(PyObject* object, Tensor& t) {
  return is_plain(object) && read_any(object, t, true);
}

bool read_codes(PyObject* object, Tensor& t) {
  return is_plain(object) && read_new(object, t) && t.type > DType::s8;
}

bool read_bytes(PyObject* object, Tensor& t) {
  return is_plain(object) && read_new(object, t) && (t.type == DType::s8 || t.type == DType::u8);
}

bool read_number(PyObject* object, double& value) {
  DLTensor dl;
  if (!is_plain(object)) return false;
  if (read_tensor(object, &dl) != 0) {
    forget_error();
    return false;
  }
  if (dl.device.type != kCpu || dl.ndim != 0 || !dl.data || dl.dtype.lanes != 1 ||
      dl.dtype.code != kFloat || (dl.dtype.bits != 32 && dl.dtype.bits != 64) ||
      !gives_of(is_neg, object, Py_False))
    return false;
  const char* at = static_cast<const char*>(dl.data) + dl.byte_offset;
  value = dl.dtype.bits == 64 ? *reinterpret_cast<const double*>(at)
                              : double(*reinterpret_cast<const float*>(at));
  return true;
}

bool read_integers(PyObject* object, Tensor& t, bool& wide) {
  DLTensor dl;
  if (!is_plain(object)) return false;
  if (read_tensor(object, &dl) != 0) {
    forget_error();
    return false;
  }
  if (dl.device.type != kCpu || dl.dtype.lanes != 1 || !dl.data || dl.ndim > kMaxDims ||
      (dl.ndim > 0 && !dl.strides) || dl.dtype.code != kInt ||
      (dl.dtype.bits != 32 && dl.dtype.bits != 64) || !gives_of(is_neg, object, Py_False))
    return false;
  for (int d = 0; d < dl.ndim; d++)
    if (dl.shape[d] <= 0) return false;
  wide = dl.dtype.bits == 64;
  t.object = object;
  t.data = static_cast<char*>(dl.data) + dl.byte_offset;
  t.dims = dl.ndim, t.shape = dl.shape, t.strides = dl.strides;
  return true;
}

bool apart(const Tensor& out) {
  int order[kMaxDims];
  for (int d = 0; d < out.dims; d++) {
    int i = d;
    for (; i > 0 && out.strides[order[i - 1]] > out.strides[d]; i--) order[i] = order[i - 1];
    order[i] = d;
  }
  int64_t reach = 1;
  for (int i = 0; i < out.dims; i++) {
    const int64_t stride = out.strides[order[i]], size = out.shape[order[i]];
    if (size == 1) continue;
    if (stride < reach) return false;
    reach += stride * (size - 1);
  }
  return true;
}
static PyObject* new_large(const Tensor& like, const int64_t* shape, int dims, DType type,
                           Tensor& out) {
  const Held sizes{to_tuple(shape, dims)};
  const Held dtype{type == like.type ? PyObject_GetAttr(like.object, name_dtype)
                                     : Py_NewRef(dtype_object(type))};
  PyObject* result = sizes.object && dtype.object
                         ? PyObject_CallFunctionObjArgs(large_empty, sizes.object, dtype.object,
                                                        static_cast<PyObject*>(nullptr))
                         : nullptr;
  if (result && !read_new(result, out)) Py_CLEAR(result);
  return result;
}
PyObject* new_result(const Tensor& like, const int64_t* shape, int dims, DType type, Tensor& out) {
  int64_t count = 1;
  for (int d = 0; d < dims; d++)
    if (__builtin_mul_overflow(count, shape[d], &count)) return nullptr;
  if (count > kLargeBytes / int64_t(dtype_size(type)))
    return new_large(like, shape, dims, type, out);
  PyObject* arguments[kMaxDims + 2] = {like.object};
  int made = 0;
  for (; made < dims; made++)
    if (!(arguments[made + 1] = PyLong_FromLongLong(shape[made]))) break;
  PyObject* names = type == like.type ? nullptr : names_dtype;
  if (names) arguments[dims + 1] = dtype_object(type);
  PyObject* result =
      made < dims ? nullptr
                  : PyObject_VectorcallMethod(name_new_empty, arguments, size_t(dims) + 1, names);
  for (int d = 0; d < made; d++) Py_DECREF(arguments[d + 1]);
  if (result && !read_new(result, out)) Py_CLEAR(result);
  return result;
}

PyObject* new_number(const Tensor& like, char*& data) {
  PyObject* none = PyTuple_New(0);
  PyObject* arguments[] = {like.object, none};
  PyObject* result =
      none ? PyObject_VectorcallMethod(name_new_empty, arguments, 2, nullptr) : nullptr;
  Py_XDECREF(none);
  DLTensor dl;
  if (result && (read_tensor(result, &dl) != 0 || dl.ndim != 0 || !dl.data)) Py_CLEAR(result);
  if (result) data = static_cast<char*>(dl.data) + dl.byte_offset;
  return result;
}

PyObject* new_vector(const Tensor& like, int64_t n, bool wide, Tensor& out) {
  return new_result(like, &n, 1, wide ? DType::f64 : like.type, out);
}

PyObject* made_by(PyObject* make, const Tensor& x, Tensor& out) {
  PyObject* result = PyObject_CallOneArg(make, x.object);
  if (result && !read(result, out, true)) Py_CLEAR(result);
  return result;
}

PyObject* new_channels(PyObject* make, const Tensor& x, Tensor& out) {
  // With the channels innermost: a dimension of size 1 may have any stride.
  bool last = x.dims == 4 || x.dims == 5;
  int64_t strides[kMaxDims], expected = 1;
  auto pass = [&](int d) {
    strides[d] = expected;
    last = last && (x.shape[d] == 1 || x.strides[d] == expected);
    expected *= x.shape[d];
  };
  pass(1);
  for (int d = x.dims - 1; d > 1; d--) pass(d);
  pass(0);
  if (expected * int64_t(dtype_size(x.type)) > kLargeBytes || x.contiguous() == last)
    return made_by(make, x, out);
  if (!last) return new_result(x, x.shape, x.dims, out);
  return new_strided(x, x.shape, strides, x.dims, x.type, out);
}

PyObject* new_strided(const Tensor& like, const int64_t* shape, const int64_t* strides, int dims,
                      DType type, Tensor& out) {
  PyObject* arguments[4] = {like.object, to_tuple(shape, dims), to_tuple(strides, dims),
                            dtype_object(type)};
  PyObject* names = type == like.type ? nullptr : names_dtype;
  PyObject* result = arguments[1] && arguments[2]
                         ? PyObject_VectorcallMethod(name_new_empty_strided, arguments, 3, names)
                         : nullptr;
  Py_XDECREF(arguments[1]);
  Py_XDECREF(arguments[2]);
  if (result && !read_new(result, out)) Py_CLEAR(result);
  return result;
}

bool fold_rows(const Tensor& t, int64_t& rows, int64_t& stride) {
  rows = 1, stride = 0;
  for (int d = t.dims - 2; d >= 0; d--) {
    if (t.shape[d] == 1) continue;
    if (rows == 1)
      stride = t.strides[d];
    else if (t.strides[d] != stride * rows)
      return false;
    rows *= t.shape[d];
  }
  if (rows == 1) stride = t.shape[t.dims - 1];
  return true;
}

PyObject* to_tuple(const int64_t* numbers, int count) {
  PyObject* tuple = PyTuple_New(count);
  for (int i = 0; tuple && i < count; i++) {
    PyObject* number = PyLong_FromLongLong(numbers[i]);
    if (number)
      PyTuple_SET_ITEM(tuple, i, number);
    else
      Py_CLEAR(tuple);
  }
  return tuple;
}

bool count_change(std::initializer_list<PyObject*> changed) {
  PyObject* tuple = PyTuple_New(Py_ssize_t(changed.size()));
  Py_ssize_t i = 0;
  for (PyObject* tensor : changed)
    if (tuple) PyTuple_SET_ITEM(tuple, i++, Py_NewRef(tensor));
  PyObject* done = tuple ? PyObject_CallOneArg(increment_version, tuple) : nullptr;
  Py_XDECREF(tuple);
  Py_XDECREF(done);
  return done != nullptr;
}

// `highest` serves every precision, and for little work asking costs more than it can save.
bool precision_of(DType type, double operations, Precision& precision) {
  precision = Precision::highest;
  if (type != DType::f32 || operations < kFewOperations) return true;
  PyObject* name = PyObject_CallNoArgs(get_precision);
  const char* text = name ? PyUnicode_AsUTF8(name) : nullptr;
  bool known = true;
  if (!text)
    known = false;
  else if (__builtin_strcmp(text, "high") == 0)
    precision = Precision::high;
  else if (__builtin_strcmp(text, "medium") == 0)
    precision = Precision::medium;
  else
    known = __builtin_strcmp(text, "highest") == 0;
  Py_XDECREF(name);
  forget_error();
  return known;
}

PyObject* not_taken(PyObject* result) {
  Py_XDECREF(result);
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

PyObject* in_tuple(PyObject* result) {
  if (!result) return nullptr;
  PyObject* tuple = PyTuple_Pack(1, result);
  Py_DECREF(result);
  return tuple;
}

PyMethodDef method(const char* name, FastCall function, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
          METH_FASTCALL, doc};
}
}  // namespace fastnn::tensors

namespace {

const char* end_of(const Tensor& t) {
  int64_t last = 0;
  for (int d = 0; d < t.dims; d++) last += t.strides[d] * (t.shape[d] - 1);
  return t.data + (last + 1) * int64_t(dtype_size(t.type));
}
bool overlap(const Tensor& x, const Tensor& y) { return x.data < end_of(y) && y.data < end_of(x); }

bool of_shape(const Tensor& t, const int64_t* shape, int dims) {
  if (t.dims != dims) return false;
  for (int d = 0; d < dims; d++)
    if (t.shape[d] != shape[d]) return false;
  return true;
}

// The result of a product or a function: fresh, or the caller's `out`. Null where it is not taken.
PyObject* result_in(PyObject* out_object, const Tensor& like, const int64_t* shape, int dims,
                    Tensor& out) {
  if (out_object == Py_None) return new_result(like, shape, dims, out);
  if (!read(out_object, out) || out.type != like.type || !apart(out) || !is_ordinary(out_object))
    return nullptr;
  if (!of_shape(out, shape, dims)) return nullptr;
  Py_INCREF(out_object);
  return out_object;
}
PyObject* written(PyObject* out_object, PyObject* result) {
  if (out_object == Py_None || !result || count_change({out_object})) return result;
  Py_DECREF(result);
  return nullptr;
}

// The product's B, packed; false where this call has to go another way: for little work it is read
// where it lies, and the setting may be another than at the time of packing.
bool take_packed(PyObject* packed, PyObject* fewest, const Tensor& a, Gemm& g) {
  // What is something else must raise no C++ exception here, where nothing catches it.
  if (!py::isinstance<PackedOperand>(packed)) return false;
  const auto* operand = py::handle(packed).cast<const PackedOperand*>();
  const int64_t least = PyLong_AsLongLong(fewest);
  forget_error();
  if (least < 0 || a.count() < least || operand->k != g.k || operand->n != g.n ||
      operand->dtype != a.type || operand->precision != g.precision || operand->isa != active_isa())
    return false;
  g.packed = operand;
  return true;
}

enum Kind { kMatmul = 0, kLinear = 1, kMm = 2, kBmm = 3 };

// tensor_product(kind, a, b, bias, activation, out, [residual, packed, fewest]):
// activation(a @ b + bias + residual), with b transposed in a linear layer. a (..., M, K); b a
// matrix, or, except there, of a's batch. `packed`, a PackedOperand or None, is read instead of a
// matrix b where a has `fewest` elements or more.
PyObject* tensor_product(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor a, b, bias, residual, out;
  int kind, activation;
  if ((n != 6 && n != 9) || !readable() || !integer(args[0], kBmm, kind) || !read(args[1], a) ||
      !read(args[2], b) || a.type != b.type || a.dims < 2 || b.dims < 2 ||
      !integer(args[4], kActivations - 1, activation))
    return not_taken();
  if ((kind == kLinear && b.dims != 2) || (kind == kMm && (a.dims != 2 || b.dims != 2)) ||
      (kind == kBmm && (a.dims != 3 || b.dims != 3)))
    return not_taken();
  const bool transposed = kind == kLinear;
  Gemm g;
  g.k = a.size(-1);
  g.n = b.size(transposed ? -2 : -1);
  if (b.size(transposed ? -1 : -2) != g.k) return not_taken();
  const bool has_bias = args[3] != Py_None;
  if (has_bias) {
    if (!read(args[3], bias) || bias.type != a.type || bias.dims != 1 || bias.shape[0] != g.n)
      return not_taken();
    g.bias = bias.data, g.bias_stride = bias.strides[0];
    g.bias_axis = BiasAxis::column, g.bias_type = bias.type;
  }
  int64_t shape[kMaxDims];
  for (int d = 0; d < a.dims - 1; d++) shape[d] = a.shape[d];
  shape[a.dims - 1] = g.n;
  double operations = double(g.n) * g.k;
  for (int d = 0; d < a.dims - 1; d++) operations *= double(a.shape[d]);
  g.a.cs = a.stride(-1);
  if (b.dims == 2) {
    if (!fold_rows(a, g.m, g.a.rs)) return not_taken();
  } else {
    if (a.dims != b.dims) return not_taken();
    g.m = a.size(-2), g.a.rs = a.stride(-2);
    g.batch_dims = a.dims - 2;
    for (int d = 0; d < g.batch_dims; d++) {
      if (a.shape[d] != b.shape[d]) return not_taken();
      g.batch[d] = a.shape[d];
      g.a.batch[d] = a.strides[d], g.b.batch[d] = b.strides[d];
    }
  }
  const bool has_residual = n == 9 && args[6] != Py_None;
  if (has_residual) {
    if (!read(args[6], residual) || residual.type != a.type || b.dims != 2 ||
        !of_shape(residual, shape, a.dims))
      return not_taken();
    int64_t rows;
    if (!fold_rows(residual, rows, g.residual.rs)) return not_taken();
    g.residual.data = residual.data, g.residual.type = residual.type;
    g.residual.cs = residual.stride(-1), g.beta = 1;
  }
  const bool packed = n == 9 && args[7] != Py_None;  // at one precision, which must be today's
  if (!precision_of(a.type, packed ? kFewOperations : operations, g.precision) || !quiet())
    return not_taken();
  const bool grad =
      wants_grad(args[1], args[2], has_bias ? args[3] : args[1], has_residual ? args[6] : args[1],
                 args[5] != Py_None ? args[5] : args[1]);
  if (PyErr_Occurred()) return not_taken();
  if (grad && (packed || has_residual)) return not_taken();
  if (packed && (b.dims != 2 || !take_packed(args[7], args[8], a, g))) return not_taken();
  // Where the gradient needs the product before its activation, the two are computed apart.
  if (grad && (args[5] != Py_None || !saves_output(activation))) return not_taken();
  PyObject* result = result_in(args[5], a, shape, a.dims, out);
  if (!result) return not_taken();
  if (args[5] != Py_None &&
      (overlap(out, a) || overlap(out, b) || (has_bias && overlap(out, bias)) ||
       (has_residual && overlap(out, residual))))
    return not_taken(result);
  g.c.cs = out.stride(-1);
  if (b.dims == 2) {
    int64_t rows;
    if (!fold_rows(out, rows, g.c.rs)) return not_taken(result);
  } else {
    g.c.rs = out.stride(-2);
    for (int d = 0; d < g.batch_dims; d++) g.c.batch[d] = out.strides[d];
  }
  g.a.data = a.data, g.a.type = a.type;
  g.b.data = b.data, g.b.type = b.type;
  g.b.rs = b.stride(transposed ? -1 : -2), g.b.cs = b.stride(transposed ? -2 : -1);
  g.c.data = out.data, g.c.type = out.type;
  g.activation = activation;
  result = written(args[5], run(result, operations, [&] { gemm(g); }));
  return grad ? in_tuple(result) : result;
}

// tensor_linear_gradients(grad, input, weight, by_input, by_weight, by_bias): of a linear layer,
// those that are asked for: grad @ weight, grad.T @ input and the sum of grad over its rows.
PyObject* tensor_linear_gradients(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor grad, input, weight, out;
  if (n != 6 || !readable() || !read(args[0], grad)) return not_taken();
  const bool by_input = args[3] == Py_True, by_weight = args[4] == Py_True,
             by_bias = args[5] == Py_True;
  int64_t rows, grad_rs, input_rows, input_rs;
  if (!fold_rows(grad, rows, grad_rs)) return not_taken();
  const int64_t columns = grad.size(-1);
  if (by_input && (!read(args[2], weight) || weight.type != grad.type || weight.dims != 2 ||
                   weight.shape[0] != columns))
    return not_taken();
  if (by_weight && (!read(args[1], input) || input.type != grad.type ||
                    !fold_rows(input, input_rows, input_rs) || input_rows != rows))
    return not_taken();
  Precision precision;
  const double operations = double(rows) * double(columns) *
                            double(by_weight  ? input.size(-1)
                                   : by_input ? weight.shape[1]
                                              : 1);
  if (!precision_of(grad.type, operations, precision) || !quiet() || !grad_is_off())
    return not_taken();

  PyObject* gradients[3] = {Py_NewRef(Py_None), Py_NewRef(Py_None), Py_NewRef(Py_None)};
  auto give_up = [&] {
    for (PyObject* g : gradients) Py_XDECREF(g);
    return not_taken();
  };
  auto product = [&](int which, const int64_t* shape, int dims, Gemm& g, int64_t k) {
    PyObject* result = new_result(grad, shape, dims, out);
    if (!result) return false;
    g.k = k;
    g.n = shape[dims - 1];
    g.c.data = out.data, g.a.type = g.b.type = g.c.type = grad.type, g.c.rs = g.n, g.c.cs = 1;
    g.precision = precision;
    Py_DECREF(gradients[which]);
    gradients[which] = run(result, double(g.m) * g.n * g.k, [&] { gemm(g); });
    return gradients[which] != nullptr;
  };
  if (by_input) {
    Gemm g;
    int64_t shape[kMaxDims];
    for (int d = 0; d < grad.dims - 1; d++) shape[d] = grad.shape[d];
    shape[grad.dims - 1] = weight.shape[1];
    g.m = rows;
    g.a.data = grad.data, g.a.rs = grad_rs, g.a.cs = grad.stride(-1);
    g.b.data = weight.data, g.b.rs = weight.strides[0], g.b.cs = weight.strides[1];
    if (!product(0, shape, grad.dims, g, columns)) return give_up();
  }
  if (by_weight) {
    Gemm g;
    const int64_t shape[2] = {columns, input.size(-1)};
    g.m = columns;
    g.a.data = grad.data, g.a.rs = grad.stride(-1), g.a.cs = grad_rs;
    g.b.data = input.data, g.b.rs = input_rs, g.b.cs = input.stride(-1);
    if (!product(1, shape, 2, g, rows)) return give_up();
  }
  if (by_bias) {
    PyObject* result = new_result(grad, &columns, 1, out);
    if (!result) return give_up();
    Py_DECREF(gradients[2]);
    gradients[2] = run(result, double(rows) * columns, [&] {
      column_sum(grad.data, rows, columns, grad_rs, grad.stride(-1), grad.type, out.data);
    });
    if (!gradients[2]) return give_up();
  }
  PyObject* tuple = PyTuple_New(3);
  if (!tuple) return give_up();
  for (int i = 0; i < 3; i++) PyTuple_SET_ITEM(tuple, i, gradients[i]);
  return tuple;
}

// tensor_activation(kind, x, out), for contiguous x and out; out may be x.
PyObject* tensor_activation(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor x, out;
  int kind;
  if (n != 3 || !readable() || !integer(args[0], kActivations - 1, kind) || kind < 1 ||
      !read(args[1], x) || !x.contiguous() || !quiet())
    return not_taken();
  const bool grad = wants_grad(args[1], args[2] != Py_None ? args[2] : args[1]);
  if (PyErr_Occurred() || (grad && args[2] != Py_None)) return not_taken();
  PyObject* result = result_in(args[2], x, x.shape, x.dims, out);
  if (!result) return not_taken();
  if (args[2] != Py_None && (!out.contiguous() || (out.data != x.data && overlap(out, x))))
    return not_taken(result);
  const int64_t count = x.count(), one = 1;
  result = written(args[2], run(result, 20. * double(count), [&] {
                     unary(kind, x.type, 1, &count, {x.data, &one}, {out.data, &one});
                   }));
  return grad ? in_tuple(result) : result;
}

// tensor_activation_backward(kind, grad, saved), both contiguous and of one shape.
PyObject* tensor_activation_backward(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor grad, saved, out;
  int kind;
  if (n != 3 || !readable() || !integer(args[0], kActivations - 1, kind) || kind < 1 ||
      !read(args[1], grad) || !read(args[2], saved) || grad.type != saved.type ||
      grad.dims != saved.dims || !grad.contiguous() || !saved.contiguous() || !quiet() ||
      !grad_is_off())
    return not_taken();
  for (int d = 0; d < grad.dims; d++)
    if (grad.shape[d] != saved.shape[d]) return not_taken();
  PyObject* result = new_result(saved, saved.shape, saved.dims, out);
  if (!result) return not_taken();
  const int64_t count = saved.count(), one = 1;
  return run(result, 20. * double(count), [&] {
    activation_backward(kind, saved.type, 1, &count, {grad.data, &one}, {saved.data, &one},
                        {out.data, &one});
  });
}

PyMethodDef tensors_functions[] = {
    method(
        "tensor_product", tensor_product,
        "activation(a @ b + bias + residual); None where not taken, a tuple of it where a gradient "
        "is wanted."),
    method("tensor_linear_gradients", tensor_linear_gradients,
           "The gradients of a linear layer; None where not taken."),
    method("tensor_activation", tensor_activation,
           "An activation; None where not taken, a tuple of it where a gradient is wanted."),
    method("tensor_activation_backward", tensor_activation_backward,
           "Its gradient; None where not taken."),
    {nullptr, nullptr, 0, nullptr}};

// Takes torch's table of functions over if its major version is known, with what is asked beside
// it. All of it is kept for the life of the process.
bool use_torch(py::object capsule, py::type tensor, py::type parameter, py::dict asked) {
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return false;
  auto* table =
      static_cast<const ExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (table->header.major != 1 || !table->dltensor_from_py_object_no_sync) return false;
  const std::pair<const char*, PyObject**> names[] = {
      {"plain_settings", &plain_settings},
      {"forward_ad", &forward_ad},
      {"settings", &get_settings},
      {"dispatch_modes", &dispatch_modes},
      {"functorch_active", &functorch_active},
      {"tracing_state", &tracing_state},
      {"autocast_enabled", &autocast_enabled},
      {"grad_enabled", &grad_enabled},
      {"precision", &get_precision},
      {"is_neg", &is_neg},
      {"is_inference", &is_inference},
      {"increment_version", &increment_version},
      {"float64", &float64},
      {"uint8", &uint8},
      {"int32", &int32},
      {"empty", &large_empty},
  };
  for (auto [name, object] : names) *object = py::object(asked[name]).release().ptr();
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor.release().ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter.release().ptr());
  capsule.release();
  name_new_empty = PyUnicode_InternFromString("new_empty");
  name_new_empty_strided = PyUnicode_InternFromString("new_empty_strided");
  names_dtype = py::make_tuple("dtype").release().ptr();
  name_requires_grad = PyUnicode_InternFromString("requires_grad");
  name_current_level = PyUnicode_InternFromString("_current_level");
  name_dtype = PyUnicode_InternFromString("dtype");
  read_tensor = table->dltensor_from_py_object_no_sync;
  return true;
}

}  // namespace

void bind_tensors(py::module_& m) {
  m.def("use_torch", &use_torch, py::arg("capsule"), py::arg("tensor"), py::arg("parameter"),
        py::arg("asked"),
        "Reads tensors through DLPack's C table from now on, and asks torch what `asked` holds; "
        "False if it cannot.");
  if (PyModule_AddFunctions(m.ptr(), tensors_functions) != 0) throw py::error_already_set();
}
