#include "bind/image_tensors.hpp"

namespace fastnn::tensors {

bool numbers(PyObject* object, int rank, int64_t least, int64_t* to) {
  const bool tuple = PyTuple_CheckExact(object);
  if (tuple && PyTuple_GET_SIZE(object) != rank && PyTuple_GET_SIZE(object) != 1) return false;
  for (int d = 0; d < rank; d++) {
    PyObject* number = object;
    if (tuple) number = PyTuple_GET_ITEM(object, PyTuple_GET_SIZE(object) == 1 ? 0 : d);
    if (!PyLong_CheckExact(number)) return false;
    const long long value = PyLong_AsLongLong(number);
    if (value == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
    // What overflows a size is for the long way to refuse.
    if (value < least || value > INT32_MAX) return false;
    to[d] = value;
  }
  return true;
}

bool like_channels_last(const int64_t* shape, const int64_t* strides, int dims) {
  if (strides[1] == 0) return false;
  int64_t least = 0;
  auto next = [&](int d) {
    if (strides[d] < least || (d == 0 && least == strides[1])) return false;
    least = strides[d] * (shape[d] > 1 ? shape[d] : 1);
    return true;
  };
  if (!next(1)) return false;
  for (int d = dims - 1; d > 1; d--)
    if (!next(d)) return false;
  return next(0);
}

void channels_last_strides(const int64_t* shape, int dims, int64_t* strides) {
  int64_t expected = 1;
  strides[1] = expected, expected *= shape[1];
  for (int d = dims - 1; d > 1; d--) strides[d] = expected, expected *= shape[d];
  strides[0] = expected;
}

PyObject* new_image(PyObject* make, const Tensor& like, const int64_t* shape, int dims, bool last,
                    DType type, Tensor& out) {
  double bytes = double(dtype_size(type));
  for (int d = 0; d < dims; d++) bytes *= double(shape[d]);
  if (bytes > kLargeBytes) {
    PyObject* sizes = to_tuple(shape, dims);
    PyObject* dtype = type == like.type ? nullptr : dtype_object(type);
    PyObject* result = sizes
                           ? PyObject_CallFunctionObjArgs(make, like.object, sizes,
                                                          last ? Py_True : Py_False, dtype, nullptr)
                           : nullptr;
    Py_XDECREF(sizes);
    if (result && !read_new(result, out)) Py_CLEAR(result);
    return result;
  }
  if (!last) return new_result(like, shape, dims, type, out);
  int64_t strides[kMaxDims];
  channels_last_strides(shape, dims, strides);
  return new_strided(like, shape, strides, dims, type, out);
}

}  // namespace fastnn::tensors
