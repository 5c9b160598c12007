// The convolutions for Python.
#include "conv/conv.hpp"

#include <pybind11/pybind11.h>

#include "bind/conv_arguments.hpp"
#include "common/activation.hpp"
#include "conv/inverted.hpp"
#include "gemm/prepared.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

// What conv computes.
enum Which { kForward, kInput, kWeight, kOntoResidual };

bool conv(Which which, uintptr_t x_ptr, py::handle x_shape, py::handle x_strides, uintptr_t w_ptr,
          py::handle w_shape, py::handle w_strides, uintptr_t y_ptr, py::handle y_shape,
          py::handle y_strides, int dtype, py::handle stride, py::handle padding,
          py::handle dilation, int64_t groups, int precision, bool batch_invariant,
          uintptr_t bias_ptr, uintptr_t residual_ptr, int activation, Prepared* prepared) {
  const char* op = "conv";
  Conv c;
  c.x = tensor5_argument(op, "x", x_ptr, x_shape, x_strides);
  c.w = tensor5_argument(op, "w", w_ptr, w_shape, w_strides);
  c.y = tensor5_argument(op, "y", y_ptr, y_shape, y_strides);
  c.type = dtype_argument(op, "dtype", dtype);
  if (int(c.type) > int(DType::f16)) bad_argument(op, "dtype", "a floating-point type");
  read_geometry(op, c, stride, padding, dilation, groups);
  if (precision < 0 || precision > 2) bad_argument(op, "precision", "0 to 2");
  if (activation < 0 || activation >= kActivations) bad_argument(op, "activation", "0 to 7");
  c.precision = Precision(precision), c.batch_invariant = batch_invariant;
  c.bias = reinterpret_cast<const char*>(bias_ptr);
  c.residual = reinterpret_cast<const char*>(residual_ptr);
  c.activation = activation;
  c.prepared = prepared;
  if (which == kOntoResidual && (c.residual != c.y.data || !conv_takes_its_own_residual(c)))
    return false;
  py::gil_scoped_release release;
  if (which == kInput)
    conv_input(c);
  else if (which == kWeight)
    conv_weight(c);
  else
    conv_forward(c);
  return true;
}

template <Which which>
void define(py::module_& m, const char* name, const char* doc) {
  m.def(
      name,
      [](uintptr_t x_ptr, py::handle x_shape, py::handle x_strides, uintptr_t w_ptr,
         py::handle w_shape, py::handle w_strides, uintptr_t y_ptr, py::handle y_shape,
         py::handle y_strides, int dtype, py::handle stride, py::handle padding,
         py::handle dilation, int64_t groups, int precision, bool batch_invariant,
         uintptr_t bias_ptr, uintptr_t residual_ptr, int activation, Prepared* prepared) {
        return conv(which, x_ptr, x_shape, x_strides, w_ptr, w_shape, w_strides, y_ptr, y_shape,
                    y_strides, dtype, stride, padding, dilation, groups, precision, batch_invariant,
                    bias_ptr, residual_ptr, activation, prepared);
      },
      doc, py::arg("x_ptr"), py::arg("x_shape"), py::arg("x_strides"), py::arg("w_ptr"),
      py::arg("w_shape"), py::arg("w_strides"), py::arg("y_ptr"), py::arg("y_shape"),
      py::arg("y_strides"), py::arg("dtype"), py::arg("stride"), py::arg("padding"),
      py::arg("dilation"), py::arg("groups"), py::arg("precision") = 0,
      py::arg("batch_invariant") = false, py::arg("bias_ptr") = 0, py::arg("residual_ptr") = 0,
      py::arg("activation") = 0, py::arg("prepared") = py::none());
}

// A layer of an inverted residual: (address of the filters, their shape and strides, address of the
// bias or 0, activation, prepared), with filters (m or any, channels, edge, edge or any).
Inverted::Layer layer(const char* name, const py::tuple& t, int64_t m, int64_t channels,
                      int64_t edge) {
  const char* op = "inverted_residual";
  if (t.size() != 6) bad_argument(op, name, "six entries");
  Inverted::Layer l;
  l.w = tensor5_argument(op, name, t[0].cast<uintptr_t>(), t[1], t[2]);
  const int64_t* size = l.w.size;
  if ((m ? size[0] != m : size[0] < 1) || size[1] != channels || size[2] != 1 ||
      (edge ? size[3] != edge || size[4] != edge : l.w.spatial() < 1))
    bad_argument(op, name, "filters that suit the layer before");
  l.bias = reinterpret_cast<const char*>(t[3].cast<uintptr_t>());
  l.activation = t[4].cast<int>();
  if (l.activation < 0 || l.activation >= kActivations) bad_argument(op, name, "activation 0 to 7");
  l.prepared = t[5].cast<Prepared*>();
  if (!l.prepared) bad_argument(op, name, "what keeps what is made of the filters");
  return l;
}

