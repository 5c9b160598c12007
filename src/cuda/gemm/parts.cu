#include "cuda/gemm/parts.cuh"

#include "cuda/types.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kSide = 64, kThreads = 256;  // of a block's square of the operand
constexpr int kRow = kSide + 1;            // in shared memory, so that columns meet different banks

struct Strides {
  int64_t extent, k;
  int dims;
  int64_t size[kMaxBatchDims], batch[kMaxBatchDims];
};

// A block's threads read a square along whichever way it is contiguous and write rows of K, eight
// elements at a time.
template <int parts>
__global__ void __launch_bounds__(kThreads)
    split(const float* from, const __grid_constant__ Strides strides, const int64_t extent,
          const int64_t k, const int64_t depth, __nv_bfloat16* to, const int64_t part_stride) {
  FASTNN_SHARED(float, square, [kSide * kRow]);
  const int64_t first = int64_t(blockIdx.y) * kSide, first_k = int64_t(blockIdx.x) * kSide;
  const int64_t batch = blockIdx.z;
  int64_t left = batch;
  for (int d = strides.dims - 1; d >= 0; d--) {
    from += left % strides.size[d] * strides.batch[d];
    left /= strides.size[d];
  }
  const bool along = strides.k == 1;
  const int fast = int(threadIdx.x) % kSide, slow = int(threadIdx.x) / kSide;
#pragma unroll
  for (int i = 0; i < kSide; i += kThreads / kSide) {
    const int at = along ? slow + i : fast, at_k = along ? fast : slow + i;
    const bool inside = first + at < extent && first_k + at_k < k;
    square[at * kRow + at_k] =
        inside ? from[(first + at) * strides.extent + (first_k + at_k) * strides.k] : 0;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSide * kSide / 8; i += kThreads) {
    const int at = (i + int(threadIdx.x)) / (kSide / 8), at_k = int(threadIdx.x) % (kSide / 8) * 8;
    if (first + at >= extent || first_k + at_k >= depth) continue;
    float x[8];
#pragma unroll
    for (int e = 0; e < 8; e++) x[e] = square[at * kRow + at_k + e];
    __nv_bfloat16* out = to + (batch * extent + first + at) * depth + first_k + at_k;
#pragma unroll
    for (int part = 0; part < parts; part++, out += part_stride) {
      uint32_t two[4];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        two[e] = ptx::pack_bf16(x[2 * e], x[2 * e + 1]);
        x[2 * e] -= __uint_as_float(two[e] << 16);
        x[2 * e + 1] -= __uint_as_float(two[e] & 0xFFFF0000u);
      }
      *reinterpret_cast<uint4*>(out) = make_uint4(two[0], two[1], two[2], two[3]);
    }
  }
}

}  // namespace

void make_parts(const Gemm& g, const Operand& x, int64_t extent, int64_t extent_stride,
                int64_t k_stride, int parts, int64_t batches, __nv_bfloat16* to, void* stream) {
  Strides strides{extent_stride, k_stride, batches > 1 ? g.batch_dims : 0, {}, {}};
  for (int d = 0; d < strides.dims; d++)
    strides.size[d] = g.batch[d], strides.batch[d] = x.batch[d];
  const int64_t depth = padded_depth(g.k), part_stride = batches * extent * depth;
  const auto kernel = parts == 3 ? split<3> : parts == 2 ? split<2> : split<1>;
  const dim3 grid(unsigned(ceil_div(g.k, kSide)), unsigned(ceil_div(extent, kSide)),
                  unsigned(batches));
  launch(kernel, grid, dim3(kThreads), 0, stream, static_cast<const float*>(x.data), strides,
         extent, g.k, depth, to, part_stride);
}

}  // namespace fastnn::cuda
