// Values to bins, 32 columns at a time: a lane of a warp has a column, whose edges and ranges lie
// in the bank of shared memory that is its alone. So lanes read and write side by side wherever
// their searches lead them, and bytes of a row that are read together later are written together
// now.
#include "cuda/device.cuh"
#include "cuda/tree/split_search.hpp"
#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kBinThreads = 256, kBinRowsOfBlock = 2048;

// Floats as integers in the same order.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

__global__ void __launch_bounds__(kBinThreads) put_into_bins(const BinRows b) {
  auto* edges = dynamic_shared<float>();  // slots x 32, and so are the ranges
  auto* least = reinterpret_cast<uint32_t*>(edges + b.slots * kGroup);
  uint32_t* largest = least + b.slots * kGroup;
  const int lane = int(threadIdx.x) % kGroup, warp = int(threadIdx.x) / kGroup;
  const int64_t column = int64_t(blockIdx.y) * kGroup + lane;
  const bool there = column < b.columns;
  const int count = there ? b.counts[column] : 0;
  for (int i = warp; i < b.slots; i += kBinThreads / kGroup) {
    edges[i * kGroup + lane] = i < count ? b.edges[column * b.slots + i] : 0;
    least[i * kGroup + lane] = 0xffffffffu;
    largest[i * kGroup + lane] = 0;
  }
  __syncthreads();
  const int64_t first = int64_t(blockIdx.x) * kBinRowsOfBlock;
  const int64_t end = first + kBinRowsOfBlock < b.rows ? first + kBinRowsOfBlock : b.rows;
  const int64_t step = int64_t(gridDim.y) * kGroup;
  for (int64_t row = first + warp; row < end; row += kBinThreads / kGroup) {
    int bin = 0;
    if (there) {
      const float x = b.x[row * b.row_step + column * b.column_step];
      int beyond = count;  // bin <= the answer <= beyond
      while (bin < beyond) {
        const int middle = (bin + beyond) / 2;
        if (x > edges[middle * kGroup + lane])
          bin = middle + 1;
        else
          beyond = middle;
      }
      if (x != x) {
        bin = b.slots - 1;
      } else {
        // Soon there is nothing to write.
        const uint32_t value = ordered(x);
        if (value < least[bin * kGroup + lane]) atomicMin(&least[bin * kGroup + lane], value);
        if (value > largest[bin * kGroup + lane]) atomicMax(&largest[bin * kGroup + lane], value);
      }
    }
    b.bins[row * step + column] = uint8_t(bin);
  }
  __syncthreads();
  if (!there) return;
  for (int i = warp; i < b.slots; i += kBinThreads / kGroup) {
    if (least[i * kGroup + lane] > largest[i * kGroup + lane]) continue;
    atomicMin(&b.least[column * b.slots + i], least[i * kGroup + lane]);
    atomicMax(&b.largest[column * b.slots + i], largest[i * kGroup + lane]);
  }
}

}  // namespace

void bin_rows(const BinRows& b, void* stream) {
  if (b.rows == 0 || b.columns == 0) return;
  const dim3 grid(unsigned(ceil_div(b.rows, kBinRowsOfBlock)), unsigned(groups_of(b.columns)));
  launch(put_into_bins, grid, dim3(kBinThreads), size_t(b.slots) * kGroup * 12, stream, b);
}

}  // namespace fastnn::cuda
