// The short way of attention: see tensors.cpp.
#include <cmath>

#include "attention/attention.hpp"
#include "bind/tensors.hpp"

namespace py = pybind11;
using namespace fastnn;
using namespace fastnn::tensors;

namespace {

AttentionOperand operand(const Tensor& x) {
  return {x.data, {x.strides[0], x.strides[1], x.strides[2], x.strides[3]}};
}

// What broadcasts to (batch, heads, queries, keys): of two dimensions or four.
bool read_mask(PyObject* object, const Attention& call, AttentionOperand& mask, DType& type) {
  Tensor m;
  if (!read(object, m) && !read_flags(object, m)) return false;
  if (m.dims != 2 && m.dims != 4) return false;
  if (m.type != DType::u8 && m.type != DType::f32 && m.type != call.type) return false;
  const int64_t full[4] = {call.batch, call.heads, call.q_length, call.k_length};
  for (int d = 0; d < m.dims; d++) {
    const int to = d + 4 - m.dims;
    if (m.shape[d] != 1 && m.shape[d] != full[to]) return false;
    mask.strides[to] = m.shape[d] == 1 ? 0 : m.strides[d];
  }
  mask.data = m.data, type = m.type;
  return true;
}

// Whether keys and values fit the call, whose sizes are those of the query, and each other.
bool takes(const Attention& call, const Tensor& k, const Tensor& v) {
  constexpr int64_t kMostSize = 512;
  return k.shape[0] == call.batch && v.shape[0] == call.batch && v.shape[1] == call.kv_heads &&
         v.shape[2] == call.k_length && k.shape[3] == call.head_size &&
         call.head_size <= kMostSize && call.value_size <= kMostSize;
}

// tensor_attention(like_query, query, key, value, mask, causal, scale, gqa): the result, laid out
// as `like_query(query)` is where torch's kernel lays it out so, else contiguous. like_query may be
// None, where it never does. Where a gradient is wanted, of anything but the mask: a tuple of it
// and of log sum exp of the scores.
PyObject* tensor_attention(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor q, k, v, out;
  bool causal, gqa;
  if (n != 8 || !readable() || !read(args[1], q) || !read(args[2], k) || !read(args[3], v) ||
      !flag(args[5], causal) || !flag(args[7], gqa))
    return not_taken();
  if (q.dims != 4 || k.dims != 4 || v.dims != 4 || k.type != q.type || v.type != q.type)
    return not_taken();
  AttentionForward call;
  call.type = q.type;
  call.batch = q.shape[0], call.heads = q.shape[1], call.kv_heads = k.shape[1];
  call.q_length = q.shape[2], call.k_length = k.shape[2];
  call.head_size = q.shape[3], call.value_size = v.shape[3];
  if (!takes(call, k, v)) return not_taken();
  if (gqa ? call.heads % call.kv_heads != 0 : call.heads != call.kv_heads) return not_taken();
  const bool masked = args[4] != Py_None;
  if (masked && (causal || !read_mask(args[4], call, call.mask, call.mask_type)))
    return not_taken();
  if (args[6] == Py_None)
    call.scale = 1 / std::sqrt(double(call.head_size));
  else if (PyFloat_CheckExact(args[6]))
    call.scale = PyFloat_AS_DOUBLE(args[6]);
  else
    return not_taken();
  if (!quiet() || (masked && wants_grad(args[4]))) return not_taken();
  const bool grad = wants_grad(args[1], args[2], args[3]);
  // log sum exp is then of another type.
  if (grad && q.type != DType::f32 && q.type != DType::f64) return not_taken();
  if (PyErr_Occurred()) return not_taken();

  const bool like_query = args[0] != Py_None && call.value_size == call.head_size &&
                          q.strides[3] == 1 && k.strides[3] == 1 && v.strides[3] == 1;
  const int64_t shape[4] = {call.batch, call.heads, call.q_length, call.value_size};
  Held result{like_query ? made_by(args[0], q, out) : new_result(q, shape, 4, out)};
  if (!result.object) return not_taken();
  Held log_sum;
  if (grad) {
    Tensor sums;
    if (!(log_sum.object = new_result(q, shape, 3, sums))) return not_taken();
    call.log_sum = sums.data;
  }
  call.q = operand(q), call.k = operand(k), call.v = operand(v), call.out = operand(out);
  if (causal) call.high = 0;
  const double work = 2. * double(call.batch * call.heads * call.q_length) *
                      double(call.k_length * (call.head_size + call.value_size));
  result.object = run(result.release(), work, [&] { attention(call); });
  if (!grad || !result.object) return result.release();
  return PyTuple_Pack(2, result.object, log_sum.object);
}

// Contiguous, with the strides of new tensors in dimensions of one as well, which empty_like keeps.
bool is_row_major(const Tensor& x) {
  int64_t expected = 1;
  for (int d = x.dims - 1; d >= 0; d--) {
    if (x.strides[d] != expected) return false;
    expected *= x.shape[d];
  }
  return true;
}

// tensor_attention_backward(empty_like, grad, query, key, value, mask, out, log_sum, scale,
// causal): the gradients of query, key and value, laid out as these.
PyObject* tensor_attention_backward(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Tensor grad, q, k, v, out, log_sum;
  bool causal;
  if (n != 10 || !readable() || !read(args[1], grad) || !read(args[2], q) || !read(args[3], k) ||
      !read(args[4], v) || !read(args[6], out) || !read(args[7], log_sum) ||
      !PyFloat_CheckExact(args[8]) || !flag(args[9], causal))
    return not_taken();
  for (const Tensor* t : {&grad, &k, &v, &out})
    if (t->dims != 4 || t->type != q.type) return not_taken();
  if (q.dims != 4 || log_sum.dims != 3 || !log_sum.contiguous() ||
      log_sum.type != (q.type == DType::f64 ? DType::f64 : DType::f32))
    return not_taken();
  AttentionBackward call;
  call.type = q.type;
  call.batch = q.shape[0], call.heads = q.shape[1], call.kv_heads = k.shape[1];
  call.q_length = q.shape[2], call.k_length = k.shape[2];
  call.head_size = q.shape[3], call.value_size = v.shape[3];
  const int64_t result[4] = {call.batch, call.heads, call.q_length, call.value_size};
  for (int d = 0; d < 4; d++)
    if (out.shape[d] != result[d] || grad.shape[d] != result[d] ||
        (d < 3 && log_sum.shape[d] != result[d]))
      return not_taken();
  if (!takes(call, k, v) || call.heads % call.kv_heads != 0) return not_taken();
  if (args[5] != Py_None && !read_mask(args[5], call, call.mask, call.mask_type))
    return not_taken();
  if (!quiet() || !grad_is_off()) return not_taken();

  Held gradients[3];
  Tensor to[3];
  const Tensor* inputs[3] = {&q, &k, &v};
  for (int i = 0; i < 3; i++) {
    const Tensor& x = *inputs[i];
    if (is_row_major(x)) gradients[i].object = new_result(x, x.shape, 4, to[i]);
    if (!gradients[i].object && !PyErr_Occurred()) gradients[i].object = made_by(args[0], x, to[i]);
    if (!gradients[i].object) return not_taken();
  }
  call.q = operand(q), call.k = operand(k), call.v = operand(v), call.out = operand(out);
  call.grad = operand(grad), call.log_sum = log_sum.data;
  call.grad_q = operand(to[0]), call.grad_k = operand(to[1]), call.grad_v = operand(to[2]);
  call.scale = PyFloat_AS_DOUBLE(args[8]);
  if (causal) call.high = 0;
  const double work = 5. * double(call.batch * call.heads * call.q_length) *
                      double(call.k_length * (call.head_size + call.value_size));
  gradients[0].object = run(gradients[0].release(), work, [&] { attention_backward(call); });
  if (!gradients[0].object) return nullptr;
  return PyTuple_Pack(3, gradients[0].object, gradients[1].object, gradients[2].object);
}

PyMethodDef attention_functions[] = {
    method("tensor_attention", tensor_attention, "Attention; None where not taken."),
    method("tensor_attention_backward", tensor_attention_backward,
           "The gradients of query, key and value; None where not taken."),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_attention_tensors(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), attention_functions) != 0) throw py::error_already_set();
}
