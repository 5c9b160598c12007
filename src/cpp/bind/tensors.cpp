// The short way of small calls: torch's tensors are read in C, through the table of functions that
// DLPack defines for it (DLPackExchangeAPI, dmlc/dlpack 1.3), which torch has since 2.10. Asking a
// tensor for its address, sizes and strides from Python takes longer than a small product does.
//
// Each function gives None for whatever it does not take; the caller then goes the long way.
#include <pybind11/pybind11.h>

#include <new>
#include <stdexcept>

#include "bind/bind.hpp"
#include "elementwise/elementwise.hpp"
#include "gemm/gemm.hpp"

namespace py = pybind11;
using namespace fastnn;

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
constexpr uint8_t kFloat = 2, kBfloat = 4;

// Results above this come from the caching allocator, the long way (LARGE_BYTES in cpu.py).
constexpr int64_t kLargeBytes = 4 << 20;
// Giving up the GIL costs as much as this many multiplications take.
constexpr double kTiny = 5e5;
constexpr int kMaxDims = kMaxBatchDims + 2;

int (*read_tensor)(void*, DLTensor*) = nullptr;
PyTypeObject* tensor_type = nullptr;
PyTypeObject* parameter_type = nullptr;
PyObject* name_is_neg = nullptr;
PyObject* name_new_empty = nullptr;

struct Tensor {
  PyObject* object;
  char* data;
  DType type;
  int dims;
  const int64_t* shape;
  const int64_t* strides;

  int64_t size(int d) const { return shape[d < 0 ? dims + d : d]; }
  int64_t stride(int d) const { return strides[d < 0 ? dims + d : d]; }
  bool contiguous() const {
    int64_t expected = 1;
    for (int d = dims - 1; d >= 0; d--) {
      if (shape[d] != 1 && strides[d] != expected) return false;
      expected *= shape[d];
    }
    return true;
  }
  int64_t count() const {
    int64_t n = 1;
    for (int d = 0; d < dims; d++) n *= shape[d];
    return n;
  }
};

// False for what is no plain, dense, floating-point CPU tensor with elements. No error is left set.
bool read(PyObject* object, Tensor& t) {
  if (Py_TYPE(object) != tensor_type && Py_TYPE(object) != parameter_type) return false;
  DLTensor dl;
  if (read_tensor(object, &dl) != 0) {
    PyErr_Clear();
    return false;
  }
  if (dl.device.type != kCpu || dl.dtype.lanes != 1 || !dl.data || dl.ndim < 1 ||
      dl.ndim > kMaxDims || !dl.strides)
    return false;
  if (dl.dtype.code == kFloat && dl.dtype.bits == 32) {
    t.type = DType::f32;
  } else if (dl.dtype.code == kFloat && dl.dtype.bits == 64) {
    t.type = DType::f64;
  } else if (dl.dtype.code == kBfloat && dl.dtype.bits == 16) {
    t.type = DType::bf16;
  } else if (dl.dtype.code == kFloat && dl.dtype.bits == 16) {
    t.type = DType::f16;
  } else {
    return false;
  }
  for (int d = 0; d < dl.ndim; d++)
    if (dl.shape[d] <= 0) return false;
  t.object = object;
  t.data = static_cast<char*>(dl.data) + dl.byte_offset;
  t.dims = dl.ndim, t.shape = dl.shape, t.strides = dl.strides;
  // DLPack does not speak of tensors that are negated when read.
  PyObject* negated = PyObject_VectorcallMethod(name_is_neg, &object, 1, nullptr);
  if (!negated) {
    PyErr_Clear();
    return false;
  }
  const bool plain = negated == Py_False;
  Py_DECREF(negated);
  return plain;
}

// All dimensions but the last as one, without a copy: how many rows and their stride.
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

// A tensor as torch makes them: like.new_empty(*shape), so that inference mode, resize_ and
// whatever else torch's own results know hold for these too. Null with an error set, or without
// when large.
PyObject* new_result(const Tensor& like, const int64_t* shape, int dims, Tensor& out) {
  int64_t count = 1;
  for (int d = 0; d < dims; d++)
    if (__builtin_mul_overflow(count, shape[d], &count)) return nullptr;
  if (count > kLargeBytes / int64_t(dtype_size(like.type))) return nullptr;
  PyObject* arguments[kMaxDims + 1] = {like.object};
  int made = 0;
  for (; made < dims; made++)
    if (!(arguments[made + 1] = PyLong_FromLongLong(shape[made]))) break;
  PyObject* result =
      made < dims ? nullptr
                  : PyObject_VectorcallMethod(name_new_empty, arguments, size_t(dims) + 1, nullptr);
  for (int d = 0; d < made; d++) Py_DECREF(arguments[d + 1]);
  if (result && !read(result, out)) {
    Py_DECREF(result);
    return nullptr;
  }
  return result;
}

