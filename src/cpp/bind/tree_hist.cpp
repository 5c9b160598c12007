// Binning, histograms and trees grown on them, for Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>

#include "bind/bind.hpp"
#include "bind/tree.hpp"
#include "tree/binning.hpp"
#include "tree/grow.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

template <class T>
T* address(uintptr_t p) {
  return reinterpret_cast<T*>(p);
}

// (address, float32?, rows, columns, row step, column step), steps in elements
BinValues values_of(const char* op, const py::tuple& x) {
  if (x.size() != 6) bad_argument(op, "x", "an address, a type, two sizes and two steps");
  const BinValues v{address<void>(x[0].cast<uintptr_t>()),
                    x[1].cast<bool>(),
                    x[2].cast<int64_t>(),
                    x[3].cast<int64_t>(),
                    x[4].cast<int64_t>(),
                    x[5].cast<int64_t>()};
  if (v.rows < 0 || v.columns < 0) bad_argument(op, "x", "sizes of 0 or more");
  if (!v.data && v.rows && v.columns) bad_argument(op, "x", "an address");
  return v;
}

void edges(const py::tuple& x, uintptr_t sample, int64_t samples, uintptr_t skip, int max_bins,
           uintptr_t quantiles, uintptr_t out, uintptr_t counts) {
  BinEdgesCall call;
  call.x = values_of("bin_edges", x);
  if (max_bins < 2 || max_bins >= kMostBins)
    bad_argument("bin_edges", "max_bins", "2 to 255, got " + std::to_string(max_bins));
  call.sample = address<const int64_t>(sample);
  if (!sample && samples != call.x.rows) bad_argument("bin_edges", "samples", "one a row");
  if (samples < 0) bad_argument("bin_edges", "samples", "0 or more");
  for (int64_t i = 0; sample && i < samples; i++)
    if (call.sample[i] < 0 || call.sample[i] >= call.x.rows)
      bad_argument("bin_edges", "sample",
                   "rows from 0 to " + std::to_string(call.x.rows - 1) + ", got " +
                       std::to_string(call.sample[i]));
  call.samples = samples;
  call.skip = address<const uint8_t>(skip);
  call.max_bins = max_bins;
  call.quantiles = address<const double>(quantiles);
  call.edges = address<double>(out);
  call.counts = address<int32_t>(counts);
  py::gil_scoped_release release;
  find_bin_edges(call);
}

void bins(const py::tuple& x, uintptr_t edges, uintptr_t offsets, uintptr_t categorical,
          int missing, uintptr_t out, int64_t out_step) {
  const BinValues v = values_of("bin_columns", x);
  if (missing < 0 || missing >= kMostBins) bad_argument("bin_columns", "missing", "0 to 255");
  const auto* at = address<const int64_t>(offsets);
  const auto* category = address<const uint8_t>(categorical);
  for (int64_t c = 0; c < v.columns; c++)
    if (at[c + 1] < at[c] || at[c + 1] - at[c] >= kMostBins)
      bad_argument("bin_columns", "offsets", "up to 255 edges a column");
  py::gil_scoped_release release;
  std::vector<BinTable> tables(static_cast<size_t>(v.columns));
  for (int64_t c = 0; c < v.columns; c++)
    make_bin_table(address<const double>(edges) + at[c], int(at[c + 1] - at[c]),
                   category && category[c], missing, tables[size_t(c)]);
  bin_columns(v, tables.data(), address<uint8_t>(out), out_step);
}

// Calls of Python from within growing, where the GIL is not held.
struct PythonHooks : GrowHooks {
  py::object reduce_with, subsample_with, interact_with;

