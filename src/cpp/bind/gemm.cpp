// GEMM for Python: checks that make a crash impossible for consistent pointers, and no more; what a
// tensor is, and which exception torch would raise, is decided in python/fastnn/ops.
#include "gemm/gemm.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind/bind.hpp"
#include "common/activation.hpp"
#include "common/cpu_features.hpp"
#include "common/parallel.hpp"
#include "gemm/float8.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

constexpr int kMaxDims = kMaxBatchDims + 2;

struct View {
  Matrix matrix;
  int64_t shape[kMaxDims];
  int dims;
};

DType operand_argument(const char* op, const char* name, int dtype) {
  return is_float8(DType(dtype)) ? DType(dtype) : dtype_argument(op, name, dtype);
}

View view(const char* op, const char* name, uintptr_t ptr, py::handle shape, py::handle strides,
          int dtype) {
  View v{};
  int64_t st[kMaxDims];
  v.dims = read_tuple(op, name, shape, v.shape, kMaxDims);
  if (v.dims < 2) bad_argument(op, name, "at least 2 dimensions");
  if (read_tuple(op, name, strides, st, kMaxDims) != v.dims)
    bad_argument(op, name, "as many strides as dimensions");
  v.matrix.data = reinterpret_cast<char*>(ptr);
  v.matrix.type = operand_argument(op, name, dtype);
  v.matrix.rs = st[v.dims - 2], v.matrix.cs = st[v.dims - 1];
  bool empty = false;
  for (int d = 0; d < v.dims; d++) {
    if (v.shape[d] < 0) bad_argument(op, name, "sizes of 0 or more");
    empty |= v.shape[d] == 0;
    if (d < v.dims - 2) v.matrix.batch[d] = st[d];
  }
  if (!ptr && !empty) bad_argument(op, name, "an address");
  return v;
}

bool is_float(DType t) {
  return t == DType::f32 || t == DType::f64 || t == DType::bf16 || t == DType::f16;
}

void check_types(const Gemm& g) {
  const DType a = g.a.type, b = g.b.type, c = g.c.type;
  const bool numbers = is_float(c) && c != DType::f64;
  const bool ok = is_float(a)    ? a == b && (c == a || (c == DType::f32 && a != DType::f64))
                  : is_float8(a) ? is_float8(b) && numbers
                                 : (a == DType::s8 || a == DType::u8) && b == DType::s8 &&
                                       (c == DType::s32 || numbers);
  if (!ok)
    bad_argument("gemm", "dtypes",
                 std::string("one floating-point type, int8/uint8 times int8, or floats of eight "
                             "bits, got ") +
                     operand_name(a) + " times " + operand_name(b) + " to " + operand_name(c));
  if (c == DType::s32 && (g.alpha != 1 || g.beta != 0 || g.bias_axis != BiasAxis::none ||
                          g.activation || g.row_scale || g.col_scale))
    bad_argument("gemm", "c_dtype", "a floating-point type where there is an epilogue");
  if (is_float(a) && (g.row_scale || g.col_scale))
    bad_argument("gemm", "row_scale, col_scale", "8-bit operands");
}

template <class E>
E enum_argument(const char* name, int value, int last) {
  if (value < 0 || value > last)
    bad_argument("gemm", name, "0 to " + std::to_string(last) + ", got " + std::to_string(value));
  return E(value);
}

