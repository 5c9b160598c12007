// Sums, for Python.
#include "cuda/bind/bind.hpp"
#include "cuda/reduce/column_sum.hpp"

namespace py = pybind11;
using namespace fastnn;

void bind_reduce(py::module_& m) {
  m.def("column_sum_workspace", &cuda::column_sum_workspace, py::arg("rows"), py::arg("columns"),
        "How many float32 column_sum needs beside its result.");
  m.def(
      "column_sum",
      [](uintptr_t x, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
         int dtype, uintptr_t out, uintptr_t workspace, int device, uintptr_t stream) {
        if (rows < 0 || columns < 0)
          bad_argument("column_sum", "rows, columns", "sizes of 0 or more");
        if ((!x && rows && columns) || (!out && columns))
          bad_argument("column_sum", "x, out", "an address");
        if (!workspace && cuda::column_sum_workspace(rows, columns))
          bad_argument("column_sum", "workspace", "an address");
        const cuda::ColumnSum sum{reinterpret_cast<const void*>(x),
                                  rows,
                                  columns,
                                  row_stride,
                                  column_stride,
                                  reinterpret_cast<void*>(out),
                                  dtype_argument("column_sum", "x", dtype),
                                  reinterpret_cast<float*>(workspace)};
        py::gil_scoped_release release;
        cuda::OnDevice on(device);
        cuda::column_sum(sum, reinterpret_cast<void*>(stream));
      },
      py::arg("x"), py::arg("rows"), py::arg("columns"), py::arg("row_stride"),
      py::arg("column_stride"), py::arg("dtype"), py::arg("out"), py::arg("workspace"),
      py::arg("device"), py::arg("stream"), "out[j] = the sum of x[:, j].");
}
