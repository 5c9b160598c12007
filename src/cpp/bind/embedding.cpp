// Embedding and rotary position embedding for Python.
#include "embedding/embedding.hpp"

#include <pybind11/pybind11.h>

#include "bind/bind.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

DType type_argument(const char* op, const char* name, int code) {
  if (code < 0 || code >= kEmbeddingTypes)
    bad_argument(op, name, "a floating-point type (0 to 3), got " + std::to_string(code));
  return DType(code);
}

Indices indices_argument(const char* op, uintptr_t ptr, int64_t count, bool wide) {
  if (count < 0) bad_argument(op, "count", "0 or more, got " + std::to_string(count));
  if (!ptr && count) bad_argument(op, "indices", "an address");
  return {reinterpret_cast<const void*>(ptr), wide, count};
}

bool gather_call(int dtype, uintptr_t table, int64_t rows, int64_t columns, int64_t row_stride,
                 int64_t column_stride, uintptr_t indices, int64_t count, bool wide,
                 uintptr_t out) {
  const char* op = "embedding";
  const DType type = type_argument(op, "dtype", dtype);
  if (rows < 0 || columns < 0) bad_argument(op, "rows, columns", "sizes of 0 or more");
  const Indices all = indices_argument(op, indices, count, wide);
  if ((!table || !out) && rows && columns && count) bad_argument(op, "table, out", "addresses");
  py::gil_scoped_release release;
  return gather({type, reinterpret_cast<const void*>(table), rows, columns, row_stride,
                 column_stride, all, reinterpret_cast<void*>(out)});
}

bool scatter_call(int dtype, uintptr_t grad, int64_t grad_stride, uintptr_t indices, int64_t count,
                  bool wide, int64_t rows, int64_t columns, int64_t padding, bool by_frequency,
                  uintptr_t out) {
  const char* op = "embedding_backward";
  const DType type = type_argument(op, "dtype", dtype);
  if (rows < 0 || columns < 0 || rows > int64_t(UINT32_MAX) || count > int64_t(UINT32_MAX))
    bad_argument(op, "rows, columns, count", "sizes from 0 to 2^32 - 1");
  const Indices all = indices_argument(op, indices, count, wide);
  if ((!grad && columns && count) || (!out && rows && columns))
    bad_argument(op, "grad, out", "addresses");
  py::gil_scoped_release release;
  return scatter_add({type, reinterpret_cast<const void*>(grad), grad_stride, all, rows, columns,
                      padding, by_frequency, reinterpret_cast<void*>(out)});
}

// (address, strides) each.
void rotary_call(int dtype, int table_dtype, py::handle shape, py::tuple x, py::tuple out,
                 py::tuple cos, py::tuple sin, bool paired, bool interleaved, bool transposed) {
  const char* op = "rotary";
  Rotary call;
  call.type = type_argument(op, "dtype", dtype);
  call.table_type = type_argument(op, "table_dtype", table_dtype);
  if (call.table_type != call.type && (call.table_type != DType::f32 || call.type == DType::f64))
    bad_argument(op, "table_dtype", "dtype, or float32 beside one of 16 bits");
  int64_t size[kMaxRotaryDims], strides[4][kMaxRotaryDims];
  call.dims = read_tuple(op, "shape", shape, size, kMaxRotaryDims);
  call.shape = size;
  if (call.dims < 1) bad_argument(op, "shape", "one dimension or more");
  bool empty = false;
  for (int d = 0; d < call.dims; d++) {
    if (size[d] < 0) bad_argument(op, "shape", "sizes of 0 or more");
    empty |= size[d] == 0;
  }
  if (size[call.dims - 1] % 2) bad_argument(op, "shape", "an even size of the last dimension");
  void* address[4];
  const char* names[4] = {"x", "out", "cos", "sin"};
  const py::tuple given[4] = {x, out, cos, sin};
  for (int i = 0; i < 4; i++) {
    if (given[i].size() != 2 ||
        read_tuple(op, names[i], given[i][1], strides[i], kMaxRotaryDims) != call.dims)
      bad_argument(op, names[i], "an address and as many strides as dimensions");
    address[i] = reinterpret_cast<void*>(given[i][0].cast<uintptr_t>());
    if (!address[i] && !empty) bad_argument(op, names[i], "an address");
  }
  call.x = address[0], call.x_strides = strides[0];
  call.out = address[1], call.out_strides = strides[1];
  call.cos = address[2], call.cos_strides = strides[2];
  call.sin = address[3], call.sin_strides = strides[3];
  call.paired = paired, call.interleaved = interleaved, call.transposed = transposed;
  py::gil_scoped_release release;
  rotary(call);
}

}  // namespace

void bind_embedding(py::module_& m) {
  m.def("embedding", &gather_call,
        "Row i of out is row indices[i] of the table; False, and nothing done, where there is no "
        "such row.",
        py::arg("dtype"), py::arg("table"), py::arg("rows"), py::arg("columns"),
        py::arg("row_stride"), py::arg("column_stride"), py::arg("indices"), py::arg("count"),
        py::arg("wide"), py::arg("out"));
  m.def("embedding_backward", &scatter_call,
        "Row r of out is the sum of the rows of grad whose index is r, in order; False, and "
        "nothing done, where there is no such row.",
        py::arg("dtype"), py::arg("grad"), py::arg("grad_stride"), py::arg("indices"),
        py::arg("count"), py::arg("wide"), py::arg("rows"), py::arg("columns"), py::arg("padding"),
        py::arg("by_frequency"), py::arg("out"));
  m.def("rotary", &rotary_call,
        "Turns the pairs of the last dimension, which has stride 1; tensors are (address, "
        "strides).",
        py::arg("dtype"), py::arg("table_dtype"), py::arg("shape"), py::arg("x"), py::arg("out"),
        py::arg("cos"), py::arg("sin"), py::arg("paired"), py::arg("interleaved"),
        py::arg("transposed"));
}