bool inverted(uintptr_t x_ptr, py::handle x_shape, py::handle x_strides, uintptr_t y_ptr,
              py::handle y_shape, py::handle y_strides, int dtype, const py::object& expand,
              py::handle expand_stride, py::handle expand_padding, const py::tuple& depthwise,
              int64_t stride, const py::tuple& project, uintptr_t residual_ptr, int precision) {
  const char* op = "inverted_residual";
  Inverted c;
  c.x = tensor5_argument(op, "x", x_ptr, x_shape, x_strides);
  c.y = tensor5_argument(op, "y", y_ptr, y_shape, y_strides);
  c.type = dtype_argument(op, "dtype", dtype);
  if (int(c.type) > int(DType::f16)) bad_argument(op, "dtype", "a floating-point type");
  if (stride < 1 || stride > 2) bad_argument(op, "stride", "1 or 2");
  if (precision < 0 || precision > 2) bad_argument(op, "precision", "0 to 2");
  if (c.x.size[2] != 1 || c.y.size[2] != 1 || c.x.count() == 0)
    bad_argument(op, "x", "images with elements");
  int64_t hidden = c.x.size[1];
  if (read_tuple(op, "expand_stride", expand_stride, c.expand_stride, 2) != 2 ||
      read_tuple(op, "expand_padding", expand_padding, c.expand_padding, 2) != 2)
    bad_argument(op, "expand_stride, expand_padding", "two numbers each");
  int64_t size[2] = {c.x.size[3], c.x.size[4]};
  if (!expand.is_none()) {
    c.expand = layer("expand", py::cast<py::tuple>(expand), 0, hidden, 0);
    hidden = c.expand.w.size[0];
    for (int d = 0; d < 2; d++) {
      const int64_t reach = size[d] + 2 * c.expand_padding[d] - c.expand.w.size[3 + d];
      if (c.expand_stride[d] < 1 || c.expand_padding[d] < 0 || c.expand_padding[d] > INT32_MAX ||
          reach < 0)
        bad_argument(op, "expand", "windows within the padded input");
      size[d] = reach / c.expand_stride[d] + 1;
    }
  }
  c.depthwise = layer("depthwise", depthwise, hidden, 1, 3);
  c.project = layer("project", project, 0, hidden, 1);
  c.stride = stride, c.precision = Precision(precision);
  if (c.y.size[0] != c.x.size[0] || c.y.size[1] != c.project.w.size[0] ||
      c.y.size[3] != (size[0] - 1) / stride + 1 || c.y.size[4] != (size[1] - 1) / stride + 1)
    bad_argument(op, "y", "the size that the layers give");
  c.residual = reinterpret_cast<const char*>(residual_ptr);
  py::gil_scoped_release release;
  return inverted_residual(c);
}

}  // namespace

void bind_conv(py::module_& m) {
  define<kForward>(
      m, "conv_forward",
      "y = activation(conv(x, w) + bias + residual); shapes (N, C, D, H, W), strides in "
      "elements, of any layout; the filters of w dense, contiguous or channels-last.");
  define<kInput>(
      m, "conv_input",
      "x = activation(transposed conv(y, w) + bias + residual): the gradient by the input.");
  define<kWeight>(
      m, "conv_weight",
      "w = the gradient by the weight of conv(x, w), where y is the gradient of its result.");
  define<kOntoResidual>(m, "conv_onto_residual",
                        "conv_forward where y is the residual itself; False, with nothing done, "
                        "where its elements are not read once each.");
  m.def("inverted_residual", &inverted,
        "Two or three convolutions in one pass, see conv/inverted.hpp; y channels-last, the "
        "residual with its strides. False, with nothing done, where there are no kernels for it.",
        py::arg("x_ptr"), py::arg("x_shape"), py::arg("x_strides"), py::arg("y_ptr"),
        py::arg("y_shape"), py::arg("y_strides"), py::arg("dtype"), py::arg("expand"),
        py::arg("expand_stride"), py::arg("expand_padding"), py::arg("depthwise"),
        py::arg("stride"), py::arg("project"), py::arg("residual_ptr") = 0,
        py::arg("precision") = 0);
  m.def(
      "channel_sum",
      [](uintptr_t y_ptr, py::handle y_shape, py::handle y_strides, uintptr_t out_ptr, int dtype) {
        const char* op = "channel_sum";
        const Tensor5 y = tensor5_argument(op, "y", y_ptr, y_shape, y_strides);
        const DType type = dtype_argument(op, "dtype", dtype);
        if (!out_ptr && y.size[1]) bad_argument(op, "out_ptr", "an address");
        py::gil_scoped_release release;
        channel_sum(y, type, reinterpret_cast<void*>(out_ptr));
      },
      "out[c] = the sum of y (N, C, D, H, W) over all but C: the gradient of a bias.",
      py::arg("y_ptr"), py::arg("y_shape"), py::arg("y_strides"), py::arg("out_ptr"),
      py::arg("dtype"));
}
