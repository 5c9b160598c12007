// Fake quantization (Jacob et al., CVPR 2018): what quantizing and dequantizing leave of x, with a
// bit an element that says whether it was within the range, for the gradient that goes straight
// through (Bengio et al., arXiv:1308.3432). With the gradients of scale and zero point (learned
// step size: Esser et al., ICLR 2020; Bhalgat et al., CVPR Workshops 2020):
//
//   r = round(x / s)                       half to even, or up with the probability of its fraction
//   d = clamp(r, qmin - z, qmax - z)       NaN becomes 0, or qmin - z as in torch
//   out = d s,  inside = (d == r)
//   dx = inside g,  ds = sum of g (inside ? d - x / s : d),  dz = sum of g (inside ? 0 : -s)
//
// in float32 (float64 for float64), 1 / s rounded to float32. See common/philox.hpp for the bits
// that decide a random rounding: element e is rounded up where the upper 24 bits of its word, as a
// fraction, are less than that of x / s.
#pragma once
#include <cstdint>

#include "common/dtype.hpp"

namespace fastnn {

constexpr int kMaxFakeDims = 64;  // torch's own limit
constexpr int kFakeTypes = 4;     // DType f32, f64, bf16, f16

// The bits of n elements, row-major, and what may be read and is written as 0 beyond them.
constexpr int64_t fake_mask_bytes(int64_t n) { return n / 8 + 8; }

enum class ZeroPoint : int { none = 0, integers = 1, numbers = 2 };

// What x is rounded to.
struct FakeGrid {
  const float* scale;
  const void* zero_point;  // of int32, or of float32, which is rounded half to even and clamped
  ZeroPoint zero_kind;
  const int64_t* strides;  // of both, in elements, one a dimension of x; 0 where it is shared
  float lowest, highest;   // of the integers
  // As torch's functions: nothing is checked, and NaN becomes the lowest integer.
  bool as_torch;
  bool wide;             // products of float64 are not rounded to float32
  const uint64_t* seed;  // of random rounding; null is to nearest
};

// Of a call whose grid is no grid, unless it is as torch's.
enum class BadGrid : int { none = 0, scale = 1, zero_point = 2 };

// Strides count elements; 0 is allowed in what is read.
struct FakeQuantize {
  DType type;
  int dims;
  const int64_t* shape;
  const void* x;
  const int64_t* x_strides;
  void* out;
  const int64_t* out_strides;
  uint8_t* mask;  // fake_mask_bytes, or null
  FakeGrid grid;
};
BadGrid fake_quantize(const FakeQuantize& call);

// out = mask ? grad : 0 grad.
struct FakeMasked {
  DType type;
  int dims;
  const int64_t* shape;
  const void* grad;
  const int64_t* grad_strides;
  void* out;
  const int64_t* out_strides;
  const uint8_t* mask;
};
void fake_masked(const FakeMasked& call);

// All three gradients in one pass. `by_scale` and `by_zero_point` lie as scale does, `count`
// numbers each, and are multiplied by `factor`; by_zero_point may be null.
struct FakeGradients {
  DType type;
  int dims;
  const int64_t* shape;
  const void* grad;
  const int64_t* grad_strides;
  const void* x;
  const int64_t* x_strides;
  void* out;
  const int64_t* out_strides;
  const uint8_t* mask;
  FakeGrid grid;
  int64_t count;
  double factor;
  float* by_scale;
  float* by_zero_point;
};
void fake_gradients(const FakeGradients& call);

// ---- the kernels of one instruction set ----

// Rows of one length, whose elements' indices follow on each other from row to row.
struct FakeRows {
  const void* x;
  const void* grad;
  void* out;
  int64_t x_stride, grad_stride, out_stride;  // within a row
  int64_t x_row, grad_row, out_row;
  int64_t rows, n;
  uint64_t first;  // index of the first element
  const float* scale;
  const void* zero_point;
  int64_t scale_stride, scale_row;  // of the zero points, too
};

struct FakeQuantizeKernels {
  using Forward = BadGrid (*)(const FakeRows& rows, const FakeGrid& grid, uint8_t* mask,
                              bool around_caches);
  using Masked = void (*)(const FakeRows& rows, const uint8_t* mask, bool around_caches);
  // One scale a row: sums[2 i] and sums[2 i + 1] of row i are those of ds and of dz / -s.
  using RowGradients = void (*)(const FakeRows& rows, const FakeGrid& grid, const uint8_t* mask,
                                bool around_caches, double* sums);
  // One scale a column: both sums of all columns, one behind the other, are added to.
  using ColumnGradients = RowGradients;
  Forward forward[kFakeTypes];
  Masked masked[kFakeTypes];
  RowGradients row_gradients[kFakeTypes];
  ColumnGradients column_gradients[kFakeTypes];
};
const FakeQuantizeKernels& portable_fake_quantize();
const FakeQuantizeKernels& avx2_fake_quantize();
const FakeQuantizeKernels& avx512_fake_quantize();

}  // namespace fastnn
