// Pooling, for Python.
#include "cuda/pool/pool.hpp"

#include "bind/pool_arguments.hpp"
#include "cuda/bind/bind.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

void pool_call(int job, int dims, uintptr_t x_ptr, py::handle x_shape, py::handle x_strides,
               uintptr_t out_ptr, py::handle out_shape, py::handle out_strides, uintptr_t codes_ptr,
               py::handle code_strides, bool wide_codes, py::handle kernel, py::handle stride,
               py::handle padding, py::handle dilation, bool include_padding, double divisor,
               int dtype, int device, uintptr_t stream) {
  const PoolCall call = pool_arguments(job, dims, x_ptr, x_shape, x_strides, out_ptr, out_shape,
                                       out_strides, codes_ptr, code_strides, wide_codes, kernel,
                                       stride, padding, dilation, include_padding, divisor, dtype);
  py::gil_scoped_release release;
  cuda::OnDevice on(device);
  cuda::pool(PoolJob(job), call, reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_pool(py::module_& m) {
  m.def("pool", &pool_call, "As fastnn._cpu.pool, on a device and a stream.", py::arg("job"),
        py::arg("dims"), py::arg("x_ptr"), py::arg("x_shape"), py::arg("x_strides"),
        py::arg("out_ptr"), py::arg("out_shape"), py::arg("out_strides"), py::arg("codes_ptr"),
        py::arg("code_strides"), py::arg("wide_codes"), py::arg("kernel"), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("include_padding"), py::arg("divisor"),
        py::arg("dtype"), py::arg("device"), py::arg("stream"));
}
