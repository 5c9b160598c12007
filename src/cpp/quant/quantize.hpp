// Quantization: q = round(x / scale) + zero point, and back. The formulas, their source and what
// becomes of NaN and infinity are in python/fastnn/ops/quantize.py.
//
// Which elements share a scale is said by strides: scale_strides has one a dimension of x, in
// elements of a dense array of scales, and 0 where the scale is shared. Groups of g neighbours are
// one more dimension, of g, of stride 0.
#pragma once
#include <cstdint>

#include "common/dtype.hpp"
#include "quant/scheme.hpp"

namespace fastnn {

constexpr int kMaxQuantizeDims = 65;  // torch's own limit, and groups
constexpr int kQuantizeTypes = 4;     // DType f32, f64, bf16, f16

// x, an array of numbers; q, one of a scheme. Strides count elements. Where q is packed its
// elements are halves of bytes: its last dimension is dense and even (with the groups before it),
// and its other strides are even.
struct Numbers {
  int dims;
  const int64_t* shape;
  DType type;
  void* x;
  const int64_t* x_strides;
  Scheme scheme;
  void* q;
  const int64_t* q_strides;
  const int64_t* scale_strides;
  int64_t scales;  // how many there are
};

// Stochastic rounding, by the word (common/philox.hpp) of the element's index in row-major order.
struct Rounding {
  bool stochastic;
  uint64_t seed;
};

// std::invalid_argument for a scale that is no positive normal number and for a zero point out of
// the scheme's range; zero_point may be null, which is 0, and is so for floats.
void quantize(const Numbers& numbers, const float* scale, const int32_t* zero_point,
              Rounding rounding);
void dequantize(const Numbers& numbers, const float* scale, const int32_t* zero_point);

// The scales and zero points (of none where symmetric: null) that fit the finite values; q is not
// looked at.
void choose_scale(const Numbers& numbers, bool symmetric, float* scale, int32_t* zero_point);
// Both at once.
void quantize_dynamic(const Numbers& numbers, bool symmetric, float* scale, int32_t* zero_point,
                      Rounding rounding);

// Rows begin to end - 1 of a matrix, each with a scale of its own, on the calling thread, for
// callers that go on with the rows while they are in the cache. zero_point is null where symmetric.
// s8, u8 or a float, not packed. q's rows are dense; strides count elements. With `given`, scales
// and zero points are not chosen, but there, and good.
struct Rows {
  DType type;
  const void* x;
  int64_t row_stride, column_stride;
  int64_t columns;
  Scheme scheme;
  bool symmetric, given;
  void* q;
  int64_t q_row_stride;
  float* scale;
  int32_t* zero_point;
};
void quantize_rows(const Rows& rows, int64_t begin, int64_t end);

// ---- the kernels of one instruction set --------------------------------------------------------

// n elements, the first of which is element `first` of a dense pattern of scales: element i has
// scale (i / group % period) * stride. `factor` is what numbers are multiplied with, the inverse of
// a scale or a scale; `zero` has the zero points in float.
struct ScaledRun {
  const void* from;
  int64_t from_stride;
  void* to;
  int64_t to_stride;
  int64_t n;
  const float* factor;
  const float* zero;
  int64_t group, period, stride, first;
  uint64_t seed, element;  // of the first one's word
  bool around_caches;
};

// The least and the largest finite value of `count` groups of n elements, one behind the other;
// low[i] and high[i] are kept where they are further out. With `each` element i of every group goes
// to low[i] and high[i].
struct RangeRun {
  const void* x;
  int64_t stride;
  int64_t n, count;
  float* low;
  float* high;
  bool each;
};

struct QuantizeKernels {
  using Run = void (*)(const ScaledRun&);
  using Range = void (*)(const RangeRun&);
  Run quantize[kQuantizeTypes][kSchemes][2];  // to nearest, stochastic
  Run dequantize[kQuantizeTypes][kSchemes];
  Range range[kQuantizeTypes];
};
const QuantizeKernels& portable_quantize();
const QuantizeKernels& avx2_quantize();
const QuantizeKernels& avx512_quantize();

}  // namespace fastnn
