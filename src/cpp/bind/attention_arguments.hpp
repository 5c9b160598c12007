// How the arguments of attention are read, on CPUs and GPUs alike.
#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "attention/attention.hpp"
#include "bind/arguments.hpp"

namespace fastnn {

namespace py = pybind11;

struct AttentionArguments {
  const char* op;

  py::tuple parts(const char* name, py::handle given, Py_ssize_t count) const {
    if (!PyTuple_Check(given.ptr()) || PyTuple_GET_SIZE(given.ptr()) != count)
      bad_argument(op, name, "a tuple of " + std::to_string(count));
    return py::reinterpret_borrow<py::tuple>(given);
  }
  char* address(const char* name, py::handle value) const {
    auto* p = reinterpret_cast<char*>(value.cast<uintptr_t>());
    if (!p) bad_argument(op, name, "an address");
    return p;
  }
  // (address, strides)
  AttentionOperand operand(const char* name, py::handle given) const {
    const py::tuple pair = parts(name, given, 2);
    AttentionOperand result;
    if (read_tuple(op, name, pair[1], result.strides, 4) != 4)
      bad_argument(op, name, "four strides");
    result.data = address(name, pair[0]);
    return result;
  }

  // What is known without the tensors.
  void sizes(Attention& call, int dtype, py::handle shape, py::handle bounds) const {
    call.type = dtype_argument(op, "dtype", dtype);
    if (dtype > int(DType::f16)) bad_argument(op, "dtype", "a floating-point type (0 to 3)");
    int64_t sizes[7];
    if (read_tuple(op, "shape", shape, sizes, 7) != 7) bad_argument(op, "shape", "seven sizes");
    for (const int64_t size : sizes)
      if (size < 1) bad_argument(op, "shape", "sizes of 1 or more");
    call.batch = sizes[0], call.heads = sizes[1], call.kv_heads = sizes[2];
    call.q_length = sizes[3], call.k_length = sizes[4];
    call.head_size = sizes[5], call.value_size = sizes[6];
    if (call.heads % call.kv_heads)
      bad_argument(op, "shape", "heads that are a multiple of the key's");
    const py::tuple low_high = parts("bounds", bounds, 2);
    const auto bound = [](py::handle given, int64_t none) {
      if (given.is_none()) return none;
      const int64_t b = given.cast<int64_t>();
      return b < -kNoBound ? -kNoBound : b > kNoBound ? kNoBound : b;
    };
    call.low = bound(low_high[0], -kNoBound), call.high = bound(low_high[1], kNoBound);
  }

  void common(Attention& call, int dtype, py::handle shape, py::handle q, py::handle k,
              py::handle v, double scale, py::handle mask, py::handle bounds, py::handle slopes,
              py::handle dropout) const {
    sizes(call, dtype, shape, bounds);
    call.q = operand("q", q), call.k = operand("k", k), call.v = operand("v", v);
    call.scale = scale;
    if (!mask.is_none()) {
      const py::tuple given = parts("mask", mask, 3);
      call.mask = operand("mask", py::make_tuple(given[0], given[1]));
      call.mask_type = dtype_argument(op, "mask", given[2].cast<int>());
      if (call.mask_type != DType::u8 && call.mask_type != call.type &&
          call.mask_type != DType::f32)
        bad_argument(op, "mask", "booleans, the dtype of q or float32");
    }
    if (!slopes.is_none()) {
      const py::tuple given = parts("slopes", slopes, 4);
      call.slopes = reinterpret_cast<const float*>(address("slopes", given[0]));
      call.slopes_batch = given[1].cast<int64_t>(), call.slopes_head = given[2].cast<int64_t>();
      call.shift = given[3].cast<int64_t>();
    }
    if (!dropout.is_none()) {
      const py::tuple given = parts("dropout", dropout, 2);
      call.dropout = given[0].cast<double>();
      if (!(call.dropout >= 0 && call.dropout <= 1))
        bad_argument(op, "dropout", "a probability, 0 to 1");
      call.seed = reinterpret_cast<const uint64_t*>(address("dropout", given[1]));
    }
  }
};

}  // namespace fastnn