PyObject* not_taken(PyObject* result = nullptr) {
  Py_XDECREF(result);
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

template <class Work>
PyObject* run(PyObject* result, double operations, Work work) {
  try {
    if (operations < kTiny) {
      work();
    } else {
      py::gil_scoped_release release;
      work();
    }
    return result;
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& e) {
    PyErr_SetString(PyExc_ValueError, e.what());
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
  }
  Py_DECREF(result);
  return nullptr;
}

bool integer(PyObject* object, int last, int& value) {
  const long v = PyLong_AsLong(object);
  if (v == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  value = int(v);
  return v >= 0 && v <= last;
}

// tensor_product(a, b, transpose_b, bias, activation, precision):
// activation(a @ b + bias), or a @ b.T; a (..., M, K), b a matrix, or, untransposed, of a's batch.
PyObject* tensor_product(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor a, b, bias, out;
  int activation, precision;
  if (n != 6 || !read_tensor || !read(args[0], a) || !read(args[1], b) || a.type != b.type ||
      a.dims < 2 || b.dims < 2 || !integer(args[4], 6, activation) ||
      !integer(args[5], 2, precision))
    return not_taken();
  const bool transpose_b = args[2] == Py_True;
  if (transpose_b && b.dims != 2) return not_taken();
  Gemm g;
  g.k = a.size(-1);
  g.n = b.size(transpose_b ? -2 : -1);
  if (b.size(transpose_b ? -1 : -2) != g.k) return not_taken();
  if (args[3] != Py_None) {
    if (!read(args[3], bias) || bias.type != a.type || bias.dims != 1 || bias.shape[0] != g.n)
      return not_taken();
    g.bias = bias.data, g.bias_stride = bias.strides[0];
    g.bias_axis = BiasAxis::column, g.bias_type = bias.type;
  }
  int64_t shape[kMaxDims];
  for (int d = 0; d < a.dims - 1; d++) shape[d] = a.shape[d];
  shape[a.dims - 1] = g.n;
  double operations = double(g.n) * g.k;
  g.a.cs = a.stride(-1);
  if (b.dims == 2) {
    if (!fold_rows(a, g.m, g.a.rs)) return not_taken();
    operations *= double(g.m);
  } else {
    if (a.dims != b.dims) return not_taken();
    g.m = a.size(-2), g.a.rs = a.stride(-2);
    operations *= double(g.m);
    g.batch_dims = a.dims - 2;
    int64_t step = g.m * g.n;
    for (int d = g.batch_dims - 1; d >= 0; d--) {
      if (a.shape[d] != b.shape[d]) return not_taken();
      g.batch[d] = a.shape[d];
      g.a.batch[d] = a.strides[d], g.b.batch[d] = b.strides[d], g.c.batch[d] = step;
      step *= a.shape[d];
      operations *= double(a.shape[d]);
    }
  }
  PyObject* result = new_result(a, shape, a.dims, out);
  if (!result) return not_taken();
  g.a.data = a.data, g.a.type = a.type;
  g.b.data = b.data, g.b.type = b.type;
  g.b.rs = b.stride(transpose_b ? -1 : -2), g.b.cs = b.stride(transpose_b ? -2 : -1);
  g.c.data = out.data, g.c.type = out.type, g.c.rs = g.n, g.c.cs = 1;
  g.activation = activation;
  if (a.type == DType::f32) g.precision = Precision(precision);
  return run(result, operations, [&] { gemm(g); });
}

// tensor_inner(a, b, precision): a.T @ b over all rows of a (..., M) and b (..., N): the gradient
// of a weight, from that of the output and the input.
PyObject* tensor_inner(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor a, b, out;
  int precision;
  Gemm g;
  int64_t rows = 0;
  if (n != 3 || !read_tensor || !read(args[0], a) || !read(args[1], b) || a.type != b.type ||
      !integer(args[2], 2, precision) || !fold_rows(a, g.k, g.a.cs) ||
      !fold_rows(b, rows, g.b.rs) || rows != g.k)
    return not_taken();
  g.m = a.size(-1), g.n = b.size(-1);
  g.a.rs = a.stride(-1), g.b.cs = b.stride(-1);
  const int64_t shape[2] = {g.m, g.n};
  PyObject* result = new_result(a, shape, 2, out);
  if (!result) return not_taken();
  g.a.data = a.data, g.a.type = a.type;
  g.b.data = b.data, g.b.type = b.type;
  g.c.data = out.data, g.c.type = out.type, g.c.rs = g.n, g.c.cs = 1;
  if (a.type == DType::f32) g.precision = Precision(precision);
  return run(result, double(g.m) * g.n * g.k, [&] { gemm(g); });
}

// tensor_column_sum(x): the sum over all dimensions of x but the last.
PyObject* tensor_column_sum(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor x, out;
  int64_t rows, stride;
  if (n != 1 || !read_tensor || !read(args[0], x) || !fold_rows(x, rows, stride))
    return not_taken();
  const int64_t columns = x.size(-1);
  PyObject* result = new_result(x, &columns, 1, out);
  if (!result) return not_taken();
  return run(result, double(rows) * columns,
             [&] { column_sum(x.data, rows, columns, stride, x.stride(-1), x.type, out.data); });
}

// tensor_activation(kind, x), for contiguous x.
PyObject* tensor_activation(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor x, out;
  int kind;
  if (n != 2 || !read_tensor || !integer(args[0], kActivations - 1, kind) || kind < 1 ||
      !read(args[1], x) || !x.contiguous())
    return not_taken();
  PyObject* result = new_result(x, x.shape, x.dims, out);
  if (!result) return not_taken();
  const int64_t count = x.count(), one = 1;
  return run(result, 20. * count,
             [&] { unary(kind, x.type, 1, &count, {x.data, &one}, {out.data, &one}); });
}

// tensor_activation_backward(kind, grad, saved), both contiguous and of one shape.
PyObject* tensor_activation_backward(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor grad, saved, out;
  int kind;
  if (n != 3 || !read_tensor || !integer(args[0], kActivations - 1, kind) || kind < 1 ||
      !read(args[1], grad) || !read(args[2], saved) || grad.type != saved.type ||
      grad.dims != saved.dims || !grad.contiguous() || !saved.contiguous())
    return not_taken();
  for (int d = 0; d < grad.dims; d++)
    if (grad.shape[d] != saved.shape[d]) return not_taken();
  PyObject* result = new_result(saved, saved.shape, saved.dims, out);
  if (!result) return not_taken();
  const int64_t count = saved.count(), one = 1;
  return run(result, 20. * count, [&] {
    activation_backward(kind, saved.type, 1, &count, {grad.data, &one}, {saved.data, &one},
                        {out.data, &one});
  });
}

PyMethodDef functions[] = {
    {"tensor_product", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(tensor_product)),
     METH_FASTCALL, "activation(a @ b + bias), or with b transposed; None where not taken."},
    {"tensor_inner", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(tensor_inner)),
     METH_FASTCALL, "a.T @ b over all rows; None where not taken."},
    {"tensor_column_sum",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(tensor_column_sum)), METH_FASTCALL,
     "The sum over all dimensions but the last; None where not taken."},
    {"tensor_activation",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(tensor_activation)), METH_FASTCALL,
     "An activation of a contiguous tensor; None where not taken."},
    {"tensor_activation_backward",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(tensor_activation_backward)),
     METH_FASTCALL, "Its gradient; None where not taken."},
    {nullptr, nullptr, 0, nullptr}};

// Takes the table over if its major version is known. Without it, the functions above take nothing.
bool use_exchange_table(py::object capsule, py::type tensor, py::type parameter) {
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return false;
  auto* table =
      static_cast<const ExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (table->header.major != 1 || !table->dltensor_from_py_object_no_sync) return false;
  // Kept for the life of the process, as the types and the capsule are.
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
  capsule.inc_ref();
  name_is_neg = PyUnicode_InternFromString("is_neg");
  name_new_empty = PyUnicode_InternFromString("new_empty");
  read_tensor = table->dltensor_from_py_object_no_sync;
  return true;
}

}  // namespace

void bind_tensors(py::module_& m) {
  m.def("use_exchange_table", &use_exchange_table, py::arg("capsule"), py::arg("tensor"),
        py::arg("parameter"),
        "Reads tensors through DLPack's C table from now on; False if it cannot.");
  if (PyModule_AddFunctions(m.ptr(), functions) != 0) throw py::error_already_set();
}
