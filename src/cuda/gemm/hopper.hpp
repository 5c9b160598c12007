// The matrix product by the copy engine and the warpgroups of sm_90a.
#pragma once
#include <cstdint>

#include "cuda/gemm/gemm.hpp"

namespace fastnn::cuda {

// Scratch memory that a product wants on such a device, in bytes, by its shape alone.
int64_t hopper_workspace(DType a_type, int parts, int64_t batches, int64_t m, int64_t n, int64_t k,
                         bool batch_invariant);

// Computes it if tensor maps can describe the operands, and if the workspace is there that it
// wants; else does nothing and returns false. For g with no dimension of 0.
bool gemm_on_hopper(const Gemm& g, void* stream);

// Likewise of floats of eight bits alone (hopper_float8.cu).
bool float8_on_hopper(const Gemm& g, void* stream);

// How many they have computed: tests ask which kernel did.
int64_t gemms_on_hopper();

}  // namespace fastnn::cuda
