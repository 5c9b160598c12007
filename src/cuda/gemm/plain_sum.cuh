// An element of C by one thread, without tensor cores: float32 whose parts were not finite.
#pragma once
#include "cuda/gemm/epilogue.cuh"

namespace fastnn::cuda {

template <class Element>
__device__ float plain_sum(const Gemm& g, const Placed& at, int64_t row, int64_t column) {
  const auto* a = reinterpret_cast<const Element*>(at.a) + row * g.a.row;
  const auto* b = reinterpret_cast<const Element*>(at.b) + column * g.b.column;
  float sum = 0;
  for (int64_t k = 0; k < g.k; k++)
    sum = fmaf(to_float(a[k * g.a.column]), to_float(b[k * g.b.row]), sum);
  return sum;
}

}  // namespace fastnn::cuda