  bool distributed() const override { return !reduce_with.is_none(); }
  void reduce(int64_t* sums, int64_t count) override {
    py::gil_scoped_acquire acquire;
    reduce_with(reinterpret_cast<uintptr_t>(sums), count);
  }
  bool subsamples() const override { return !subsample_with.is_none(); }
  void subsample(int count, uint8_t* chosen) override {
    py::gil_scoped_acquire acquire;
    const std::string marks = subsample_with(count).cast<py::bytes>();
    if (marks.size() != size_t(count))
      bad_argument("HistogramGrower.grow", "subsample", "a byte for each feature");
    std::copy(marks.begin(), marks.end(), chosen);
  }
  bool interacts() const override { return !interact_with.is_none(); }
  int interact(int state, int feature, std::vector<uint32_t>& allowed) override {
    py::gil_scoped_acquire acquire;
    const auto result = interact_with(state, feature).cast<py::tuple>();
    allowed = result[1].cast<std::vector<uint32_t>>();
    for (const uint32_t f : allowed)
      if (f >= features) bad_argument("HistogramGrower.grow", "interact", "features there are");
    return result[0].cast<int>();
  }
  uint32_t features = 0;
};

class PythonGrower {
 public:
  PythonGrower(uintptr_t columns, int64_t step, int64_t rows, int features, int missing,
               uintptr_t bins, uintptr_t categorical, uintptr_t monotonic)
      : rows_(rows), features_(features) {
    const char* op = "HistogramGrower";
    if (rows < 0 || rows >= int64_t(INT32_MAX)) bad_argument(op, "rows", "0 to 2^31 - 2");
    if (features < 1) bad_argument(op, "features", "1 or more");
    if (step < rows) bad_argument(op, "step", "at least the rows");
    if (missing < 1 || missing >= kMostBins) bad_argument(op, "missing", "1 to 255");
    std::vector<FeatureBins> list;
    for (int f = 0; f < features; f++) {
      const uint32_t n = address<const uint32_t>(bins)[f];
      // None where a column of categories holds missing values alone.
      if (n > uint32_t(missing))
        bad_argument(op, "bins", "0 to " + std::to_string(missing) + ", got " + std::to_string(n));
      list.push_back({int(n), missing, false,
                      categorical && address<const uint8_t>(categorical)[f] != 0,
                      monotonic ? address<const int8_t>(monotonic)[f] : int8_t(0)});
    }
    py::gil_scoped_release release;
    grower_ = std::make_unique<Grower>(address<const uint8_t>(columns), step, rows, list);
  }

  py::bytes missing() const {
    std::string out(size_t(features_), '\0');
    for (int f = 0; f < features_; f++) out[size_t(f)] = char(grower_->has_missing(f));
    return out;
  }
  void set_missing(const std::string& marks) {
    if (marks.size() != size_t(features_))
      bad_argument("HistogramGrower", "missing", "a byte for each feature");
    for (int f = 0; f < features_; f++) grower_->set_has_missing(f, marks[size_t(f)] != 0);
  }

  py::bytes grow(uintptr_t gradient, uintptr_t hessian, double largest_gradient,
                 double largest_hessian, int64_t all_rows, int max_leaves, int max_depth,
                 int64_t min_samples, double l2, double min_hessian, double min_gain,
                 double shrinkage, std::vector<uint32_t> allowed, py::object reduce,
                 py::object subsample, py::object interact) {
    const char* op = "HistogramGrower.grow";
    GrowSettings s;
    s.max_leaves = max_leaves, s.max_depth = max_depth;
    s.rules = {l2, min_hessian, min_gain, min_samples};
    s.shrinkage = shrinkage;
    if (all_rows < rows_ || all_rows < 1) bad_argument(op, "all_rows", "at least the own rows");
    s.all_rows = all_rows;
    s.largest_gradient = largest_gradient, s.largest_hessian = largest_hessian;
    s.constant_hessian = !hessian;
    for (const uint32_t f : allowed)
      if (f >= uint32_t(features_)) bad_argument(op, "allowed", "features there are");
    s.allowed = std::move(allowed);
    PythonHooks hooks;
    hooks.reduce_with = std::move(reduce), hooks.subsample_with = std::move(subsample);
    hooks.interact_with = std::move(interact), hooks.features = uint32_t(features_);
    {
      py::gil_scoped_release release;
      tree_ =
          grower_->grow(address<const float>(gradient), address<const float>(hessian), s, hooks);
    }
    return py::bytes(reinterpret_cast<const char*>(tree_.data()), tree_.size() * sizeof(GrownNode));
  }

