// Memory of the caching allocator for Python, handed over as DLPack capsules, so that torch takes
// it without a copy and without this module knowing torch.
#include "common/allocator.hpp"

#include <pybind11/pybind11.h>

#include <memory>
#include <new>

#include "bind/bind.hpp"

namespace py = pybind11;
using namespace fastnn;

namespace {

// The structures of DLPack before version 1 (dmlc/dlpack, include/dlpack/dlpack.h).
namespace dlpack {
struct Device {
  int32_t type;  // 1: CPU
  int32_t id;
};
struct DataType {
  uint8_t code;  // 0 signed, 1 unsigned, 2 floating point, 4 bfloat
  uint8_t bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t dims;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

DataType data_type(DType t) {
  const uint8_t bits = uint8_t(8 * dtype_size(t));
  switch (t) {
    case DType::bf16:
      return {4, bits, 1};
    case DType::s8:
    case DType::s32:
      return {0, bits, 1};
    case DType::u8:
      return {1, bits, 1};
    default:
      return {2, bits, 1};
  }
}
}  // namespace dlpack

constexpr int kMaxDims = 64;

// One result: what DLPack points to, and the memory.
struct Result {
  dlpack::ManagedTensor managed;
  Block block;
  int64_t shape[kMaxDims], strides[kMaxDims];
};

// Runs on whatever thread drops the last reference, perhaps without the GIL: no Python here.
void delete_result(dlpack::ManagedTensor* managed) {
  Result* r = static_cast<Result*>(managed->context);
  deallocate(r->block);
  delete r;
}

// A consumer renames the capsule to "used_dltensor" and takes the tensor over.
void delete_capsule(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, "dltensor")) return;
  auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
  managed->deleter(managed);
}

py::object empty_dlpack(py::handle shape, int dtype) {
  const DType type = dtype_argument("empty_dlpack", "dtype", dtype);
  auto r = std::make_unique<Result>();
  const int dims = read_tuple("empty_dlpack", "shape", shape, r->shape, kMaxDims);
  int64_t elements = 1;
  bool overflow = false, empty = false;
  for (int d = dims - 1; d >= 0; d--) {
    if (r->shape[d] < 0)
      bad_argument("empty_dlpack", "shape",
                   "sizes of 0 or more, got " + std::to_string(r->shape[d]));
    empty |= r->shape[d] == 0;
    r->strides[d] = elements;
    overflow |= __builtin_mul_overflow(elements, r->shape[d] ? r->shape[d] : 1, &elements);
  }
  int64_t bytes = 0;
  overflow |= __builtin_mul_overflow(elements, int64_t(dtype_size(type)), &bytes);
  if (overflow) bad_argument("empty_dlpack", "shape", "fewer than 2^63 bytes in all");
  try {
    r->block = allocate(empty ? 0 : size_t(bytes));
  } catch (const std::bad_alloc&) {
    PyErr_Format(PyExc_MemoryError, "fastnn: cannot allocate %lld bytes for a result",
                 static_cast<long long>(bytes));
    throw py::error_already_set();
  }
  r->managed.tensor = {r->block.data, {1, 0},     dims, dlpack::data_type(type),
                       r->shape,      r->strides, 0};
  r->managed.context = r.get();
  r->managed.deleter = delete_result;
  PyObject* capsule = PyCapsule_New(&r->managed, "dltensor", delete_capsule);
  if (!capsule) {
    deallocate(r->block);
    throw py::error_already_set();
  }
  r.release();
  return py::reinterpret_steal<py::object>(capsule);
}

py::dict stats() {
  const AllocatorStats s = allocator_stats();
  py::dict d;
  d["bytes_live"] = s.bytes_live;
  d["bytes_cached"] = s.bytes_cached;
  d["cache_limit"] = s.cache_limit;
  d["hits"] = s.hits;
  d["misses"] = s.misses;
  return d;
}

}  // namespace

void bind_allocator(py::module_& m) {
  m.def("empty_dlpack", &empty_dlpack,
        "A DLPack capsule (\"dltensor\") of contiguous uninitialised memory. The memory goes back "
        "to the cache when the consuming tensor dies. Raises MemoryError.",
        py::arg("shape"), py::arg("dtype"));
  m.def("empty_cache", &empty_cache, "Returns the memory kept for reuse to the system.",
        py::call_guard<py::gil_scoped_release>());
  m.def("allocator_stats", &stats,
        "bytes_live, bytes_cached, cache_limit, and the hits and misses of large allocations.");
  m.def(
      "set_cache_limit",
      [](int64_t bytes) {
        if (bytes < 0)
          bad_argument("set_cache_limit", "bytes", "0 or more, got " + std::to_string(bytes));
        py::gil_scoped_release release;
        set_cache_limit(size_t(bytes));
      },
      "The most bytes kept for reuse; 0 keeps none. At first a quarter of memory, at most 4 GiB.",
      py::arg("bytes"));
}
