// The exact search of splits for Python: presorted columns, trees, the best split of each column.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>

#include "bind/bind.hpp"
#include "bind/tree.hpp"
#include "common/parallel.hpp"
#include "tree/ahead.hpp"
#include "tree/bootstrap.hpp"
#include "tree/exact.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

template <class T>
T* address(const char* op, const char* name, uintptr_t p, bool null_allowed = false) {
  if (!p && !null_allowed) bad_argument(op, name, "an address");
  return reinterpret_cast<T*>(p);
}

int threads_argument(int threads) { return threads > 0 ? threads : max_threads(); }

// (criterion, outputs, classes, most_classes, y, weights)
TreeTarget target_argument(const char* op, const py::tuple& given, int64_t rows) {
  if (given.size() != 6) bad_argument(op, "target", "six entries");
  const int criterion = given[0].cast<int>();
  if (criterion < 0 || criterion > int(TreeCriterion::absolute_error))
    bad_argument(op, "criterion", "a code from 0 to 4, got " + std::to_string(criterion));
  TreeTarget t{TreeCriterion(criterion), given[1].cast<int64_t>(), nullptr, nullptr, nullptr,
               given[3].cast<int64_t>()};
  if (t.outputs < 1) bad_argument(op, "outputs", "1 or more");
  if (t.most_classes < 1) bad_argument(op, "most_classes", "1 or more");
  t.classes = address<int64_t>(op, "classes", given[2].cast<uintptr_t>(), !t.classification());
  t.y = address<double>(op, "y", given[4].cast<uintptr_t>());
  t.weights = address<double>(op, "weights", given[5].cast<uintptr_t>(), true);
  if (t.classification()) {
    for (int64_t k = 0; k < t.outputs; k++)
      if (t.classes[k] < 1 || t.classes[k] > t.most_classes)
        bad_argument(op, "classes", "from 1 to most_classes");
    bool good = true;
    for (int64_t i = 0; i < rows; i++)
      for (int64_t k = 0; k < t.outputs; k++) {
        const double y = t.y[i * t.outputs + k];
        good = good & (y >= 0) & (y < double(t.classes[k]));
      }
    if (!good) bad_argument(op, "y", "codes of classes");
  }
  if (!fits_exact(t, rows)) bad_argument(op, "rows", "rows times classes below 2^32");
  return t;
}

std::unique_ptr<Presort> presort(uintptr_t x, int64_t rows, int64_t columns, int64_t row_stride,
                                 int64_t column_stride, int threads) {
  if (rows < 0 || columns < 0) bad_argument("tree_presort", "shape", "sizes of 0 or more");
  if (rows > INT32_MAX) bad_argument("tree_presort", "rows", "less than 2^31");
  const FloatMatrix m{address<float>("tree_presort", "x", x, rows * columns == 0), rows, columns,
                      row_stride, column_stride};
  py::gil_scoped_release release;
  return std::make_unique<Presort>(m, threads_argument(threads));
}

std::unique_ptr<ValueColumns> value_columns(uintptr_t x, int64_t rows, int64_t columns,
                                            int64_t row_stride, int64_t column_stride,
                                            int threads) {
  const char* op = "tree_columns";
  if (rows < 1 || columns < 1) bad_argument(op, "shape", "rows and columns");
  if (rows > INT32_MAX) bad_argument(op, "rows", "less than 2^31");
  const FloatMatrix m{address<float>(op, "x", x), rows, columns, row_stride, column_stride};
  py::gil_scoped_release release;
  return std::make_unique<ValueColumns>(m, threads_argument(threads));
}

// Bins of one byte, which the caller keeps alive, and the values that they are of.
std::unique_ptr<BinnedColumns> binned(uintptr_t x, int64_t rows, int64_t columns,
                                      int64_t row_stride, int64_t column_stride, uintptr_t bins,
                                      int64_t step, int threads) {
  const char* op = "tree_binned";
  if (rows < 1 || columns < 1) bad_argument(op, "shape", "rows and columns");
  if (rows > INT32_MAX) bad_argument(op, "rows", "less than 2^31");
  if (step < rows) bad_argument(op, "step", "rows or more");
  const FloatMatrix m{address<float>(op, "x", x), rows, columns, row_stride, column_stride};
  const auto* b = address<uint8_t>(op, "bins", bins);
  py::gil_scoped_release release;
  return std::make_unique<BinnedColumns>(m, b, step, threads_argument(threads));
}

