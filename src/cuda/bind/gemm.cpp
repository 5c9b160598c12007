// GEMM for Python: checks that make a crash impossible for consistent pointers, and no more; what a
// tensor is, and which exception torch would raise, is decided in python/fastnn/ops.
#include "cuda/gemm/gemm.hpp"
#include "cuda/gemm/hopper.hpp"

#include "cuda/bind/bind.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

constexpr int kMaxDims = cuda::kMaxBatchDims + 2;

struct View {
  cuda::Operand operand;
  int64_t shape[kMaxDims];
  int dims;
};

View view(const char* name, uintptr_t ptr, py::handle shape, py::handle strides) {
  View v{};
  int64_t st[kMaxDims];
  v.dims = read_tuple("gemm", name, shape, v.shape, kMaxDims);
  if (v.dims < 2) bad_argument("gemm", name, "at least 2 dimensions");
  if (read_tuple("gemm", name, strides, st, kMaxDims) != v.dims)
    bad_argument("gemm", name, "as many strides as dimensions");
  v.operand.data = reinterpret_cast<const void*>(ptr);
  v.operand.row = st[v.dims - 2], v.operand.column = st[v.dims - 1];
  bool empty = false;
  for (int d = 0; d < v.dims; d++) {
    if (v.shape[d] < 0) bad_argument("gemm", name, "sizes of 0 or more");
    empty |= v.shape[d] == 0;
    if (d < v.dims - 2) v.operand.batch[d] = st[d];
  }
  if (!ptr && !empty) bad_argument("gemm", name, "an address");
  return v;
}

DType operand_type(const char* name, int code) {
  return is_float8(DType(code)) ? DType(code) : dtype_argument("gemm", name, code);
}

bool is_float(DType t) { return t == DType::f32 || t == DType::bf16 || t == DType::f16; }

void gemm_call(uintptr_t a_ptr, py::handle a_shape, py::handle a_strides, int a_dtype,
               uintptr_t b_ptr, py::handle b_shape, py::handle b_strides, int b_dtype,
               uintptr_t c_ptr, py::handle c_shape, py::handle c_strides, int c_dtype,
               int precision, double alpha, double beta, uintptr_t residual_ptr,
               py::handle residual_strides, uintptr_t bias_ptr, int bias_axis, int64_t bias_stride,
               int bias_dtype, int activation, uintptr_t row_scale_ptr, uintptr_t col_scale_ptr,
               int row_scale_step, int col_scale_step, bool fast_sums, uintptr_t workspace_ptr,
               int64_t workspace_bytes, bool batch_invariant, int device, uintptr_t stream) {
  cuda::Gemm g;
  const View c = view("c", c_ptr, c_shape, c_strides), a = view("a", a_ptr, a_shape, a_strides),
             b = view("b", b_ptr, b_shape, b_strides);
  g.m = c.shape[c.dims - 2], g.n = c.shape[c.dims - 1], g.k = a.shape[a.dims - 1];
  g.batch_dims = c.dims - 2;
  bool fits = a.dims == c.dims && b.dims == c.dims && a.shape[a.dims - 2] == g.m &&
              b.shape[b.dims - 2] == g.k && b.shape[b.dims - 1] == g.n;
  for (int d = 0; fits && d < g.batch_dims; d++) {
    g.batch[d] = c.shape[d];
    fits = a.shape[d] == c.shape[d] && b.shape[d] == c.shape[d];
  }
  if (!fits) bad_argument("gemm", "a, b, c", "(..., M, K), (..., K, N) and (..., M, N)");
  g.a = a.operand, g.b = b.operand, g.c = c.operand;
  g.a_type = operand_type("a", a_dtype), g.b_type = operand_type("b", b_dtype);
  g.out = dtype_argument("gemm", "c", c_dtype);
  const bool floats = is_float(g.a_type);
  if (floats ? g.b_type != g.a_type || (g.out != g.a_type && g.out != DType::f32)
      : is_float8(g.a_type)
          ? !is_float8(g.b_type) || !is_float(g.out)
          : (g.a_type != DType::s8 && g.a_type != DType::u8) || g.b_type != DType::s8 ||
                (g.out != DType::s32 && !is_float(g.out)))
    bad_argument("gemm", "dtypes",
                 std::string("one floating-point type, int8/uint8 times int8, or floats of eight "
                             "bits, got ") +
                     operand_name(g.a_type) + " times " + operand_name(g.b_type) + " to " +
                     dtype_name(g.out));
  if (precision < 0 || precision > 2) bad_argument("gemm", "precision", "0 to 2");
  g.parts = 3 - precision;
  g.alpha = float(alpha), g.beta = float(beta);
  if (residual_ptr && beta != 0) {
    int64_t st[kMaxDims];
    if (read_tuple("gemm", "residual_strides", residual_strides, st, kMaxDims) != c.dims)
      bad_argument("gemm", "residual_strides", "as many as c has dimensions");
    g.residual.data = reinterpret_cast<const void*>(residual_ptr);
    g.residual.row = st[c.dims - 2], g.residual.column = st[c.dims - 1];
    for (int d = 0; d < g.batch_dims; d++) g.residual.batch[d] = st[d];
  }
  if (bias_ptr) {
    if (bias_axis != 1 && bias_axis != 2) bad_argument("gemm", "bias_axis", "1 or 2");
    g.bias = reinterpret_cast<const void*>(bias_ptr);
    g.bias_axis = cuda::BiasAxis(bias_axis), g.bias_stride = bias_stride;
    g.bias_type = floats ? g.a_type : dtype_argument("gemm", "bias", bias_dtype);
    if (!is_float(g.bias_type)) bad_argument("gemm", "bias_dtype", "float32, bfloat16 or float16");
  }
  if (activation < 0 || activation >= kActivations)
    bad_argument("gemm", "activation", "0 to 7, got " + std::to_string(activation));
  g.activation = activation;
  g.row_scale = reinterpret_cast<const float*>(row_scale_ptr);
  g.col_scale = reinterpret_cast<const float*>(col_scale_ptr);
  if (floats && (g.row_scale || g.col_scale))
    bad_argument("gemm", "row_scale, col_scale", "8-bit operands");
  if (row_scale_step < 0 || row_scale_step > 1 || col_scale_step < 0 || col_scale_step > 1)
    bad_argument("gemm", "row_scale_step, col_scale_step", "0 or 1");
  g.row_scale_step = row_scale_step, g.col_scale_step = col_scale_step;
  g.fast_sums = fast_sums;
  g.workspace = reinterpret_cast<void*>(workspace_ptr);
  g.workspace_bytes = workspace_ptr ? workspace_bytes : 0;
  g.batch_invariant = batch_invariant;
  py::gil_scoped_release release;
  cuda::OnDevice on(device);
  cuda::gemm(g, reinterpret_cast<void*>(stream));
}

