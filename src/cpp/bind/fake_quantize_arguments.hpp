// How the bindings of fake quantization read their arguments, on CPUs and GPUs alike.
#pragma once
#include "bind/arguments.hpp"
#include "quant/fake_quantize.hpp"

namespace fastnn {

// The shapes and strides of a call.
struct FakeLayout {
  int dims;
  bool empty = false;
  int64_t shape[kMaxFakeDims];

  FakeLayout(const char* op, pybind11::handle sizes) {
    dims = read_tuple(op, "shape", sizes, shape, kMaxFakeDims);
    for (int d = 0; d < dims; d++) {
      if (shape[d] < 0) bad_argument(op, "shape", "sizes of 0 or more");
      empty |= shape[d] == 0;
    }
  }
  void read_strides(const char* op, const char* name, pybind11::handle t, int64_t* strides) const {
    if (read_tuple(op, name, t, strides, kMaxFakeDims) != dims)
      bad_argument(op, name, "as many strides as dimensions");
  }
};

inline DType fake_type_argument(const char* op, int code) {
  if (code < 0 || code >= kFakeTypes)
    bad_argument(op, "dtype", "a floating-point type (0 to 3), got " + std::to_string(code));
  return DType(code);
}

template <class T>
T* fake_pointer(const char* op, const char* name, uintptr_t address, bool needed) {
  if (!address && needed) bad_argument(op, name, "an address");
  return reinterpret_cast<T*>(address);
}

// (scale, scale_shape, zero_point, zero_kind, quant_min, quant_max, as_torch, wide, seed): scale
// and zero point lie contiguously in scale_shape, which broadcasts to the shape; seed is the
// address of 64 bits, 0 is to nearest.
struct FakeGridArgument {
  FakeGrid grid;
  int64_t count = 1;
  int64_t strides[kMaxFakeDims] = {};

  FakeGridArgument(const FakeGridArgument&) = delete;  // grid points into it
  FakeGridArgument(const char* op, const FakeLayout& layout, const pybind11::tuple& given) {
    if (given.size() != 9) bad_argument(op, "grid", "nine entries");
    grid.scale = fake_pointer<const float>(op, "scale", given[0].cast<uintptr_t>(), !layout.empty);
    int64_t sizes[kMaxFakeDims];
    const int dims = read_tuple(op, "scale_shape", given[1], sizes, kMaxFakeDims);
    if (dims > layout.dims) bad_argument(op, "scale_shape", "no more dimensions than x has");
    for (int d = dims - 1; d >= 0; d--) {
      const int at = layout.dims - dims + d;
      if (sizes[d] != 1 && sizes[d] != layout.shape[at])
        bad_argument(op, "scale_shape", "sizes that broadcast to those of x");
      strides[at] = sizes[d] == 1 ? 0 : count;
      count *= sizes[d];
    }
    const int kind = given[3].cast<int>();
    if (kind < 0 || kind > 2) bad_argument(op, "zero_kind", "0, 1 or 2");
    grid.zero_kind = ZeroPoint(kind);
    grid.zero_point = fake_pointer<const void>(op, "zero_point", given[2].cast<uintptr_t>(),
                                               kind && !layout.empty);
    grid.strides = strides;
    const int64_t lowest = given[4].cast<int64_t>(), highest = given[5].cast<int64_t>();
    // Beyond, float32 does not hold all integers and their differences.
    constexpr int64_t most = 1 << 22;
    if (lowest > highest || lowest < -most || highest > most)
      bad_argument(op, "quant_min, quant_max", "a range within -2^22 to 2^22");
    grid.lowest = float(lowest), grid.highest = float(highest);
    grid.as_torch = given[6].cast<bool>(), grid.wide = given[7].cast<bool>();
    grid.seed = reinterpret_cast<const uint64_t*>(given[8].cast<uintptr_t>());
  }
};

struct FakeForwardArgument {
  FakeLayout layout;
  int64_t x_strides[kMaxFakeDims], out_strides[kMaxFakeDims];
  FakeGridArgument grid;
  FakeQuantize call;

  FakeForwardArgument(const char* op, uintptr_t x, uintptr_t out, uintptr_t mask,
                      pybind11::handle shape, pybind11::handle x_strides_,
                      pybind11::handle out_strides_, int dtype, const pybind11::tuple& given)
      : layout(op, shape), grid(op, layout, given) {
    layout.read_strides(op, "x_strides", x_strides_, x_strides);
    layout.read_strides(op, "out_strides", out_strides_, out_strides);
    call = {fake_type_argument(op, dtype),
            layout.dims,
            layout.shape,
            fake_pointer<const void>(op, "x", x, !layout.empty),
            x_strides,
            fake_pointer<void>(op, "out", out, !layout.empty),
            out_strides,
            fake_pointer<uint8_t>(op, "mask", mask, false),
            grid.grid};
  }
};

struct FakeMaskedArgument {
  FakeLayout layout;
  int64_t grad_strides[kMaxFakeDims], out_strides[kMaxFakeDims];
  FakeMasked call;

  FakeMaskedArgument(const char* op, uintptr_t grad, uintptr_t out, uintptr_t mask,
                     pybind11::handle shape, pybind11::handle grad_strides_,
                     pybind11::handle out_strides_, int dtype)
      : layout(op, shape) {
    layout.read_strides(op, "grad_strides", grad_strides_, grad_strides);
    layout.read_strides(op, "out_strides", out_strides_, out_strides);
    call = {fake_type_argument(op, dtype),
            layout.dims,
            layout.shape,
            fake_pointer<const void>(op, "grad", grad, !layout.empty),
            grad_strides,
            fake_pointer<void>(op, "out", out, !layout.empty),
            out_strides,
            fake_pointer<const uint8_t>(op, "mask", mask, !layout.empty)};
  }
};

}  // namespace fastnn
