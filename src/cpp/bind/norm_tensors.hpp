// What the short ways of the normalizations by channel read: see tensors.cpp.
#pragma once
#include "bind/tensors.hpp"
#include "norm/batch_norm.hpp"

// Part of what bind_norm_tensors binds.
void bind_group_norm_tensors(pybind11::module_& m);

namespace fastnn::tensors {

// One number a channel, or None: all of them in the input's dtype, or, beside one of 16 bits, all
// in float32.
class Channels {
 public:
  explicit Channels(const Tensor& x) : x_(x), type_(x.type) {}
  bool take(PyObject* object, PerChannel& to) {
    to = {};
    if (object == Py_None) return true;
    Tensor t;
    if (!read(object, t) || t.dims != 1 || t.shape[0] != x_.shape[1]) return false;
    const bool half = x_.type == DType::bf16 || x_.type == DType::f16;
    if (t.type != x_.type && !(half && t.type == DType::f32)) return false;
    if (taken_ && t.type != type_) return false;
    taken_ = true, type_ = t.type;
    to = {t.data, t.type, t.strides[0]};
    return true;
  }

 private:
  const Tensor& x_;
  DType type_;
  bool taken_ = false;
};

inline bool number(PyObject* object, double& value) {
  if (!PyFloat_CheckExact(object)) return false;
  value = PyFloat_AS_DOUBLE(object);
  return true;
}
inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dims != b.dims || a.type != b.type) return false;
  for (int d = 0; d < a.dims; d++)
    if (a.shape[d] != b.shape[d]) return false;
  return true;
}

}  // namespace fastnn::tensors
