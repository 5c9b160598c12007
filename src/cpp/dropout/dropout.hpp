// Dropout (Srivastava et al., JMLR 15, 2014): out = keep ? x / (1 - p) : 0 x. Which elements stay
// is a function of the seed and of the index in row-major order; see common/philox.hpp.
#pragma once
#include <cstdint>

#include "common/dtype.hpp"

namespace fastnn {

constexpr int kMaxDropoutDims = 64;  // torch's own limit
constexpr int kDropoutTypes = 4;     // DType f32, f64, bf16, f16

// Strides count elements; 0 is allowed in x. out may be x.
struct Dropout {
  DType type;
  int dims;
  const int64_t* shape;
  const void* x;
  const int64_t* x_strides;
  void* out;
  const int64_t* out_strides;
  uint64_t seed;
  double p;  // 0 to 1
};
void dropout(const Dropout& call);

// words[i] = the word of element first + i, on the active instruction set: for tests.
void dropout_words(uint64_t seed, uint64_t first, int64_t n, uint32_t* words);

// The kernels of one instruction set: a run of n elements whose indices follow on each other.
struct DropoutKernels {
  using Run = void (*)(const void* x, int64_t x_stride, void* out, int64_t out_stride, int64_t n,
                       uint64_t seed, uint64_t first, uint64_t threshold, double scale,
                       bool around_caches);
  Run run[kDropoutTypes];
  void (*words)(uint64_t seed, uint64_t first, int64_t n, uint32_t* words);
};
const DropoutKernels& portable_dropout();
const DropoutKernels& avx2_dropout();
const DropoutKernels& avx512_dropout();

}  // namespace fastnn
