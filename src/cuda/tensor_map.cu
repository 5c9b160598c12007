#include "cuda/tensor_map.cuh"

namespace fastnn {

// The conditions of cuTensorMapEncodeTiled.
const char* why_no_tensor_map(const TensorLayout& t) {
  if (t.dims < 1 || t.dims > kMostMapDims) return "a number of dimensions other than 1 to 5";
  if (t.element_bytes != 1 && t.element_bytes != 2 && t.element_bytes != 4)
    return "elements of other than 1, 2 or 4 bytes";
  if (reinterpret_cast<uintptr_t>(t.data) % 16) return "an address that is no multiple of 16";
  for (int d = 0; d < t.dims; d++) {
    if (t.sizes[d] < 1 || t.sizes[d] > int64_t(1) << 32)
      return "a size of 0, or of more than 2 to the power of 32";
    if (t.box[d] < 1 || t.box[d] > 256) return "a tile of 0 or more than 256 elements in a row";
    if (d > 0 && (t.strides[d] < 0 || t.strides[d] % 16 || t.strides[d] >= int64_t(1) << 40))
      return "a stride that is negative, no multiple of 16 bytes, or of 2 to the power of 40";
  }
  const int row = t.box[0] * t.element_bytes;
  if (row % 16) return "a tile whose rows are no multiple of 16 bytes";
  if (t.swizzle != Swizzle::none && row > swizzle_bytes(t.swizzle))
    return "a tile whose rows are longer than what is swizzled";
  return nullptr;
}

#ifdef __CUDACC__

// From the driver, through the runtime: the module must import where there is no driver.
static decltype(&cuTensorMapEncodeTiled) driver_function() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &found),
        "cuTensorMapEncodeTiled");
#else
  check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found),
        "cuTensorMapEncodeTiled");
#endif
  if (found != cudaDriverEntryPointSuccess || !function)
    throw std::runtime_error("cuTensorMapEncodeTiled: the driver has no such function");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

TensorMap tensor_map(const TensorLayout& t) {
  static const auto encode = driver_function();
  if (const char* why = why_no_tensor_map(t))
    throw std::runtime_error(std::string("tensor map: ") + why);
  cuuint64_t sizes[kMostMapDims], strides[kMostMapDims];
  cuuint32_t box[kMostMapDims], steps[kMostMapDims];
  for (int d = 0; d < t.dims; d++) {
    sizes[d] = cuuint64_t(t.sizes[d]), box[d] = cuuint32_t(t.box[d]), steps[d] = 1;
    if (d > 0) strides[d - 1] = cuuint64_t(t.strides[d]);
  }
  constexpr CUtensorMapSwizzle kSwizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE,
                                              CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_SWIZZLE_64B,
                                              CU_TENSOR_MAP_SWIZZLE_32B};
  // Bits are copied, whatever they mean: zeros are zeros in every type.
  const auto type = t.element_bytes == 1   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                    : t.element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16
                                           : CU_TENSOR_MAP_DATA_TYPE_UINT32;
  TensorMap map;
  const CUresult status =
      encode(&map, type, cuuint32_t(t.dims), const_cast<void*>(t.data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, kSwizzles[int(t.swizzle)],
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(int(status)));
  return map;
}

#else

TensorMap tensor_map(const TensorLayout& t) {
  if (const char* why = why_no_tensor_map(t))
    throw std::runtime_error(std::string("tensor map: ") + why);
  return {t};
}

#endif

}  // namespace fastnn
