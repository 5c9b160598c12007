// torch's tensors read in C, and what every short way asks: see tensors.cpp.
#pragma once
#include <pybind11/pybind11.h>

#include <new>
#include <stdexcept>
#include <utility>

#include "bind/bind.hpp"
#include "gemm/gemm.hpp"

namespace fastnn::tensors {

constexpr int kMaxDims = 8;
// Results above this come from the caching allocator (LARGE_BYTES in backends/cpu/).
constexpr int64_t kLargeBytes = 1 << 20;
// Giving up the GIL costs as much as this many multiplications take.
constexpr double kFewOperations = 5e5;

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

// Whether use_torch has given a table to read tensors through. Without one nothing is taken.
bool readable();
// False for what is no plain, dense, floating-point CPU tensor with elements. No error is left set.
bool read(PyObject* object, Tensor& t, bool fresh = false);
// A result of our own making, of integers too.
bool read_new(PyObject* object, Tensor& t);
// A pool's codes: as `read`, of uint8 or int32.
bool read_codes(PyObject* object, Tensor& t);
// As `read`, of int8 or uint8.
bool read_bytes(PyObject* object, Tensor& t);
// As `read`, of booleans, whose type is then u8.
bool read_flags(PyObject* object, Tensor& t);
// The number in a tensor without dimensions, of float32 or float64.
bool read_number(PyObject* object, double& value);
// int32 or int64 (`wide`) with elements, of any number of dimensions; `type` is not set.
bool read_integers(PyObject* object, Tensor& t, bool& wide);
// True where nothing traces, transforms, casts or was asked for.
bool quiet();
bool grad_is_off();
bool requires_grad(PyObject* tensor);
template <class... Objects>
bool wants_grad(Objects... tensors) {
  return !grad_is_off() && (requires_grad(tensors) || ...);
}
bool is_ordinary(PyObject* tensor);  // no inference tensor, and no error before
bool integer(PyObject* object, int last, int& value);
bool flag(PyObject* object, bool& value);
PyObject* dtype_object(DType type);  // of float64 and of codes; borrowed

// Whether all elements of `out` lie apart.
bool apart(const Tensor& out);
// A tensor as torch makes them: like.new_empty(*shape), so that inference mode, resize_ and
// whatever else torch's own results know hold for these too; large ones as the long way has them.
// Null with an error set, or without where their number cannot be counted.
PyObject* new_result(const Tensor& like, const int64_t* shape, int dims, DType type, Tensor& out);
inline PyObject* new_result(const Tensor& like, const int64_t* shape, int dims, Tensor& out) {
  return new_result(like, shape, dims, like.type, out);
}
// like.new_empty(n, dtype=torch.float64), or of like's dtype.
PyObject* new_vector(const Tensor& like, int64_t n, bool wide, Tensor& out);
// like.new_empty(()), whose number lies at `data`. Null with an error set, or without.
PyObject* new_number(const Tensor& like, char*& data);
// A result that `make`, a function of the tensor x, allocates. Null with an error set.
PyObject* made_by(PyObject* make, const Tensor& x, Tensor& out);
// A result in (N, C, ...)'s own layout: contiguous, or channels-last where x is; made by `make`
// where it is large, or x is laid out otherwise.
PyObject* new_channels(PyObject* make, const Tensor& x, Tensor& out);
// like.new_empty_strided(shape, strides). Null with an error set.
PyObject* new_strided(const Tensor& like, const int64_t* shape, const int64_t* strides, int dims,
                      DType type, Tensor& out);
// All dimensions but the last as one, without a copy: how many rows and their stride.
bool fold_rows(const Tensor& t, int64_t& rows, int64_t& stride);
PyObject* to_tuple(const int64_t* numbers, int count);  // null with an error set
// torch's precision for products of float32. False where it cannot be known.
bool precision_of(DType type, double operations, Precision& precision);
// Counts a change in place of these tensors. False with an error set.
bool count_change(std::initializer_list<PyObject*> tensors);
// None, or null if an error is set.
PyObject* not_taken(PyObject* result = nullptr);
// For an autograd.Function, which would take a tensor among its arguments for an input.
PyObject* in_tuple(PyObject* result);

// A Python object that is let go of with its scope.
struct Held {
  PyObject* object = nullptr;
  ~Held() { Py_XDECREF(object); }
  PyObject* release() { return std::exchange(object, nullptr); }
};

// `result` once work() has run; null with an error set if it threw.
template <class Work>
PyObject* run(PyObject* result, double operations, Work work) {
  try {
    if (operations < kFewOperations) {
      work();
    } else {
      pybind11::gil_scoped_release release;
      work();
    }
    return result;
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& e) {
    PyErr_SetString(PyExc_ValueError, e.what());
  } catch (const std::out_of_range& e) {
    PyErr_SetString(PyExc_IndexError, e.what());
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
  }
  Py_DECREF(result);
  return nullptr;
}

using FastCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
PyMethodDef method(const char* name, FastCall function, const char* doc);

}  // namespace fastnn::tensors
