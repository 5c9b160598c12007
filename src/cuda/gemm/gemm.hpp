// C = activation(alpha * row_scale * col_scale * (A B) + bias + beta * residual), in batches, on a
// GPU.
//
// A is M x K, B is K x N, C is M x N, all with any strides (in elements). float32, bfloat16,
// float16 and floats of eight bits are summed in float32, s8 s8 and u8 s8 in int32; C is rounded
// once.
#pragma once
#include <cstdint>

#include "common/activation.hpp"
#include "common/dtype.hpp"
#include "gemm/float8.hpp"

namespace fastnn::cuda {

constexpr int kMaxBatchDims = 6;
enum class BiasAxis : int { none = 0, row = 1, column = 2 };

struct Operand {
  const void* data = nullptr;
  int64_t row = 0, column = 0;  // strides
  int64_t batch[kMaxBatchDims] = {};
};

struct Gemm {
  int64_t m = 0, n = 0, k = 0;
  int batch_dims = 0;
  int64_t batch[kMaxBatchDims] = {};
  DType a_type = DType::f32, out = DType::f32;  // B's is A's, or s8 where A's is u8,
  DType b_type = DType::f32;                    // or this where A's is a float of eight bits
  Operand a, b, c, residual;                    // residual.data may be null, or c.data; of C's type
  float alpha = 1, beta = 0;
  const void* bias = nullptr;
  DType bias_type = DType::f32;
  BiasAxis bias_axis = BiasAxis::none;
  int64_t bias_stride = 1;
  int activation = kNone;
  const float *row_scale = nullptr, *col_scale = nullptr;
  int row_scale_step = 1, col_scale_step = 1;  // 0: one for all
  void* workspace = nullptr;  // scratch memory, of gemm_workspace() bytes, aligned to 16
  int64_t workspace_bytes = 0;
  bool batch_invariant = false;  // sums are added up in an order that depends on K alone
  int parts = 3;                 // of float32: 3 (float32's accuracy), 2 or 1 bfloat16 a number
  bool fast_sums = false;        // of floats of eight bits: in the tensor cores' own precision
};

// The scratch memory that a product wants on the device that is current, in bytes. Without it
// slower kernels do the work.
int64_t gemm_workspace(DType a_type, int parts, int64_t batches, int64_t m, int64_t n, int64_t k,
                       bool batch_invariant);

// On the device that is current. Throws std::invalid_argument for types that have no kernel,
// std::runtime_error where CUDA refuses.
void gemm(const Gemm& g, void* stream);

}  // namespace fastnn::cuda
