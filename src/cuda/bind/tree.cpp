// The search of splits among bins, for Python.
#include "cuda/bind/bind.hpp"
#include "cuda/tree/split_search.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

template <class T>
T* address(const char* op, const char* name, uintptr_t p) {
  if (!p) bad_argument(op, name, "an address");
  return reinterpret_cast<T*>(p);
}

void check_sizes(const char* op, int64_t rows, int64_t columns, int slots) {
  if (rows < 1 || rows >= INT32_MAX) bad_argument(op, "rows", "1 to 2^31 - 2");
  // Groups of columns are a dimension of grids.
  if (columns < 1 || columns > 65535 * int64_t(cuda::kGroup))
    bad_argument(op, "columns", "1 to 2097120, got " + std::to_string(columns));
  if (slots < 2 || slots > cuda::kMostSlots)
    bad_argument(op, "slots", "2 to 256, got " + std::to_string(slots));
}

cuda::SplitSearch sizes_argument(const char* op, int64_t rows, int64_t columns, int slots,
                                 int classes, bool weighted, int roots, int levels) {
  check_sizes(op, rows, columns, slots);
  if (classes < 1 || classes > cuda::kMostClasses)
    bad_argument(op, "classes", "1 to 64, got " + std::to_string(classes));
  if (levels < 1 || roots < 1 || levels > 16 ||
      int64_t(roots) << (levels - 1) > cuda::kMostTreeNodes)
    bad_argument(op, "roots, levels",
                 "at most " + std::to_string(cuda::kMostTreeNodes) + " nodes on the last level");
  cuda::SplitSearch s{};
  s.rows = rows, s.columns = columns, s.slots = slots;
  s.classes = classes, s.words = classes + weighted;
  s.roots = roots, s.levels = levels;
  return s;
}

}  // namespace

void bind_tree(py::module_& m) {
  m.attr("tree_most_nodes") = cuda::kMostTreeNodes;
  m.attr("tree_most_classes") = cuda::kMostClasses;
  m.def(
      "tree_bin_rows",
      [](uintptr_t x, int64_t rows, int64_t columns, int64_t row_step, int64_t column_step,
         int slots, uintptr_t edges, uintptr_t counts, uintptr_t bins, uintptr_t least,
         uintptr_t largest, int device, uintptr_t stream) {
        const char* op = "tree_bin_rows";
        check_sizes(op, rows, columns, slots);
        const cuda::BinRows call{address<const float>(op, "x", x),
                                 rows,
                                 columns,
                                 row_step,
                                 column_step,
                                 slots,
                                 address<const float>(op, "edges", edges),
                                 address<const int32_t>(op, "counts", counts),
                                 address<uint8_t>(op, "bins", bins),
                                 address<uint32_t>(op, "least", least),
                                 address<uint32_t>(op, "largest", largest)};
        py::gil_scoped_release release;
        cuda::OnDevice on(device);
        cuda::bin_rows(call, reinterpret_cast<void*>(stream));
      },
      py::arg("x"), py::arg("rows"), py::arg("columns"), py::arg("row_step"),
      py::arg("column_step"), py::arg("slots"), py::arg("edges"), py::arg("counts"),
      py::arg("bins"), py::arg("least"), py::arg("largest"), py::arg("device"), py::arg("stream"),
      "Values to bins, rows x 32 ceil(columns / 32), and the range of the values in each.");
  m.def(
      "tree_split_search_workspace",
      [](int64_t rows, int64_t columns, int slots, int classes, bool weighted, int roots,
         int levels) {
        return cuda::split_search_workspace(sizes_argument(
            "tree_split_search_workspace", rows, columns, slots, classes, weighted, roots, levels));
      },
      py::arg("rows"), py::arg("columns"), py::arg("slots"), py::arg("classes"),
      py::arg("weighted"), py::arg("roots"), py::arg("levels"),
      "How many bytes tree_split_search needs beside its results.");
  m.def(
      "tree_split_search",
      [](int64_t rows, int64_t columns, int slots, int classes, bool weighted, int roots,
         int levels, int64_t min_split, int64_t min_leaf, double min_weight, uintptr_t bins,
         uintptr_t order, uintptr_t spare, uintptr_t nodes, uintptr_t weights, uintptr_t candidates,
         uintptr_t workspace, int device, uintptr_t stream) {
        const char* op = "tree_split_search";
        auto s = sizes_argument(op, rows, columns, slots, classes, weighted, roots, levels);
        if (min_leaf < 1) bad_argument(op, "min_leaf", "1 or more");
        s.min_split = min_split, s.min_leaf = min_leaf, s.min_weight = min_weight;
        s.bins = address<const uint8_t>(op, "bins", bins);
        s.order = address<cuda::WeighedRow>(op, "order", order);
        s.spare = address<cuda::WeighedRow>(op, "spare", spare);
        s.nodes = address<AheadNode>(op, "nodes", nodes);
        s.weights = address<int32_t>(op, "weights", weights);
        s.candidates = address<AheadCandidate>(op, "candidates", candidates);
        s.workspace = address<void>(op, "workspace", workspace);
        py::gil_scoped_release release;
        cuda::OnDevice on(device);
        cuda::split_search(s, reinterpret_cast<void*>(stream));
      },
      py::arg("rows"), py::arg("columns"), py::arg("slots"), py::arg("classes"),
      py::arg("weighted"), py::arg("roots"), py::arg("levels"), py::arg("min_split"),
      py::arg("min_leaf"), py::arg("min_weight"), py::arg("bins"), py::arg("order"),
      py::arg("spare"), py::arg("nodes"), py::arg("weights"), py::arg("candidates"),
      py::arg("workspace"), py::arg("device"), py::arg("stream"),
      "Some levels of trees, from roots whose rows lie in `order`; see tree/ahead_nodes.hpp.");
}
