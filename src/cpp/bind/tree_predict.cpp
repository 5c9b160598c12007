// Forests for Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <utility>
#include <vector>

#include "bind/bind.hpp"
#include "bind/tree.hpp"
#include "tree/predict.hpp"
#include "tree/watch.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

const char* kOp = "forest";

void add(Forest& forest, uintptr_t nodes, int64_t count, int64_t stride, py::handle offsets,
         uintptr_t values, int64_t column, double scale) {
  TreeNodes t;
  int64_t at[6];
  if (read_tuple(kOp, "offsets", offsets, at, 6) != 6)
    bad_argument(kOp, "offsets", "left, right, feature, threshold, missing, category");
  if (!nodes || !values) bad_argument(kOp, "nodes, values", "addresses");
  t.data = reinterpret_cast<const char*>(nodes), t.count = count, t.stride = stride;
  t.left = at[0], t.right = at[1], t.feature = at[2], t.threshold = at[3];
  t.missing = at[4], t.category = at[5];
  for (int i = 0; i < 6; i++)
    if (at[i] < (i < 4 ? 0 : -1) || (at[i] >= 0 && at[i] + (i == 4 ? 1 : 8) > stride))
      bad_argument(kOp, "offsets", "fields inside of a record");
  py::gil_scoped_release release;
  forest.add(t, reinterpret_cast<const double*>(values), column, scale);
}

TreeRows rows_of(const Forest& forest, uintptr_t x, int dtype, py::handle shape, py::handle strides,
                 int missing_bin) {
  TreeRows rows;
  int64_t size[2], step[2];
  rows.type = dtype_argument(kOp, "dtype", dtype);
  if (rows.type != DType::f32 && rows.type != DType::f64 && rows.type != DType::u8)
    bad_argument(kOp, "dtype", "float32, float64 or uint8");
  if (read_tuple(kOp, "shape", shape, size, 2) != 2 || size[0] < 0 || size[1] != forest.features())
    bad_argument(kOp, "shape", "rows of " + std::to_string(forest.features()) + " features");
  if (read_tuple(kOp, "strides", strides, step, 2) != 2)
    bad_argument(kOp, "strides", "two, in elements");
  rows.data = reinterpret_cast<const void*>(x);
  if (!x && size[0]) bad_argument(kOp, "x", "an address");
  rows.rows = size[0], rows.row_stride = step[0], rows.column_stride = step[1];
  rows.missing_bin = missing_bin;
  return rows;
}

unsigned apply(const Forest& forest, uintptr_t x, int dtype, py::handle shape, py::handle strides,
               int missing_bin, uintptr_t out) {
  const TreeRows rows = rows_of(forest, x, dtype, shape, strides, missing_bin);
  if (!out && rows.rows && forest.trees()) bad_argument(kOp, "out", "an address");
  py::gil_scoped_release release;
  return forest.apply(rows, reinterpret_cast<int64_t*>(out));
}

unsigned predict(const Forest& forest, uintptr_t x, int dtype, py::handle shape, py::handle strides,
                 int missing_bin, int64_t first, int64_t last, bool accumulate, double divisor,
                 uintptr_t out) {
  const TreeRows rows = rows_of(forest, x, dtype, shape, strides, missing_bin);
  if (!out && rows.rows) bad_argument(kOp, "out", "an address");
  py::gil_scoped_release release;
  return forest.predict(rows, first, last, accumulate, divisor, reinterpret_cast<double*>(out));
}

}  // namespace

void bind_tree_predict(py::module_& m) {
  py::class_<TreeWatch>(m, "TreeWatch", "Notices that memory was written to.")
      .def(py::init([](const std::vector<std::pair<uintptr_t, int64_t>>& parts) {
             std::vector<TreeWatch::Part> list;
             for (const auto& [data, bytes] : parts) {
               if (bytes < 0 || (bytes && !data))
                 bad_argument("watch", "parts", "addresses and lengths");
               list.push_back({reinterpret_cast<const void*>(data), bytes});
             }
             py::gil_scoped_release release;
             return std::make_unique<TreeWatch>(std::move(list));
           }),
           py::arg("parts"))
      .def("changed", &TreeWatch::changed, "Whether it is otherwise than it was at first.",
           py::call_guard<py::gil_scoped_release>());
  m.attr("SAW_NAN") = kSawNaN;
  m.attr("SAW_INFINITY") = kSawInfinity;
  py::class_<Forest>(m, "Forest", "Trees, flattened for prediction.")
      .def(py::init<int64_t, int64_t, int64_t>(), py::arg("features"), py::arg("outputs"),
           py::arg("columns"))
      .def(
          "set_categories",
          [](Forest& forest, uintptr_t words, int64_t sets) {
            if (sets < 0 || (sets && !words)) bad_argument(kOp, "categories", "an address");
            forest.set_categories(reinterpret_cast<const uint32_t*>(words), sets);
          },
          "Sets of categories from 0 to 255, eight uint32 each; before the first tree.",
          py::arg("words"), py::arg("sets"))
      .def("add", &add,
           "Adds a tree: records of nodes, and where in them left, right, feature (int64), "
           "threshold (float64), missing (uint8) and category (int64) are; the last two may be -1.",
           py::arg("nodes"), py::arg("count"), py::arg("stride"), py::arg("offsets"),
           py::arg("values"), py::arg("column"), py::arg("scale"))
      .def("apply", &apply, "out (trees, rows), int64: the leaves. Returns what was seen in x.",
           py::arg("x"), py::arg("dtype"), py::arg("shape"), py::arg("strides"),
           py::arg("missing_bin"), py::arg("out"))
      .def("predict", &predict,
           "out (rows, columns), float64: sums over a range of the trees. Returns what was seen in "
           "x.",
           py::arg("x"), py::arg("dtype"), py::arg("shape"), py::arg("strides"),
           py::arg("missing_bin"), py::arg("first"), py::arg("last"), py::arg("accumulate"),
           py::arg("divisor"), py::arg("out"))
      .def_property_readonly("trees", &Forest::trees)
      .def_property_readonly("sees_all", &Forest::sees_all)
      .def_property_readonly("bytes", &Forest::bytes);
}
