// float32 operands as bfloat16 parts in memory, for the tensor cores of sm_90a, which take matrices
// from shared memory as the copy engine brought them.
#pragma once
#include "cuda/gemm/gemm.hpp"
#include "cuda/ptx.cuh"

namespace fastnn::cuda {

// K of the parts, so that rows begin at multiples of 16 bytes.
inline int64_t padded_depth(int64_t k) { return (k + 7) / 8 * 8; }

// Each part is what those before it leave, rounded; three hold all 24 bits. to[part][batch][extent]
// [padded_depth(k)], from an operand of g with any strides; `batches` 1: the first one's, for all.
// At most 65535 batches, and 64 times as many of extent.
void make_parts(const Gemm& g, const Operand& x, int64_t extent, int64_t extent_stride,
                int64_t k_stride, int parts, int64_t batches, __nv_bfloat16* to, void* stream);

}  // namespace fastnn::cuda