void gemm_call(uintptr_t a_ptr, py::handle a_shape, py::handle a_strides, int a_dtype,
               uintptr_t b_ptr, py::handle b_shape, py::handle b_strides, int b_dtype,
               uintptr_t c_ptr, py::handle c_shape, py::handle c_strides, int c_dtype,
               int precision, double alpha, double beta, uintptr_t residual_ptr,
               py::handle residual_strides, uintptr_t bias_ptr, int bias_axis, int64_t bias_stride,
               int bias_dtype, int activation, uintptr_t row_scale_ptr, uintptr_t col_scale_ptr,
               const PackedOperand* packed, bool batch_invariant) {
  Gemm g;
  View c = view("gemm", "c", c_ptr, c_shape, c_strides, c_dtype);
  View a = view("gemm", "a", a_ptr, a_shape, a_strides, a_dtype);
  g.m = c.shape[c.dims - 2], g.n = c.shape[c.dims - 1], g.k = a.shape[a.dims - 1];
  g.batch_dims = c.dims - 2;
  for (int d = 0; d < g.batch_dims; d++) g.batch[d] = c.shape[d];
  g.a = a.matrix, g.c = c.matrix;
  auto same_batch = [&](const View& x) {
    if (x.dims != c.dims) return false;
    for (int d = 0; d < g.batch_dims; d++)
      if (x.shape[d] != c.shape[d]) return false;
    return true;
  };
  if (!same_batch(a) || a.shape[a.dims - 2] != g.m)
    bad_argument("gemm", "a", "the batch and rows of c");
  if (packed) {
    if (packed->k != g.k || packed->n != g.n || int(packed->dtype) != b_dtype)
      bad_argument("gemm", "packed", "the shape and dtype of b");
    g.b.type = packed->dtype;
    if (int(packed->precision) != precision)
      bad_argument("gemm", "packed", "to have been packed at this precision");
    g.b.data = reinterpret_cast<char*>(b_ptr);
  }
  if (!packed || b_ptr) {
    View b = view("gemm", "b", b_ptr, b_shape, b_strides, b_dtype);
    if (!same_batch(b) || b.shape[b.dims - 2] != g.k || b.shape[b.dims - 1] != g.n)
      bad_argument("gemm", "b", "the batch and columns of c and as many rows as a has columns");
    g.b = b.matrix;
  }
  g.alpha = alpha, g.beta = beta;
  if (residual_ptr && beta != 0) {
    int64_t st[kMaxDims];
    if (read_tuple("gemm", "residual_strides", residual_strides, st, kMaxDims) != c.dims)
      bad_argument("gemm", "residual_strides", "as many as c has dimensions");
    g.residual.data = reinterpret_cast<char*>(residual_ptr);
    g.residual.type = g.c.type;
    g.residual.rs = st[c.dims - 2], g.residual.cs = st[c.dims - 1];
    for (int d = 0; d < g.batch_dims; d++) g.residual.batch[d] = st[d];
  }
  g.bias_axis = bias_ptr ? enum_argument<BiasAxis>("bias_axis", bias_axis, 2) : BiasAxis::none;
  g.bias = reinterpret_cast<const char*>(bias_ptr);
  g.bias_type = is_float(g.a.type) ? g.a.type : dtype_argument("gemm", "bias", bias_dtype);
  if (!is_float(g.a.type) && (!is_float(g.bias_type) || g.bias_type == DType::f64))
    bad_argument("gemm", "bias_dtype", "float32, bfloat16 or float16");
  g.bias_stride = bias_stride;
  g.activation = enum_argument<int>("activation", activation, kActivations - 1);
  g.row_scale = reinterpret_cast<const float*>(row_scale_ptr);
  g.col_scale = reinterpret_cast<const float*>(col_scale_ptr);
  g.precision = enum_argument<Precision>("precision", precision, 2);
  g.packed = packed;
  g.batch_invariant = batch_invariant;
  check_types(g);
  py::gil_scoped_release release;
  gemm(g);
}

void linear_call(uintptr_t x, int64_t m, int64_t k, int64_t x_stride, uintptr_t w, int64_t n,
                 int64_t w_stride, uintptr_t bias, uintptr_t out, int64_t out_stride, int dtype,
                 int precision, int activation, bool batch_invariant) {
  Gemm g;
  if (m < 0 || n < 0 || k < 0) bad_argument("linear", "m, n, k", "0 or more");
  const DType t = dtype_argument("linear", "dtype", dtype);
  if (!is_float(t)) bad_argument("linear", "dtype", "a floating-point type");
  if (m && n && (!out || (k && (!x || !w)))) bad_argument("linear", "x, w, out", "addresses");
  g.m = m, g.n = n, g.k = k;
  g.a.data = reinterpret_cast<char*>(x), g.a.type = t, g.a.rs = x_stride, g.a.cs = 1;
  g.b.data = reinterpret_cast<char*>(w), g.b.type = t, g.b.rs = 1, g.b.cs = w_stride;
  g.c.data = reinterpret_cast<char*>(out), g.c.type = t, g.c.rs = out_stride, g.c.cs = 1;
  g.bias = reinterpret_cast<const char*>(bias);
  g.bias_axis = bias ? BiasAxis::column : BiasAxis::none;
  g.bias_type = t;
  g.activation = enum_argument<int>("activation", activation, kActivations - 1);
  g.precision = enum_argument<Precision>("precision", precision, 2);
  g.batch_invariant = batch_invariant;
  // Giving up the GIL costs as much as a tiny product takes.
  if (double(m) * n * k < 5e5) {
    gemm(g);
    return;
  }
  py::gil_scoped_release release;
  gemm(g);
}

}  // namespace

