// How indices are read, and looked at.
#pragma once
#include "cuda/device.cuh"
#include "cuda/embedding/embedding.hpp"

namespace fastnn::cuda {

__device__ __forceinline__ int64_t index_at(const Indices& indices, int64_t i, int64_t rows) {
  const int64_t index = indices.wide ? static_cast<const int64_t*>(indices.data)[i]
                                     : static_cast<const int32_t*>(indices.data)[i];
  FASTNN_CHECK(uint64_t(index) < uint64_t(rows), "index out of range in self");
  return index;
}

}  // namespace fastnn::cuda