  int words() const { return grower_->words(); }
  uintptr_t partition() const { return reinterpret_cast<uintptr_t>(grower_->partition()); }

  void add_values(uintptr_t values, int64_t count, uintptr_t prediction) const {
    if (count != int64_t(tree_.size()))
      bad_argument("HistogramGrower.add_values", "values", "one a node");
    py::gil_scoped_release release;
    grower_->add_values(tree_, address<const double>(values), address<double>(prediction));
  }

 private:
  int64_t rows_;
  int features_;
  std::unique_ptr<Grower> grower_;
  std::vector<GrownNode> tree_;
};

}  // namespace

void bind_tree_hist(py::module_& m) {
  m.def("bin_edges", &edges, "Edges of columns, by quantiles or midpoints.", py::arg("x"),
        py::arg("sample"), py::arg("samples"), py::arg("skip"), py::arg("max_bins"),
        py::arg("quantiles"), py::arg("edges"), py::arg("counts"));
  m.def("bin_columns", &bins, "Bins of all columns; edges lie from offsets[c] to offsets[c + 1].",
        py::arg("x"), py::arg("edges"), py::arg("offsets"), py::arg("categorical"),
        py::arg("missing"), py::arg("out"), py::arg("out_step"));
  m.def(
      "loss_gradients",
      [](const std::string& loss, uintptr_t y, uintptr_t raw, uintptr_t weight, uintptr_t gradient,
         uintptr_t hessian, int64_t n) {
        if (loss != "squared_error" && loss != "half_binomial")
          bad_argument("loss_gradients", "loss", "squared_error or half_binomial");
        if (n < 0 || (n && (!y || !raw || !gradient)))
          bad_argument("loss_gradients", "y, raw, gradient", "addresses of n numbers");
        const LossRows rows{address<const double>(y), address<const double>(raw),
                            address<const double>(weight), address<float>(gradient),
                            address<float>(hessian)};
        py::gil_scoped_release release;
        loss_gradients(loss == "squared_error" ? Loss::squared_error : Loss::half_binomial, rows,
                       n);
      },
      "Gradients, and hessians if asked for, of a loss in float32, from float64.", py::arg("loss"),
      py::arg("y"), py::arg("raw"), py::arg("weight"), py::arg("gradient"), py::arg("hessian"),
      py::arg("n"));
  m.def(
      "largest_magnitude",
      [](uintptr_t x, int64_t n) {
        py::gil_scoped_release release;
        return largest_magnitude(address<const float>(x), n);
      },
      "The largest magnitude of n float32; NaN where one is not finite.", py::arg("x"),
      py::arg("n"));
  py::class_<PythonGrower>(m, "HistogramGrower",
                           "Grows trees on bins: uint8, feature after feature.")
      .def(py::init<uintptr_t, int64_t, int64_t, int, int, uintptr_t, uintptr_t, uintptr_t>(),
           py::arg("columns"), py::arg("step"), py::arg("rows"), py::arg("features"),
           py::arg("missing"), py::arg("bins"), py::arg("categorical"), py::arg("monotonic"))
      .def("missing", &PythonGrower::missing, "A byte for each feature: is a value missing?")
      .def("set_missing", &PythonGrower::set_missing, py::arg("marks"))
      .def("grow", &PythonGrower::grow, "A tree; its nodes as bytes.", py::arg("gradient"),
           py::arg("hessian"), py::arg("largest_gradient"), py::arg("largest_hessian"),
           py::arg("all_rows"), py::arg("max_leaves"), py::arg("max_depth"), py::arg("min_samples"),
           py::arg("l2"), py::arg("min_hessian"), py::arg("min_gain"), py::arg("shrinkage"),
           py::arg("allowed"), py::arg("reduce"), py::arg("subsample"), py::arg("interact"))
      .def("words", &PythonGrower::words, "How many int64 a bin's sums took in the last tree.")
      .def("partition", &PythonGrower::partition, "Address of the rows in the leaves' order.")
      .def("add_values", &PythonGrower::add_values,
           "Adds the last tree's values, one a node, to a prediction of all rows.",
           py::arg("values"), py::arg("count"), py::arg("prediction"));
}