int64_t gemm_workspace(py::handle c_shape, int64_t k, int a_dtype, int precision,
                       bool batch_invariant, int device) {
  int64_t shape[kMaxDims];
  const int dims = read_tuple("gemm_workspace", "c_shape", c_shape, shape, kMaxDims);
  if (dims < 2) bad_argument("gemm_workspace", "c_shape", "at least 2 dimensions");
  if (precision < 0 || precision > 2) bad_argument("gemm_workspace", "precision", "0 to 2");
  int64_t batches = 1;
  for (int d = 0; d < dims - 2; d++) batches *= shape[d];
  cuda::OnDevice on(device);
  return cuda::gemm_workspace(operand_type("a", a_dtype), 3 - precision, batches, shape[dims - 2],
                              shape[dims - 1], k, batch_invariant);
}

}  // namespace

void bind_gemm(py::module_& m) {
  m.def(
      "gemm", &gemm_call, py::arg("a_ptr"), py::arg("a_shape"), py::arg("a_strides"),
      py::arg("a_dtype"), py::arg("b_ptr"), py::arg("b_shape"), py::arg("b_strides"),
      py::arg("b_dtype"), py::arg("c_ptr"), py::arg("c_shape"), py::arg("c_strides"),
      py::arg("c_dtype"), py::kw_only(), py::arg("precision") = 0, py::arg("alpha") = 1.0,
      py::arg("beta") = 0.0, py::arg("residual_ptr") = 0, py::arg("residual_strides") = py::none(),
      py::arg("bias_ptr") = 0, py::arg("bias_axis") = 2, py::arg("bias_stride") = 1,
      py::arg("bias_dtype") = 0, py::arg("activation") = 0, py::arg("row_scale_ptr") = 0,
      py::arg("col_scale_ptr") = 0, py::arg("row_scale_step") = 1, py::arg("col_scale_step") = 1,
      py::arg("fast_sums") = false, py::arg("workspace_ptr") = 0, py::arg("workspace_bytes") = 0,
      py::arg("batch_invariant") = false, py::arg("device") = 0, py::arg("stream") = 0,
      "C = activation(alpha * scales * (A B) + bias + beta * residual), on `device` and `stream`.");
  m.def("gemms_on_hopper", &cuda::gemms_on_hopper,
        "How many products the kernels of sm_90a computed.");
  m.def("gemm_workspace", &gemm_workspace, py::arg("c_shape"), py::arg("k"), py::arg("a_dtype"),
        py::kw_only(), py::arg("precision") = 0, py::arg("batch_invariant") = false,
        py::arg("device") = 0, "Bytes of scratch memory that gemm is faster with.");
}
