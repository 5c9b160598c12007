// The convolutions, for Python.
#include "cuda/conv/conv.hpp"

#include "bind/conv_arguments.hpp"
#include "common/activation.hpp"
#include "cuda/bind/bind.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

template <cuda::Product which>
void call(uintptr_t x_ptr, py::handle x_shape, py::handle x_strides, uintptr_t w_ptr,
          py::handle w_shape, py::handle w_strides, uintptr_t y_ptr, py::handle y_shape,
          py::handle y_strides, int dtype, py::handle stride, py::handle padding,
          py::handle dilation, int64_t groups, int precision, bool batch_invariant,
          uintptr_t bias_ptr, uintptr_t residual_ptr, int activation, const py::function& allocate,
          int device, uintptr_t stream) {
  const char* op = "conv";
  Conv c;
  c.x = tensor5_argument(op, "x", x_ptr, x_shape, x_strides);
  c.w = tensor5_argument(op, "w", w_ptr, w_shape, w_strides);
  c.y = tensor5_argument(op, "y", y_ptr, y_shape, y_strides);
  c.type = dtype_argument(op, "dtype", dtype);
  if (c.type != DType::f32 && c.type != DType::bf16 && c.type != DType::f16)
    bad_argument(op, "dtype",
                 std::string("float32, bfloat16 or float16, got ") + dtype_name(c.type));
  read_geometry(op, c, stride, padding, dilation, groups);
  if (precision < 0 || precision > 2) bad_argument(op, "precision", "0 to 2");
  if (activation < 0 || activation >= kActivations) bad_argument(op, "activation", "0 to 7");
  c.precision = Precision(precision), c.batch_invariant = batch_invariant;
  c.bias = reinterpret_cast<const char*>(bias_ptr);
  c.residual = reinterpret_cast<const char*>(residual_ptr);
  c.activation = activation;
  const auto memory = [&](size_t bytes) {
    py::gil_scoped_acquire acquire;
    return reinterpret_cast<void*>(allocate(bytes).cast<uintptr_t>());
  };
  py::gil_scoped_release release;
  cuda::OnDevice on(device);
  cuda::conv(which, c, memory, reinterpret_cast<void*>(stream));
}

template <cuda::Product which>
void define(py::module_& m, const char* name, const char* doc) {
  m.def(name, &call<which>, doc, py::arg("x_ptr"), py::arg("x_shape"), py::arg("x_strides"),
        py::arg("w_ptr"), py::arg("w_shape"), py::arg("w_strides"), py::arg("y_ptr"),
        py::arg("y_shape"), py::arg("y_strides"), py::arg("dtype"), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("groups"), py::arg("precision"),
        py::arg("batch_invariant"), py::arg("bias_ptr"), py::arg("residual_ptr"),
        py::arg("activation"), py::arg("allocate"), py::arg("device"), py::arg("stream"));
}

}  // namespace

void bind_conv(py::module_& m) {
  define<cuda::Product::forward>(
      m, "conv_forward",
      "As fastnn._cpu.conv_forward, on a device and a stream; allocate(bytes): the address of "
      "memory of the device that lives until the kernels have run.");
  define<cuda::Product::input>(m, "conv_input", "As fastnn._cpu.conv_input; see conv_forward.");
  define<cuda::Product::weight>(m, "conv_weight", "As fastnn._cpu.conv_weight; see conv_forward.");
}
