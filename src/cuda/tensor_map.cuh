// A tensor map says to the copy engine of sm_90 and later how a tensor lies in global memory, and
// which tiles of it are copied. Kernels take it by value (const __grid_constant__ TensorMap).
#pragma once
#include "cuda/device.cuh"

#ifdef __CUDACC__
#include <cuda.h>
#endif

namespace fastnn {

// How pieces of 16 bytes are exchanged in shared memory, so that tensor cores find those they read
// at a time in different banks: bits 4 to 6 of an address (fewer for the shorter rows) are xored
// with bits 7 to 9. The values are those of a matrix descriptor.
enum class Swizzle : int { none = 0, bytes128 = 1, bytes64 = 2, bytes32 = 3 };

constexpr int swizzle_bytes(Swizzle s) { return s == Swizzle::none ? 16 : 256 >> int(s); }

constexpr int kMostMapDims = 5;

// Innermost dimension first; it has no stride, as its elements are neighbours.
struct TensorLayout {
  const void* data = nullptr;
  int element_bytes = 0;  // 1, 2 or 4
  int dims = 0;
  int64_t sizes[kMostMapDims] = {};
  int64_t strides[kMostMapDims] = {};  // in bytes
  int box[kMostMapDims] = {};          // elements of a tile
  Swizzle swizzle = Swizzle::none;
};

#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#else
struct alignas(64) TensorMap {
  TensorLayout layout;
};
#endif

// Why no tensor map describes this, for people; null where one does.
const char* why_no_tensor_map(const TensorLayout& layout);

// Throws std::runtime_error where there is none, or the driver refuses.
TensorMap tensor_map(const TensorLayout& layout);

}  // namespace fastnn
