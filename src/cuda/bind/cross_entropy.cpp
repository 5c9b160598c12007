// Cross entropy, for Python.
#include "cuda/cross_entropy/cross_entropy.hpp"

#include "cuda/bind/rows.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

// `statistics`: float64, of a position lse and, `apart` behind it, the sum of its classes' weights.
cuda::CrossEntropy call_of(const char* op, py::handle shape, int dtype,
                           std::initializer_list<py::handle> operands, py::handle probabilities,
                           uintptr_t index, uintptr_t weight, int64_t ignore_index,
                           double smoothing, uintptr_t statistics, int64_t apart) {
  cuda::CrossEntropy c;
  if (!PyTuple_Check(shape.ptr()) || PyTuple_GET_SIZE(shape.ptr()) < 2)
    bad_argument(op, "shape", "(N, C, ...)");
  if (probabilities.is_none() == (index == 0))
    bad_argument(op, "index, probabilities", "one of them");
  std::vector<py::handle> all(operands);
  if (!probabilities.is_none()) all.push_back(probabilities);
  c.rows = rows_argument(op, shape, 1, all);
  if (c.rows.n == 0 || c.rows.count == 0) bad_argument(op, "shape", "sizes of 1 or more");
  c.type = dtype_argument(op, "dtype", dtype);
  c.index = reinterpret_cast<const int64_t*>(index);
  c.weight = reinterpret_cast<const float*>(weight);
  c.ignore_index = ignore_index;
  if (!(smoothing >= 0 && smoothing <= 1))
    bad_argument(op, "smoothing", "0 to 1, got " + std::to_string(smoothing));
  c.smoothing = float(smoothing);
  if (!statistics) bad_argument(op, "statistics", "an address");
  c.lse = reinterpret_cast<double*>(statistics), c.mass = c.lse + apart;
  return c;
}

}  // namespace

void bind_cross_entropy(py::module_& m) {
  m.def(
      "cross_entropy",
      [](py::handle shape, int dtype, py::handle x, py::handle probabilities, uintptr_t index,
         uintptr_t weight, int64_t ignore_index, double smoothing, uintptr_t statistics,
         int64_t apart, uintptr_t losses, uintptr_t out, int device, uintptr_t stream) {
        const char* op = "cross_entropy";
        const auto call = call_of(op, shape, dtype, {x}, probabilities, index, weight, ignore_index,
                                  smoothing, statistics, apart);
        if (!losses == !out) bad_argument(op, "losses, out", "one of them");
        py::gil_scoped_release release;
        cuda::OnDevice on(device);
        cuda::cross_entropy(call, reinterpret_cast<double*>(losses), reinterpret_cast<void*>(out),
                            reinterpret_cast<void*>(stream));
      },
      py::arg("shape"), py::arg("dtype"), py::arg("x"), py::arg("probabilities"), py::arg("index"),
      py::arg("weight"), py::arg("ignore_index"), py::arg("smoothing"), py::arg("statistics"),
      py::arg("apart"), py::arg("losses"), py::arg("out"), py::arg("device"), py::arg("stream"),
      "The losses of all positions of x (N, C, ...), of its type to out, or as float64 to losses. "
      "x and probabilities are (address, strides); there are these or int64 indices.");
  m.def(
      "cross_entropy_backward",
      [](py::handle shape, int dtype, py::handle x, py::handle by_x, py::handle probabilities,
         uintptr_t index, uintptr_t weight, int64_t ignore_index, double smoothing,
         uintptr_t statistics, int64_t apart, uintptr_t grad, bool each, uintptr_t total,
         int device, uintptr_t stream) {
        const char* op = "cross_entropy_backward";
        const auto call = call_of(op, shape, dtype, {x, by_x}, probabilities, index, weight,
                                  ignore_index, smoothing, statistics, apart);
        if (!grad) bad_argument(op, "grad", "an address");
        py::gil_scoped_release release;
        cuda::OnDevice on(device);
        cuda::cross_entropy_backward(call, reinterpret_cast<const float*>(grad), each,
                                     reinterpret_cast<const double*>(total),
                                     reinterpret_cast<void*>(stream));
      },
      py::arg("shape"), py::arg("dtype"), py::arg("x"), py::arg("by_x"), py::arg("probabilities"),
      py::arg("index"), py::arg("weight"), py::arg("ignore_index"), py::arg("smoothing"),
      py::arg("statistics"), py::arg("apart"), py::arg("grad"), py::arg("each"), py::arg("total"),
      py::arg("device"), py::arg("stream"),
      "The gradient by x, to by_x, which may be x: times float32 grad, `each` position's or one, "
      "over float64 *total if that is not 0.");
  m.def("loss_sum_workspace", &cuda::loss_sum_workspace, py::arg("positions"),
        "The float64 numbers that loss_sum wants.");
  m.def(
      "loss_sum",
      [](uintptr_t losses, int64_t positions, uintptr_t index, uintptr_t weight,
         int64_t ignore_index, bool mean, uintptr_t out, int dtype, uintptr_t total,
         uintptr_t workspace, int device, uintptr_t stream) {
        const char* op = "loss_sum";
        cuda::LossSum s;
        if (positions < 1) bad_argument(op, "positions", "1 or more");
        if (!losses || !out || !total || !workspace)
          bad_argument(op, "losses, out, total, workspace", "addresses");
        s.losses = reinterpret_cast<const double*>(losses), s.positions = positions;
        s.index = reinterpret_cast<const int64_t*>(index);
        s.weight = reinterpret_cast<const float*>(weight), s.ignore_index = ignore_index;
        s.mean = mean, s.out = reinterpret_cast<void*>(out);
        s.type = dtype_argument(op, "dtype", dtype);
        s.total = reinterpret_cast<double*>(total);
        s.workspace = reinterpret_cast<double*>(workspace);
        py::gil_scoped_release release;
        cuda::OnDevice on(device);
        cuda::loss_sum(s, reinterpret_cast<void*>(stream));
      },
      py::arg("losses"), py::arg("positions"), py::arg("index"), py::arg("weight"),
      py::arg("ignore_index"), py::arg("mean"), py::arg("out"), py::arg("dtype"), py::arg("total"),
      py::arg("workspace"), py::arg("device"), py::arg("stream"),
      "*total = the sum of the weights of the positions' classes; *out = the sum of the float64 "
      "losses, over that if `mean`.");
}