ExactSettings settings_argument(const char* op, const py::tuple& settings) {
  if (settings.size() != 10) bad_argument(op, "settings", "ten entries");
  ExactSettings s;
  s.max_features = settings[0].cast<int64_t>();
  s.max_depth = settings[1].cast<int64_t>();
  s.min_samples_split = settings[2].cast<int64_t>();
  s.min_samples_leaf = settings[3].cast<int64_t>();
  s.max_leaf_nodes = settings[4].cast<int64_t>();
  s.min_weight_leaf = settings[5].cast<double>();
  s.min_impurity_decrease = settings[6].cast<double>();
  s.monotonic = address<int8_t>(op, "monotonic", settings[7].cast<uintptr_t>(), true);
  s.seed = settings[8].cast<uint32_t>();
  s.threads = threads_argument(settings[9].cast<int>());
  if (s.min_samples_leaf < 1) bad_argument(op, "min_samples_leaf", "1 or more");
  return s;
}

template <class Columns,
          ExactTree (*kGrow)(const Columns&, const TreeTarget&, const ExactSettings&)>
std::unique_ptr<ExactTree> grow(const Columns& columns, const py::tuple& given,
                                const py::tuple& settings) {
  const char* op = "tree_grow";
  const TreeTarget target = target_argument(op, given, columns.rows);
  if (columns.rows < 1 || columns.columns < 1) bad_argument(op, "x", "rows and columns");
  const ExactSettings s = settings_argument(op, settings);
  py::gil_scoped_release release;
  return std::make_unique<ExactTree>(kGrow(columns, target, s));
}

// The search of a GPU's backend: takes and returns bytes.
class PythonSearch final : public AheadSearch {
 public:
  PythonSearch(py::object search, int64_t columns, int64_t words)
      : search_(std::move(search)), columns_(columns), words_(words) {}

  AheadResult search(const std::vector<AheadNode>& roots, const std::vector<int32_t>& weights,
                     int levels, int64_t rows) override {
    py::gil_scoped_acquire acquire;
    const auto found = search_(bytes_of(roots), bytes_of(weights), levels, rows).cast<py::tuple>();
    if (found.size() != 3) bad_argument("tree_grow_ahead", "search", "three results");
    const auto count = int64_t(roots.size());
    AheadResult result;
    read(found[0], ahead_nodes(count, levels + 1), result.nodes);
    read(found[1], ahead_nodes(count, levels + 1) * words_, result.weights);
    read(found[2], ahead_nodes(count, levels) * columns_, result.candidates);
    return result;
  }

 private:
  template <class T>
  static py::bytes bytes_of(const std::vector<T>& v) {
    return {reinterpret_cast<const char*>(v.data()), v.size() * sizeof(T)};
  }
  template <class T>
  static void read(py::handle from, int64_t count, std::vector<T>& to) {
    const auto info = py::reinterpret_borrow<py::buffer>(from).request();
    if (info.size * info.itemsize != count * int64_t(sizeof(T)))
      bad_argument("tree_grow_ahead", "search",
                   "results of " + std::to_string(count * int64_t(sizeof(T))) + " bytes, got " +
                       std::to_string(info.size * info.itemsize));
    to.resize(size_t(count));
    std::memcpy(to.data(), info.ptr, to.size() * sizeof(T));
  }

  py::object search_;
  const int64_t columns_, words_;
};

AheadColumns ahead_columns(int64_t rows, int64_t columns, int slots, uintptr_t least,
                           uintptr_t largest, int most_nodes) {
  const char* op = "tree_ahead_columns";
  if (rows < 1 || columns < 1) bad_argument(op, "shape", "rows and columns");
  if (rows > INT32_MAX) bad_argument(op, "rows", "less than 2^31");
  if (slots < 2 || slots > kBinSlots) bad_argument(op, "slots", "2 to 256");
  if (most_nodes < 1) bad_argument(op, "most_nodes", "1 or more");
  return {rows,
          columns,
          slots,
          address<float>(op, "least", least),
          address<float>(op, "largest", largest),
          most_nodes};
}

std::unique_ptr<ExactTree> grow_by(const AheadColumns& columns, const py::tuple& given,
                                   const py::tuple& settings, py::object search) {
  const char* op = "tree_grow_ahead";
  const TreeTarget target = target_argument(op, given, columns.rows);
  const ExactSettings s = settings_argument(op, settings);
  if (target.criterion != TreeCriterion::gini || target.outputs != 1 || s.monotonic)
    bad_argument(op, "target", "one output by Gini impurity, without monotonic constraints");
  PythonSearch by(std::move(search), columns.columns,
                  target.classes[0] + (target.weights != nullptr));
  py::gil_scoped_release release;
  return std::make_unique<ExactTree>(grow_ahead(columns, by, target, s));
}

// Nodes of 64 bytes each, and values, to where there is room for them.
void copy_tree(const ExactTree& tree, uintptr_t nodes, uintptr_t values) {
  std::memcpy(address<void>("copy_to", "nodes", nodes), tree.nodes.data(),
              tree.nodes.size() * sizeof(TreeNode));
  std::memcpy(address<void>("copy_to", "values", values), tree.values.data(),
              tree.values.size() * sizeof(double));
}