void bind_gemm(py::module_& m) {
  py::class_<PackedOperand>(m, "PackedOperand", "B, laid out as one kernel reads it.")
      .def_readonly("nbytes", &PackedOperand::bytes)
      .def_property_readonly("shape",
                             [](const PackedOperand& p) { return py::make_tuple(p.k, p.n); })
      .def_property_readonly("path", [](const PackedOperand& p) { return packed_path(p); });
  m.def(
      "pack",
      [](uintptr_t ptr, py::handle shape, py::handle strides, int dtype, int precision) {
        View b = view("pack", "b", ptr, shape, strides, dtype);
        if (b.dims != 2) bad_argument("pack", "b", "2 dimensions");
        const Precision p = enum_argument<Precision>("precision", precision, 2);
        py::gil_scoped_release release;
        return pack_b(b.matrix, b.shape[0], b.shape[1], p);
      },
      py::arg("b_ptr"), py::arg("b_shape"), py::arg("b_strides"), py::arg("dtype"),
      py::arg("precision") = 0);
  m.def("gemm", &gemm_call, py::arg("a_ptr"), py::arg("a_shape"), py::arg("a_strides"),
        py::arg("a_dtype"), py::arg("b_ptr"), py::arg("b_shape"), py::arg("b_strides"),
        py::arg("b_dtype"), py::arg("c_ptr"), py::arg("c_shape"), py::arg("c_strides"),
        py::arg("c_dtype"), py::arg("precision") = 0, py::arg("alpha") = 1.0, py::arg("beta") = 0.0,
        py::arg("residual_ptr") = 0, py::arg("residual_strides") = py::tuple(),
        py::arg("bias_ptr") = 0, py::arg("bias_axis") = 0, py::arg("bias_stride") = 1,
        py::arg("bias_dtype") = 0, py::arg("activation") = 0, py::arg("row_scale_ptr") = 0,
        py::arg("col_scale_ptr") = 0,
        py::arg("packed") = static_cast<const PackedOperand*>(nullptr),
        py::arg("batch_invariant") = false,
        "c = activation(alpha * row_scale * col_scale * (a @ b) + bias + beta * residual)");
  m.def("linear", &linear_call, "out = activation(x @ w.T + bias), rows dense, one dtype");
  m.def(
      "column_sum",
      [](uintptr_t x, int64_t rows, int64_t cols, int64_t rs, int64_t cs, int dtype,
         uintptr_t out) {
        const DType t = dtype_argument("column_sum", "dtype", dtype);
        if (rows < 0 || cols < 0) bad_argument("column_sum", "m, n", "0 or more");
        if (cols && (!out || (rows && !x))) bad_argument("column_sum", "x, out", "addresses");
        py::gil_scoped_release release;
        column_sum(reinterpret_cast<void*>(x), rows, cols, rs, cs, t, reinterpret_cast<void*>(out));
      },
      py::arg("x_ptr"), py::arg("m"), py::arg("n"), py::arg("row_stride"), py::arg("col_stride"),
      py::arg("dtype"), py::arg("out_ptr"));
  m.def(
      "gemm_path",
      [](int a, int, int precision) {
        return gemm_path(operand_argument("gemm_path", "a_dtype", a),
                         enum_argument<Precision>("precision", precision, 2));
      },
      py::arg("a_dtype"), py::arg("c_dtype"), py::arg("precision") = 0,
      "The name of the kernel that runs a large product of this type.");
  m.def("counters", &gemm_counters,
        "Calls so far, by kernel: products, and convolutions that are none.");
  m.def("reset_counters", &reset_gemm_counters);
  m.def(
      "peak_flops",
      [](const std::string& kind, int threads, double seconds) {
        py::gil_scoped_release release;
        return peak_flops(kind, threads, seconds);
      },
      py::arg("kind"), py::arg("threads"), py::arg("seconds") = 0.2,
      "Operations a second of a register-only loop on one kind of unit: f32, f64, bf16, int8.");
}
