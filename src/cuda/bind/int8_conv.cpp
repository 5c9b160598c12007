// Convolutions of 8-bit images, for Python.
#include "cuda/conv/int8.hpp"

#include "bind/conv_arguments.hpp"
#include "cuda/bind/bind.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

// Sums of more products might not fit into 32 bits.
constexpr int64_t kInt8MostElements = 65793, kMostPixels = int64_t(1) << 31;

template <class T>
const T* pointer(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

void int8_conv_call(uintptr_t x_ptr, py::handle x_shape, py::handle x_strides, bool is_signed,
                    uintptr_t w_ptr, py::handle w_shape, py::handle w_strides, uintptr_t y_ptr,
                    py::handle y_shape, py::handle y_strides, int dtype, py::handle stride,
                    py::handle padding, py::handle dilation, int64_t groups, uintptr_t x_scale,
                    uintptr_t x_zero, uintptr_t w_scale, bool one_scale, uintptr_t y_scale,
                    uintptr_t y_zero, uintptr_t bias, uintptr_t residual, bool residual_is_signed,
                    uintptr_t residual_scale, uintptr_t residual_zero, bool relu, bool relu6,
                    const py::function& allocate, int device, uintptr_t stream) {
  const char* op = "int8_conv";
  cuda::Int8Conv c;
  c.sizes.x = tensor5_argument(op, "x", x_ptr, x_shape, x_strides);
  c.sizes.w = tensor5_argument(op, "w", w_ptr, w_shape, w_strides);
  c.sizes.y = tensor5_argument(op, "y", y_ptr, y_shape, y_strides);
  read_geometry(op, c.sizes, stride, padding, dilation, groups, true);
  c.is_signed = is_signed, c.type = dtype_argument(op, "dtype", dtype);
  const bool narrow = c.type == DType::u8 || c.type == DType::s8;
  if (!narrow && c.type != DType::f32 && c.type != DType::bf16)
    bad_argument(op, "dtype", "float32, bfloat16, uint8 or int8");
  if (c.sizes.y.size[1] != 1 && c.sizes.y.stride[1] != 1)
    bad_argument(op, "y", "an image whose channels are neighbours");
  if (c.sizes.w.size[1] * c.sizes.w.spatial() > kInt8MostElements)
    bad_argument(op, "w",
                 "at most " + std::to_string(kInt8MostElements) +
                     " elements a filter, whose sums fit into 32 bits");
  for (const Tensor5* t : {&c.sizes.x, &c.sizes.y})
    if (t->size[0] * t->spatial() >= kMostPixels)
      bad_argument(op, "x, y", "fewer than 2^31 pixels");
  if (!x_scale || !x_zero || !w_scale || (narrow && (!y_scale || !y_zero)) ||
      (residual && (!residual_scale || !residual_zero)))
    bad_argument(op, "scales and zero points", "addresses");
  c.x_scale = pointer<float>(x_scale), c.x_zero = pointer<int32_t>(x_zero);
  c.w_scale = pointer<float>(w_scale), c.w_step = !one_scale;
  c.y_scale = pointer<float>(y_scale), c.y_zero = pointer<int32_t>(y_zero);
  c.bias = pointer<float>(bias), c.residual = pointer<void>(residual);
  c.residual_type = residual_is_signed ? DType::s8 : DType::u8;
  c.residual_scale = pointer<float>(residual_scale);
  c.residual_zero = pointer<int32_t>(residual_zero);
  c.relu = relu, c.relu6 = relu6;
  const auto memory = [&](size_t bytes) {
    py::gil_scoped_acquire acquire;
    return reinterpret_cast<void*>(allocate(bytes).cast<uintptr_t>());
  };
  py::gil_scoped_release release;
  cuda::OnDevice on(device);
  cuda::int8_conv(c, memory, reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_int8_conv(py::module_& m) {
  m.def("int8_conv", &int8_conv_call,
        "y = requantized convolution of x (uint8 or int8) with w (int8): shapes (N, C, D, H, W), "
        "channels of y neighbours, the residual with y's strides. Scales and the bias are float32, "
        "zero points int32, on the device. allocate: see conv_forward.",
        py::arg("x_ptr"), py::arg("x_shape"), py::arg("x_strides"), py::arg("is_signed"),
        py::arg("w_ptr"), py::arg("w_shape"), py::arg("w_strides"), py::arg("y_ptr"),
        py::arg("y_shape"), py::arg("y_strides"), py::arg("dtype"), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("groups"), py::arg("x_scale"),
        py::arg("x_zero"), py::arg("w_scale"), py::arg("one_scale"), py::arg("y_scale"),
        py::arg("y_zero"), py::arg("bias"), py::arg("residual"), py::arg("residual_is_signed"),
        py::arg("residual_scale"), py::arg("residual_zero"), py::arg("relu"), py::arg("relu6"),
        py::arg("allocate"), py::arg("device"), py::arg("stream"));
}