// The impurity of all rows, and of each column a tuple: threshold, impurity after the split,
// improvement, rows that go left (0: no split), whether NaN goes left.
py::tuple splits(const Presort& sorted, const py::tuple& given, int threads) {
  const TreeTarget target = target_argument("tree_best_splits", given, sorted.rows);
  BestSplits found;
  {
    py::gil_scoped_release release;
    found = best_splits(sorted, target, threads_argument(threads));
  }
  py::list columns;
  for (const ColumnSplit& s : found.columns)
    columns.append(
        py::make_tuple(s.threshold, s.impurity, s.improvement, s.left, s.missing_go_left));
  return py::make_tuple(found.impurity, columns);
}

int64_t draw(uint32_t seed, int64_t below) {
  if (below < 2 || below > int64_t(1) << 32) bad_argument("tree_first_draw", "below", "2 to 2^32");
  return first_draw(seed, below);
}

void counts(uint32_t seed, int64_t rows, int64_t draws, uintptr_t out) {
  if (rows < 1 || rows >= int64_t(1) << 32) bad_argument("tree_bootstrap", "rows", "1 to 2^32 - 1");
  if (draws < 0) bad_argument("tree_bootstrap", "draws", "0 or more");
  auto* to = address<double>("tree_bootstrap", "out", out);
  py::gil_scoped_release release;
  bootstrap_counts(seed, rows, draws, to);
}

}  // namespace

void bind_tree_exact(py::module_& m) {
  py::class_<Presort>(m, "TreePresort", py::module_local(),
                      "Columns of float32, each sorted once, with their rows.")
      .def(py::init(&presort), py::arg("x"), py::arg("rows"), py::arg("columns"),
           py::arg("row_stride"), py::arg("column_stride"), py::arg("threads") = 0)
      .def_readonly("rows", &Presort::rows)
      .def_readonly("columns", &Presort::columns)
      .def_readonly("missing", &Presort::missing)
      .def("copy_to", [](const Presort& p, uintptr_t values, uintptr_t order) {
        const size_t bytes = size_t(p.rows * p.columns) * 4;
        std::memcpy(address<void>("copy_to", "values", values), p.values, bytes);
        std::memcpy(address<void>("copy_to", "order", order), p.order, bytes);
      });
  py::class_<ValueColumns>(m, "TreeColumns", py::module_local(),
                           "Columns of float32, each in one piece.")
      .def(py::init(&value_columns), py::arg("x"), py::arg("rows"), py::arg("columns"),
           py::arg("row_stride"), py::arg("column_stride"), py::arg("threads") = 0);
  py::class_<BinnedColumns>(m, "TreeBins", py::module_local(),
                            "Columns of bins of one byte, with the values that fell into them.")
      .def(py::init(&binned), py::arg("x"), py::arg("rows"), py::arg("columns"),
           py::arg("row_stride"), py::arg("column_stride"), py::arg("bins"), py::arg("step"),
           py::arg("threads") = 0);
  py::class_<ExactTree>(m, "ExactTree", py::module_local(),
                        "A grown tree: nodes in scikit-learn's layout, and values.")
      .def_property_readonly("count", [](const ExactTree& t) { return t.nodes.size(); })
      .def_readonly("max_depth", &ExactTree::max_depth)
      .def("copy_to", &copy_tree);
  m.def("tree_grow_exact", &grow<Presort, grow_exact>, py::arg("presort"), py::arg("target"),
        py::arg("settings"));
  m.def("tree_grow_random", &grow<ValueColumns, grow_random>, py::arg("columns"), py::arg("target"),
        py::arg("settings"));
  m.def("tree_grow_binned", &grow<BinnedColumns, grow_binned>, py::arg("bins"), py::arg("target"),
        py::arg("settings"));
  py::class_<AheadColumns>(m, "TreeAheadColumns", py::module_local(),
                           "Columns of bins on a GPU: the ranges of the values in each.")
      .def(py::init(&ahead_columns), py::arg("rows"), py::arg("columns"), py::arg("slots"),
           py::arg("least"), py::arg("largest"), py::arg("most_nodes"))
      .def_property_readonly("close", &AheadColumns::close);
  m.attr("tree_ahead_sizes") =
      py::make_tuple(sizeof(AheadNode), sizeof(int32_t), sizeof(AheadCandidate));
  m.def("tree_grow_ahead", &grow_by, py::arg("columns"), py::arg("target"), py::arg("settings"),
        py::arg("search"));
  m.def("tree_first_draw", &draw, py::arg("seed"), py::arg("below"));
  m.def("tree_bootstrap", &counts, py::arg("seed"), py::arg("rows"), py::arg("draws"),
        py::arg("out"));
  m.def("tree_best_splits", &splits, py::arg("presort"), py::arg("target"), py::arg("threads") = 0);
}
