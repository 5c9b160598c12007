// Embedding, for Python.
#include "cuda/embedding/embedding.hpp"

#include "cuda/bind/bind.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

DType float_argument(const char* op, int code) {
  const DType type = dtype_argument(op, "dtype", code);
  if (type != DType::f32 && type != DType::bf16 && type != DType::f16)
    bad_argument(op, "dtype", std::string("float32, bfloat16 or float16, got ") + dtype_name(type));
  return type;
}
cuda::Indices indices_argument(const char* op, uintptr_t indices, int64_t count, bool wide) {
  if (count < 0 || count > UINT32_MAX)
    bad_argument(op, "count", "0 to 2^32 - 1, got " + std::to_string(count));
  if (count && !indices) bad_argument(op, "indices", "an address");
  return {reinterpret_cast<const void*>(indices), wide, count};
}

}  // namespace

void bind_embedding(py::module_& m) {
  m.def(
      "embedding",
      [](int dtype, uintptr_t table, int64_t rows, int64_t columns, int64_t row_stride,
         int64_t column_stride, uintptr_t indices, int64_t count, bool wide, uintptr_t out,
         int device, uintptr_t stream) {
        const char* op = "embedding";
        cuda::Gather call;
        call.type = float_argument(op, dtype);
        call.indices = indices_argument(op, indices, count, wide);
        if (rows < 0 || columns < 0) bad_argument(op, "rows, columns", "sizes of 0 or more");
        if (count && columns && (!out || (rows && !table)))
          bad_argument(op, "table, out", "addresses");
        call.table = reinterpret_cast<const void*>(table), call.rows = rows;
        call.columns = columns, call.row_stride = row_stride, call.column_stride = column_stride;
        call.out = reinterpret_cast<void*>(out);
        py::gil_scoped_release release;
        cuda::OnDevice on(device);
        cuda::gather(call, reinterpret_cast<void*>(stream));
      },
      py::arg("dtype"), py::arg("table"), py::arg("rows"), py::arg("columns"),
      py::arg("row_stride"), py::arg("column_stride"), py::arg("indices"), py::arg("count"),
      py::arg("wide"), py::arg("out"), py::arg("device"), py::arg("stream"),
      "out[i] = table[indices[i]]; int64 indices where `wide`, else int32.");
  m.def("embedding_workspace", &cuda::scatter_add_workspace, py::arg("count"), py::arg("columns"),
        "The bytes that embedding_backward wants.");
  m.def(
      "embedding_backward",
      [](int dtype, uintptr_t grad, int64_t grad_stride, int64_t grad_step, uintptr_t indices,
         int64_t count, bool wide, int64_t rows, int64_t columns, int64_t padding,
         bool by_frequency, uintptr_t out, uintptr_t workspace, int device, uintptr_t stream) {
        const char* op = "embedding_backward";
        cuda::ScatterAdd call;
        call.type = float_argument(op, dtype);
        call.indices = indices_argument(op, indices, count, wide);
        if (rows < 0 || rows > UINT32_MAX || columns < 0)
          bad_argument(op, "rows, columns", "at most 2^32 - 1 rows, and sizes of 0 or more");
        if (rows && columns && (!out || (count && (!grad || !workspace || workspace % 16))))
          bad_argument(op, "grad, out, workspace", "addresses, that of workspace a multiple of 16");
        call.grad = reinterpret_cast<const void*>(grad);
        call.grad_stride = grad_stride, call.grad_step = grad_step;
        call.rows = rows, call.columns = columns, call.padding = padding;
        call.by_frequency = by_frequency, call.out = reinterpret_cast<void*>(out);
        call.workspace = reinterpret_cast<void*>(workspace);
        py::gil_scoped_release release;
        cuda::OnDevice on(device);
        cuda::scatter_add(call, reinterpret_cast<void*>(stream));
      },
      py::arg("dtype"), py::arg("grad"), py::arg("grad_stride"), py::arg("grad_step"),
      py::arg("indices"), py::arg("count"), py::arg("wide"), py::arg("rows"), py::arg("columns"),
      py::arg("padding"), py::arg("by_frequency"), py::arg("out"), py::arg("workspace"),
      py::arg("device"), py::arg("stream"),
      "out[r] = the sum, or with by_frequency the mean, of grad[i] where indices[i] is r; zeros "
      "for the row `padding`.");
}
